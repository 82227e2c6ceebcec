"""What Linux says of the processor, and how much of it this process may use."""

import os
import platform
from pathlib import Path


def cpu_name(root: Path = Path("/")) -> str:
    """The processor's name, or at least its architecture."""
    fields = _cpuinfo(root)
    return fields.get("model name") or fields.get("Model") or platform.machine()


def cpu_flags(root: Path = Path("/")) -> frozenset[str]:
    """The first core's flags ('flags' on x86, 'Features' on ARM)."""
    fields = _cpuinfo(root)
    return frozenset((fields.get("flags") or fields.get("Features") or "").split())


def quota_cores(root: Path = Path("/")) -> float | None:
    """Cores' worth of time that the container's cgroup (v2, then v1) allows; None without a limit."""
    words = _read(root / "sys/fs/cgroup/cpu.max").split()
    if len(words) == 2 and words[0].isdigit():
        return int(words[0]) / int(words[1])
    quota = _read(root / "sys/fs/cgroup/cpu/cpu.cfs_quota_us").strip()
    period = _read(root / "sys/fs/cgroup/cpu/cpu.cfs_period_us").strip()
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


def num_cores() -> int:
    """Cores this process may use: the smaller of its affinity mask and its cgroup's quota, at least one."""
    allowed = len(os.sched_getaffinity(0))
    quota = quota_cores()
    return allowed if quota is None else min(allowed, max(1, int(quota)))


def num_physical_cores(root: Path = Path("/")) -> int:
    """Like num_cores, counting cores that share their units (hyper-threads) once: as many threads as computing uses."""
    siblings = {_siblings(cpu, root) for cpu in os.sched_getaffinity(0)}
    quota = quota_cores(root)
    return len(siblings) if quota is None else min(len(siblings), max(1, int(quota)))


def _siblings(cpu: int, root: Path) -> str:
    """The processors that are one core with this one, as Linux lists them; itself where that is not told."""
    topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
    return _read(topology / "core_cpus_list").strip() or _read(topology / "thread_siblings_list").strip() or str(cpu)


def _cpuinfo(root: Path) -> dict[str, str]:
    """The first processor's block of /proc/cpuinfo."""
    first = _read(root / "proc/cpuinfo").split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
