"""The native sources build where there is no x86, and run clean under sanitizers."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels" / "cpu"
ONLY_X86 = ("matmul_avx2.cpp", "matmul_avx2_decoded.cpp", "matmul_avx2_q8.cpp", "matmul_bf16.cpp")
PORTABLE = sorted(
    source
    for source in (KERNELS / "csrc").glob("*.cpp")
    if source.name not in ONLY_X86 and "nanobind" not in source.read_text()
)
# What a compiler for x86 defines by itself and one for ARM does not.
X86_MACROS = ("__SSE2__", "__SSSE3__", "__AVX2__", "__F16C__", "__AVX512F__")


def compiler(*programs: str) -> str:
    found = next((path for program in programs if program and (path := shutil.which(program))), None)
    assert found, "these tests need a C++ compiler"
    return found


def test_the_generic_build_includes_no_x86_header() -> None:
    """Intrinsics' headers do not exist elsewhere; with the macros gone nothing may ask for them."""
    assert len(PORTABLE) > 20
    undefined = [f"-U{macro}" for macro in X86_MACROS]
    command = [
        compiler(os.environ.get("CXX", ""), "c++", "g++"),
        "-std=c++20",
        "-DSIROCCO_ISA=generic",
        *undefined,
        "-M",
    ]
    needed = subprocess.run([*command, *map(str, PORTABLE)], capture_output=True, text=True, check=True).stdout
    assert "vec.h" in needed
    assert "intrin.h" not in needed


@pytest.mark.nightly
@pytest.mark.timeout(1200)
def test_the_generic_build_compiles_for_another_processor() -> None:
    """For ARM where its compiler is installed, else for this processor without its vector instructions."""
    path = compiler("aarch64-linux-gnu-g++", "c++", "g++")
    flags = [] if "aarch64" in path else [f"-U{macro}" for macro in X86_MACROS]
    for source in PORTABLE:
        command = [path, "-std=c++20", "-DSIROCCO_ISA=generic", *flags, "-Wno-psabi", "-fsyntax-only", str(source)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_every_kernel_runs_clean_under_sanitizers(tmp_path: Path) -> None:
    """Address and undefined behaviour sanitizers, all instruction sets of this CPU, memory of exact size."""
    compiler("c++", "g++")
    build = ["cmake", "-S", str(KERNELS), "-B", str(tmp_path), "-DSIROCCO_SANITIZE=ON"]
    subprocess.run(build, capture_output=True, check=True)
    subprocess.run(["cmake", "--build", str(tmp_path), "-j", "2"], capture_output=True, check=True)
    result = subprocess.run([str(tmp_path / "sanitize_kernels")], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.splitlines()[-1] == "generic ran clean"
