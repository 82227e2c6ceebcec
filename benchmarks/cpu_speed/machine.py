"""This machine: its name, and what its memory and its dot instructions can do at most."""

import platform
from dataclasses import dataclass
from typing import Any

from kernels.cpu import _native
from serve_app.cpu_info import cpu_name, num_cores, quota_cores

READ_BYTES = 1 << 30
DOT_KINDS = ("int8", "bf16", "f32")


def read_bandwidth(threads: int, passes: int = 5, huge_pages: bool = True) -> list[float]:
    """Bytes a second of each pass over memory far larger than the caches; a pass before them warms up."""
    return _native.ReadProbe(READ_BYTES, threads, huge_pages).rates(passes + 1)[1:]


def dot_products(kind: str, threads: int, passes: int = 5) -> list[float]:
    """Products a second of each pass, on registers only; empty where the CPU has no such instruction."""
    rates: list[float] = _native.probe_dot(kind, threads, passes)
    return rates


@dataclass(frozen=True, slots=True)
class Machine:
    """bandwidth: (threads, whether in huge pages) → bytes a second. dots: kind → products a second, all threads."""

    description: dict[str, Any]
    bandwidth: dict[tuple[int, bool], list[float]]
    dots: dict[str, list[float]]


def probe(threads: int, passes: int = 5) -> Machine:
    """Measures all of it; takes a few seconds."""
    counts = sorted({1, threads})
    description = {
        "processor": cpu_name(),
        "cores": num_cores(),
        "quota_cores": quota_cores(),
        "threads": threads,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }
    return Machine(
        description,
        {(n, huge): read_bandwidth(n, passes, huge) for n in counts for huge in (False, True)},
        {kind: rates for kind in DOT_KINDS if (rates := dot_products(kind, threads, passes))},
    )
