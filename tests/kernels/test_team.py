"""The team of threads: no unit lost or done twice, no deadlock, whatever the threads, the cores and the waiting."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kernels import dispatch
from kernels.cpu import _native
from kernels.cpu.packed import PackedMatrix
from kernels.formats import BY_NAME

CSRC = Path(__file__).parents[2] / "kernels" / "cpu" / "csrc"
SOURCES = [str(Path(__file__).parent / "team" / "stress.cpp"), str(CSRC / "team.cpp")]


def build(folder: Path, *options: str) -> str:
    compiler = shutil.which(os.environ.get("CXX", "")) or shutil.which("c++") or shutil.which("g++")
    assert compiler, "these tests need a C++ compiler"
    program = str(folder / "stress")
    subprocess.run([compiler, "-std=c++20", "-pthread", f"-I{CSRC}", *options, *SOURCES, "-o", program], check=True)
    return program


@pytest.fixture(scope="module")
def stress(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build(tmp_path_factory.mktemp("team"), "-O2")


def run(command: list[str], timeout_s: float = 120) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-2000:]
    return done.stdout


WAITING = {"spins": ("15000", "15000"), "parks at once": ("15000", "0"), "never spins": ("0", "0")}


@pytest.mark.parametrize("waiting", WAITING)
@pytest.mark.parametrize("threads", [1, 2, 3, 9])
def test_stress(stress: str, threads: int, waiting: str) -> None:
    assert run([stress, str(threads), "200", *WAITING[waiting]]) == "ok\n"


def test_more_members_than_cores(stress: str) -> None:
    """All on one processor, where whoever spins keeps the others from working."""
    one = str(min(os.sched_getaffinity(0)))
    taskset = shutil.which("taskset")
    assert taskset
    assert run([taskset, "-c", one, stress, "4", "300", "15000", "15000"]) == "ok\n"


@pytest.mark.nightly
@pytest.mark.parametrize("waiting", WAITING)
def test_no_data_race(tmp_path: Path, waiting: str) -> None:
    program = build(tmp_path, "-O1", "-g", "-fsanitize=thread")
    for threads in ("2", "5"):
        assert "data race" not in run([program, threads, "800", *WAITING[waiting]], 600)


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_long_stress(stress: str) -> None:
    for waiting in WAITING.values():
        for threads in ("2", "4", "17"):
            assert run([stress, threads, "20000", *waiting], 280) == "ok\n"


@pytest.fixture
def _restored() -> Iterator[None]:
    yield
    dispatch.set_num_threads(1)


def cpu_seconds_of_threads() -> list[float]:
    """What each of the team's other threads has used so far; they are known by their name."""
    used = []
    for task in Path("/proc/self/task").iterdir():
        fields = (task / "stat").read_text().rpartition(")")
        if fields[0].endswith("(kernels"):
            user, system = fields[2].split()[11:13]
            used.append((int(user) + int(system)) / os.sysconf("SC_CLK_TCK"))
    return used


@pytest.mark.usefixtures("_restored")
@pytest.mark.parametrize("parks_at_once", [True, False])
def test_an_idle_team_uses_no_processor(parks_at_once: bool) -> None:
    dispatch.set_num_threads(3, parks_at_once=parks_at_once)
    matrix = PackedMatrix(BY_NAME["Q8_0"].type_id, 4096, 1024)
    matrix.matmul(torch.randn(16, 1024))
    time.sleep(0.05)  # they may spin a little longer
    before = cpu_seconds_of_threads()
    assert len(before) == 2
    time.sleep(0.5)  # the idleness that is measured
    assert sum(cpu_seconds_of_threads()) - sum(before) <= 0.02


@pytest.mark.usefixtures("_restored")
def test_torch_has_one_thread_beside_the_team() -> None:
    dispatch.set_num_threads(3)
    assert _native.num_threads() == 3
    assert torch.get_num_threads() == 1


@pytest.mark.usefixtures("_restored")
def test_any_number_of_threads_gives_the_same_bits() -> None:
    matrix = PackedMatrix.of(BY_NAME["Q8_0"].type_id, torch.randint(0, 64, (1000, 34 * 32), dtype=torch.uint8), 1024)
    x = torch.randn(40, 1024)
    expected = matrix.matmul(x)
    for threads in (2, 3, 8):
        dispatch.set_num_threads(threads)
        assert torch.equal(matrix.matmul(x), expected)
