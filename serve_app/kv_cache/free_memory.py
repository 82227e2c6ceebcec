"""How much memory this process may still take: what the machine has available and its control groups leave."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def free_memory_bytes(root: Path = Path("/")) -> int:
    """The smallest of MemAvailable and, for this process's cgroup and each of its ancestors, limit minus working set.

    Knows cgroup v2 and v1, both at once (hybrid), and none. root stands for the file system's root in tests.
    Source: Linux Documentation/admin-guide/cgroup-v2.rst (memory.max, .high, .current, .stat) and cgroup-v1/memory.rst.
    """
    free = [_mem_available(root)]
    for folder in _folders(root, root / "sys/fs/cgroup", controller=None):
        limits = [_number(folder / "memory.max"), _number(folder / "memory.high")]
        free += _left(limits, _number(folder / "memory.current"), _stat(folder, "inactive_file"))
    for folder in _folders(root, root / "sys/fs/cgroup/memory", controller="memory"):
        limits = [_number(folder / "memory.limit_in_bytes")]
        free += _left(limits, _number(folder / "memory.usage_in_bytes"), _stat(folder, "total_inactive_file"))
    return max(0, min(free))


def _left(limits: list[int | None], usage: int | None, reclaimable: int) -> list[int]:
    """What each limit leaves. Page cache that was not used lately is given back under pressure: it is not in use."""
    if usage is None:
        return []
    return [limit - max(0, usage - reclaimable) for limit in limits if limit is not None]


def _folders(root: Path, mount: Path, controller: str | None) -> Iterator[Path]:
    """The process's cgroup and its ancestors under mount. In a container the path that /proc names may lie outside
    what is mounted: then only those of them that exist count, at least the mounted top, which is the container's."""
    path = PurePosixPath(_cgroup_path(root, controller))
    for part in (path, *path.parents):
        folder = mount / str(part).lstrip("/")
        if folder.is_dir():
            yield folder


def _cgroup_path(root: Path, controller: str | None) -> str:
    """From lines 'id:controllers:path' (v1) or '0::path' (v2, controller None)."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "" if controller is None else controller in controllers.split(","):
            # A path outside of the cgroup namespace begins with '/..': only the mounted top can be looked at.
            return "/" if path.startswith("/..") else path
    return "/"


def _mem_available(root: Path) -> int:
    for line in _read(root / "proc/meminfo").splitlines():
        key, _, value = line.partition(":")
        if key == "MemAvailable":
            return int(value.split()[0]) * 1024
    raise OSError(f"{root / 'proc/meminfo'} does not say MemAvailable")


def _stat(folder: Path, key: str) -> int:
    for line in _read(folder / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name == key:
            return int(value)
    return 0


def _number(path: Path) -> int | None:
    """None for 'max', and where there is no such file."""
    text = _read(path).strip()
    return int(text) if text.isdigit() else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
