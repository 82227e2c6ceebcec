"""The planar kernels compile for a Hopper GPU, which needs none, and become what they were written to become."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.gpu.dequantize import _dequantize
from kernels.gpu.gemv import gemv
from kernels.gpu.launch_shapes import LaunchShape, rule
from kernels.gpu.planar import PlanarMatrix
from kernels.gpu.planar_forms import PLANAR, PlanarForm
from kernels.gpu.tile_matmul import add_parts, tile_matmul

HOPPER = GPUTarget("cuda", 90, 32)
NAMES = {torch.uint8: "u8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64", torch.bfloat16: "bf16",
         torch.float32: "fp32"}  # fmt: skip
ROWS, COLUMNS = 4096, 4096


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def ptx(kernel: Any, arguments: dict[str, Any], constants: dict[str, Any], **options: Any) -> str:
    """The assembly of a kernel; arguments are the dtypes that pointers have, and integers, as a launch would have them.

    Fails where it needs more shared memory than a Hopper's 227 KiB.
    """
    signature = {}
    attributes = {}
    for i, name in enumerate(kernel.arg_names):
        argument = arguments.get(name)
        if argument is None:
            signature[name] = "constexpr"
        else:
            signature[name] = f"*{NAMES[argument]}" if isinstance(argument, torch.dtype) else "i32"
            if isinstance(argument, torch.dtype) or argument % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=HOPPER,
        options={"enable_fp_fusion": True, **options},
    )
    assert compiled.metadata.shared <= 227 << 10
    assert len(compiled.asm["cubin"]) > 0
    return str(compiled.asm["ptx"])


def planes(form: PlanarForm) -> dict[str, torch.dtype]:
    matrix = PlanarMatrix(form, 1, form.block)
    high = torch.int32 if matrix.high is None else matrix.high.dtype
    sub = torch.int32 if matrix.sub is None else matrix.sub.dtype
    return {"low": torch.int32, "high": high, "sub": sub, "block": matrix.block.dtype}


def sizes(form: PlanarForm) -> dict[str, int]:
    return {"num_x": 3, "num_rows": ROWS, "num_vectors": COLUMNS // form.vector, "x_stride": COLUMNS,
            "out_stride": ROWS, "split_stride": ROWS}  # fmt: skip


def compiled_gemv(form: PlanarForm, shape: LaunchShape) -> str:
    arguments = planes(form) | sizes(form) | {"x": torch.bfloat16, "out": torch.bfloat16}
    constants = {"MOST_X": shape.tokens, "ROWS": shape.rows, "VECS": shape.vectors, "SPLIT": shape.split,
                 "STAGES": shape.stages, "FORM": form}  # fmt: skip
    return ptx(gemv, arguments, constants, num_warps=shape.warps)


def compiled_tile(form: PlanarForm, shape: LaunchShape) -> str:
    out = torch.float32 if shape.split > 1 else torch.bfloat16
    arguments = planes(form) | sizes(form) | {"x": torch.bfloat16, "out": out}
    constants = {"TOKENS": shape.tokens, "ROWS": shape.rows, "VECS": shape.vectors, "SPLIT": shape.split, "FORM": form,
                 "DTYPE": tl.bfloat16, "DOT_DTYPE": tl.bfloat16}  # fmt: skip
    return ptx(tile_matmul, arguments, constants, num_warps=shape.warps, num_stages=shape.stages)


def chosen(form: PlanarForm, tokens: int) -> LaunchShape:
    return rule(form, ROWS, COLUMNS, tokens, torch.bfloat16, 132)


def test_a_gemv_reads_16_bytes_a_thread_and_exchanges_nothing_in_its_loop() -> None:
    assembly = compiled_gemv(PLANAR["Q4_K"], chosen(PLANAR["Q4_K"], 1))
    assert re.search(r"ld\.global.*\.v4\.b32", assembly)
    assert "bar.sync" not in assembly.split("shfl.sync")[0]
    assert ".local" not in assembly


def test_a_tile_multiplies_on_tensor_cores_and_copies_ahead() -> None:
    assembly = compiled_tile(PLANAR["Q6_K"], chosen(PLANAR["Q6_K"], 16))
    assert "wgmma.mma_async" in assembly
    assert re.search(r"cp\.async\.cg.* 0x10", assembly)
    assert ".local" not in assembly


def test_parts_are_added_without_atomics() -> None:
    arguments = {"parts": torch.float32, "out": torch.bfloat16, "num_elements": ROWS, "row_length": ROWS,
                 "out_stride": ROWS, "part_stride": ROWS}  # fmt: skip
    assert "atom" not in ptx(add_parts, arguments, {"SPLIT": 4, "SIZE": 1024}, num_warps=4)


@pytest.mark.parametrize("is_gather", [False, True])
def test_decoding_writes_16_bytes_a_thread(is_gather: bool) -> None:
    assembly = compiled_dequantize(PLANAR["Q8_0"], is_gather)
    assert re.search(r"st\.global.*\.v4\.b32", assembly)
    assert "fma.rn.f32" not in assembly


def compiled_dequantize(form: PlanarForm, is_gather: bool) -> str:
    numbers = {"first_row": 16, "num_out": ROWS, "num_rows": ROWS, "out_stride": COLUMNS}
    numbers["num_vectors"] = COLUMNS // form.vector
    arguments = planes(form) | numbers | {"ids": torch.int64, "out": torch.bfloat16}
    constants = {"IS_GATHER": is_gather, "ROWS": 4, "VECS": 16, "FORM": form, "DTYPE": tl.bfloat16}
    return ptx(_dequantize, arguments, constants, num_warps=2, enable_fp_fusion=False)


@pytest.mark.nightly
@pytest.mark.parametrize("tokens", [1, 2, 4, 16, 32, 64])
@pytest.mark.parametrize("name", PLANAR)
def test_every_type_by_the_rule(name: str, tokens: int) -> None:
    form = PLANAR[name]
    shape = chosen(form, tokens)
    assembly = (compiled_gemv if shape.kernel == "gemv" else compiled_tile)(form, shape)
    assert ".local" not in assembly
    assert "atom" not in assembly


@pytest.mark.nightly
@pytest.mark.parametrize("name", PLANAR)
def test_every_type_decodes(name: str) -> None:
    assert ".local" not in compiled_dequantize(PLANAR[name], False)
