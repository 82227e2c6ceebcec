"""A mixture's kernels compile for the GPUs that they are for, without one: products on tensor cores, no spilling."""

import re
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.gpu.grouped_matmul import _combine, grouped_matmul
from kernels.gpu.launch_shapes import grouped_shape
from kernels.gpu.planar import PlanarMatrix
from kernels.gpu.planar_forms import PLANAR
from kernels.gpu.routing import _group, _route

SHARED_BYTES = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}
NAMES = {torch.uint8: "*u8", torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64", torch.bfloat16: "*bf16",
         torch.float32: "*fp32"}  # fmt: skip


def compiled(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], architecture: int = 90, **options: Any
) -> str:
    """The assembly; pointers and strides are multiples of 16, other arguments are any 32-bit integers."""
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or (kind == "i32" and name.endswith(("_stride", "num_vectors")))
    }
    source = ASTSource(kernel, signature, constants, aligned)
    found = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    assert found.metadata.shared <= SHARED_BYTES[architecture]
    assembly = str(found.asm["ptx"])
    assert ".local" not in assembly
    assert "atom" not in assembly
    return assembly


def compiled_product(
    name: str, tokens: int, *, is_gated: bool, tiles: int = 8, dtype: str = "bf16", architecture: int = 90
) -> str:
    """Of experts of Mixtral's sizes. name: a type with planes, or plain, weights of the activations' dtype."""
    form = PLANAR.get(name)
    dense = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    planes = [dense] * 4
    if form is not None:
        matrix = PlanarMatrix(form, 1, form.block)
        planes = [torch.int32 if p is None else p.dtype for p in (matrix.low, matrix.high, matrix.sub, matrix.block)]
    rows, columns = (14336, 4096) if is_gated else (4096, 14336)
    shape = grouped_shape(form, rows, columns, tokens, tiles, dense, 132, has_two=is_gated)
    kinds = [NAMES[plane] for plane in planes]
    names = ("low", "high", "sub", "block")
    types = dict(zip(names, kinds, strict=True)) | {f"up_{n}": kind for n, kind in zip(names, kinds, strict=True)}
    types |= dict.fromkeys(("who", "starts", "tile_starts"), "*i32")
    types |= {"x": f"*{dtype}", "out": f"*{dtype}" if shape.split == 1 else "*fp32"}
    number = {"bf16": tl.bfloat16, "fp32": tl.float32}[dtype]
    constants = {
        "TOKENS": tokens, "ROWS": shape.rows, "VECS": shape.vectors, "VECTOR": 1 if form is None else form.vector,
        "SPLIT": shape.split, "FORM": form, "DTYPE": number, "DOT_DTYPE": number, "IS_GATED": is_gated, "KIND": 0,
        "GROUP_BITS": 4,
    }  # fmt: skip
    options = {"num_warps": shape.warps, "num_stages": shape.stages, "enable_fp_fusion": True}
    return compiled(grouped_matmul, types, constants, architecture, **options)


def test_products_use_tensor_cores_and_load_ahead() -> None:
    for name, tokens, is_gated in (("Q4_K", 16, True), ("plain", 64, False)):
        assembly = compiled_product(name, tokens, is_gated=is_gated)
        assert re.search(r"wgmma|mma\.sync", assembly)
        assert re.search(r"cp\.async\.cg.* 0x10", assembly)


def test_what_is_around_them() -> None:
    compiled(
        _route, {"logits": "*fp32", "experts": "*i32", "factors": "*fp32", "two_jitter": "fp32"},
        {"NUM_EXPERTS": 128, "WIDTH": 128, "TOP_K": 8, "ROWS": 8, "IS_SPARSEMIXER": False, "IS_RENORMALISED": True},
    )  # fmt: skip
    compiled(
        _group, dict.fromkeys(("experts", "who", "starts", "tile_starts"), "*i32"),
        {"TOKENS": 16, "WIDTH": 256, "COUNTED": 32, "PLACED": 2048},
    )  # fmt: skip
    compiled(
        _combine, {"parts": "*fp32", "factors": "*fp32", "out": "*bf16"},
        {"COLUMNS": 4096, "TOP_K": 2, "SPLIT": 4, "ROWS": 2, "WIDTH": 512},
    )  # fmt: skip


@pytest.mark.nightly
@pytest.mark.parametrize("architecture", SHARED_BYTES)
@pytest.mark.parametrize("tokens", [16, 32, 64])
@pytest.mark.parametrize("name", [*PLANAR, "plain"])
def test_every_type_for_every_architecture(name: str, tokens: int, architecture: int) -> None:
    for is_gated in (False, True):
        for tiles in (1, 256):
            compiled_product(name, tokens, is_gated=is_gated, tiles=tiles, architecture=architecture)
    compiled_product(name, tokens, is_gated=True, dtype="fp32", architecture=architecture)


@pytest.mark.nightly
@pytest.mark.parametrize("kind", [False, True])
def test_routing_for_every_size(kind: bool) -> None:
    types = {"logits": "*fp32", "experts": "*i32", "factors": "*fp32", "two_jitter": "fp32"}
    for num_experts, top_k in ((2, 2), (8, 2), (60, 4), (512, 10)):
        width = triton.next_power_of_2(num_experts)
        compiled(_route, types, {
            "NUM_EXPERTS": num_experts, "WIDTH": width, "TOP_K": top_k, "ROWS": max(1, 1024 // width),
            "IS_SPARSEMIXER": kind, "IS_RENORMALISED": False,
        })  # fmt: skip
