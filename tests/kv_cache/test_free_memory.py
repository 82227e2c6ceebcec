from pathlib import Path

import pytest

from serve_app.kv_cache.free_memory import free_memory_bytes

GB = 2**30
UNLIMITED_V1 = 9223372036854771712


def machine(root: Path, *, available: int, cgroup: str = "") -> Path:
    write(root / "proc/meminfo", f"MemTotal:       99999999 kB\nMemAvailable:   {available // 1024} kB\n")
    if cgroup:
        write(root / "proc/self/cgroup", cgroup)
    return root


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def v2(folder: Path, *, limit: str, current: int, inactive: int = 0, high: str = "max") -> None:
    write(folder / "memory.max", f"{limit}\n")
    write(folder / "memory.high", f"{high}\n")
    write(folder / "memory.current", f"{current}\n")
    write(folder / "memory.stat", f"anon 1\nfile 2\ninactive_file {inactive}\nactive_file 5\n")


def v1(folder: Path, *, limit: int, usage: int, inactive: int = 0) -> None:
    write(folder / "memory.limit_in_bytes", f"{limit}\n")
    write(folder / "memory.usage_in_bytes", f"{usage}\n")
    write(folder / "memory.stat", f"cache 1\ninactive_file 7\ntotal_inactive_file {inactive}\n")


def test_without_cgroups_what_the_machine_has(tmp_path: Path) -> None:
    assert free_memory_bytes(machine(tmp_path, available=3 * GB)) == 3 * GB


def test_v2_counts_page_cache_as_free(tmp_path: Path) -> None:
    machine(tmp_path, available=100 * GB, cgroup="0::/app\n")
    v2(tmp_path / "sys/fs/cgroup/app", limit=str(8 * GB), current=5 * GB, inactive=GB)
    assert free_memory_bytes(tmp_path) == 4 * GB


def test_v2_the_tightest_ancestor_and_the_soft_limit_count(tmp_path: Path) -> None:
    machine(tmp_path, available=100 * GB, cgroup="0::/pod/app\n")
    v2(tmp_path / "sys/fs/cgroup/pod/app", limit="max", current=GB)
    v2(tmp_path / "sys/fs/cgroup/pod", limit=str(8 * GB), current=2 * GB)
    assert free_memory_bytes(tmp_path) == 6 * GB
    v2(tmp_path / "sys/fs/cgroup/pod/app", limit="max", high=str(3 * GB), current=GB)
    assert free_memory_bytes(tmp_path) == 2 * GB


@pytest.mark.parametrize("path", ["/", "/../../host/slice", "/kubepods/pod1/not-mounted"])
def test_v2_in_a_container_the_mounted_top_counts(tmp_path: Path, path: str) -> None:
    machine(tmp_path, available=100 * GB, cgroup=f"0::{path}\n")
    v2(tmp_path / "sys/fs/cgroup", limit=str(4 * GB), current=GB)
    assert free_memory_bytes(tmp_path) == 3 * GB


def test_v1_with_and_without_limit(tmp_path: Path) -> None:
    machine(tmp_path, available=6 * GB, cgroup="9:name=systemd:/x\n4:cpu,memory:/app\n0::/\n")
    v1(tmp_path / "sys/fs/cgroup/memory", limit=UNLIMITED_V1, usage=50 * GB)
    assert free_memory_bytes(tmp_path) == 6 * GB
    v1(tmp_path / "sys/fs/cgroup/memory/app", limit=4 * GB, usage=3 * GB, inactive=2 * GB)
    assert free_memory_bytes(tmp_path) == 3 * GB


def test_over_the_limit_is_nothing_left(tmp_path: Path) -> None:
    machine(tmp_path, available=6 * GB, cgroup="0::/\n")
    v2(tmp_path / "sys/fs/cgroup", limit=str(GB), current=2 * GB)
    assert free_memory_bytes(tmp_path) == 0


def test_this_machine_has_some() -> None:
    assert 0 < free_memory_bytes() < 2**50
