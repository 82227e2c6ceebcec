"""Which implementation of an op runs: the native one where there is one, else plain torch, and why.

The choice is made when a layer is built, by `choose`; nothing is decided per call. SIROCCO_NATIVE=0 in the environment
turns the native module off, SIROCCO_CPU_ISA names the instruction set that it must use: generic, avx2 or avx512.
SIROCCO_TRITON=0 turns Triton's kernels off, and SIROCCO_TRITON=1 lets them compute on a CPU, in Triton's interpreter.
"""

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

import kernels
from kernels.gpu.support import triton_support
from kernels.reference import sampling

if TYPE_CHECKING:
    from kernels.cpu.packed import PackedMatrix

_REFERENCE: dict[str, Callable[..., Any]] = {
    "uniform": sampling.uniform,
    "draw_tokens": sampling.draw_tokens,
}
_NATIVE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Choice:
    """The implementation chosen for an op: function, its name ('native avx512', 'torch') and the reason."""

    op: str
    function: Callable[..., Any]
    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class NativeModule:
    """The native module's typed wrappers, or None and the reason why there are none."""

    ops: ModuleType | None
    reason: str


@cache
def native() -> NativeModule:
    """Loads the native module once. Tests that want it gone call `native.cache_clear()` or replace this function.

    ValueError, one sentence, where SIROCCO_CPU_ISA names an instruction set that cannot run here.
    """
    if os.environ.get("SIROCCO_NATIVE") == "0":
        return NativeModule(None, "turned off by SIROCCO_NATIVE=0")
    if os.environ.get("SIROCCO_TRITON") == "1":
        return NativeModule(None, "SIROCCO_TRITON=1: Triton's kernels compute")
    try:
        module = importlib.import_module("kernels.cpu._native")
    except ImportError as error:
        return NativeModule(None, f"the native module is not built or does not load here ({error})")
    if getattr(module, "ABI", None) != kernels.ABI:
        return NativeModule(None, "the native module is of another version; reinstall to build it anew")
    if wanted := os.environ.get("SIROCCO_CPU_ISA"):
        usable = module.instruction_sets()
        if wanted not in usable:
            raise ValueError(f"SIROCCO_CPU_ISA={wanted}: the kernels can run as {', '.join(usable)} on this CPU")
        module.use_instruction_set(wanted)
    return NativeModule(importlib.import_module("kernels.cpu.ops"), f"native {module.instruction_set()}")


def choose(op: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Choice:
    """The implementation of an op for tensors of this device and dtype; KeyError for an unknown op."""
    fallback = _REFERENCE[op]
    if torch.device(device).type != "cpu":
        return Choice(op, fallback, "torch", f"no kernel for {torch.device(device).type} yet")
    if dtype not in _NATIVE_DTYPES:
        return Choice(op, fallback, "torch", f"no native kernel for {dtype}")
    found = native()
    if found.ops is None:
        return Choice(op, fallback, "torch", found.reason)
    return Choice(op, getattr(found.ops, op), found.reason, "built and usable on this CPU")


def native_dequantize(type_id: int) -> Callable[..., torch.Tensor] | None:
    """f(blocks uint8 [rows, bytes per row], out=None) → float32 [rows, columns] for CPU tensors; None without one."""
    ops = native().ops
    if ops is None or not ops._native.can_decode(type_id):
        return None
    return lambda blocks, out=None: ops.dequantize(type_id, blocks, out)


def native_quantize(type_name: str) -> Callable[..., torch.Tensor] | None:
    """See kernels.cpu.quantize.quantize_rows, for one type: f(source type's name, source, importance, out); or None."""
    if native().ops is None:
        return None
    from kernels.cpu import quantize

    if not quantize.can_quantize(type_name):
        return None
    return partial(quantize.quantize_rows, type_name)


def triton_quantize(type_name: str, device: torch.device) -> Callable[..., torch.Tensor] | None:
    """f(x [rows, columns], importance or None) → uint8 [rows, bytes per row], all of it on the device, where Triton's
    kernels compute there and the type is one of kernels.gpu.encode.GPU_ENCODERS; else None, and the host encodes."""
    if not triton_computes(device)[0]:
        return None
    from kernels.gpu import encode

    return partial(encode.encode, type_name) if type_name in encode.GPU_ENCODERS else None


def native_matmul(type_id: int) -> Callable[..., torch.Tensor] | None:
    """f(x [T, in], blocks uint8 [out, bytes per row], out=None) → [T, out] in x's dtype, decoding as it multiplies.

    x contiguous, float32, float16 or bfloat16, on the CPU. None without one. Equal rows of x give equal rows of the
    result, whatever T is.
    """
    ops = native().ops
    if ops is None or not ops._native.can_decode(type_id):
        return None
    return lambda x, blocks, out=None: ops.matmul(type_id, x, blocks, out)


def native_matrix(type_id: int, rows: int, columns: int) -> "PackedMatrix | None":
    """A matrix of zeros in the native kernels' layout; None without them, or for a type that they do not know."""
    ops = native().ops
    if ops is None or not ops._native.can_decode(type_id):
        return None
    from kernels.cpu.packed import PackedMatrix

    return PackedMatrix(type_id, rows, columns)


def work_alone() -> None:
    """Native kernels of this thread use no other threads from now on, so that those do not wait for it."""
    ops = native().ops
    if ops is not None:
        ops._native.stay_out_of_team()


def triton_computes(device: torch.device | str) -> tuple[bool, str]:
    """Whether Triton's kernels multiply on this device, and why, or why not.

    ValueError, one sentence, where SIROCCO_TRITON=1 asks for a CPU's tensors and nothing interprets the kernels.
    """
    support = triton_support(device)
    if torch.device(device).type != "cpu" or os.environ.get("SIROCCO_TRITON") == "0":
        return support.is_usable, support.reason
    if os.environ.get("SIROCCO_TRITON") != "1":
        return False, "the model is on cpu"
    if not support.is_usable:
        raise ValueError(f"SIROCCO_TRITON=1: on a CPU that needs TRITON_INTERPRET=1 from the start ({support.reason})")
    return True, support.reason


def set_num_threads(count: int, *, parks_at_once: bool = False) -> None:
    """How many threads compute in this process: the native kernels', of which torch then has one, or torch's.

    parks_at_once: they sleep as soon as a step is done, for others who use the same cores, and else a little later.
    """
    ops = native().ops
    if ops is None:
        torch.set_num_threads(count)
        return
    torch.set_num_threads(1)
    ops._native.set_num_threads(count)
    if parks_at_once:
        ops._native.set_spin(idle_ns=0)
    else:
        ops._native.set_spin()


def num_threads() -> int:
    """How many threads compute in this process, the calling one included."""
    ops = native().ops
    return torch.get_num_threads() if ops is None else int(ops._native.num_threads())
