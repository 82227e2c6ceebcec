"""Kernels compile for the architectures that they are for, and fit their shared memory; no device is needed."""

from collections.abc import Mapping
from typing import Any

import pytest
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.gpu import activation, kv_write, norm, paged_attention, routing
from kernels.gpu.attention_plan import choose_tiles

SHARED_BYTES = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}
DOTS = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}


def compile_kernel(
    kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any], architecture: int, **options: int
) -> Any:
    """As a launch with pointers and strides that are multiples of 16 would; what else is an int is an i32."""
    names = kernel.arg_names
    kinds = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if kinds[name].startswith("*") or (name.endswith("_stride") and kinds[name] == "i32")
    }
    source = ASTSource(fn=kernel, signature=kinds, constexprs=dict(constants), attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    assert compiled.metadata.shared <= SHARED_BYTES[architecture]
    return compiled


def compile_attention(
    dtype: str, kv_dtype: str, head_dim: int, group: int, queries: int, architecture: int, *, is_odd: bool = False
) -> Any:
    """is_odd: with soft cap and window."""
    tiles = choose_tiles(queries, group, head_dim, 4 if dtype == "fp32" else 2)
    types = {
        "q": f"*{dtype}", "k_cache": f"*{kv_dtype}", "v_cache": f"*{kv_dtype}", "block_tables": "*i32",
        "query_start": "*i32", "context_lens": "*i32", "tile_request": "*i32", "k_scale": "*fp32", "v_scale": "*fp32",
        "out": f"*{dtype}", "part_out": "*fp32", "part_max": "*fp32", "part_sum": "*fp32", "scale": "fp32",
        "softcap": "fp32",
    }  # fmt: skip
    constants = {
        "N_HEADS": 8 * group, "GROUP": group, "HEAD_DIM": head_dim, "BLOCK_SIZE": 32, "QUERIES": tiles.queries,
        "ROWS": tiles.rows, "KEYS": tiles.keys, "WIDTH": tiles.width, "DOT": DOTS[dtype],
        "IS_FP8": kv_dtype == "fp8e4nv", "HAS_SOFTCAP": is_odd, "HAS_WINDOW": is_odd,
        "IS_ONE_TILE": queries <= tiles.queries, "IS_SPLIT": queries <= tiles.queries,
    }  # fmt: skip
    return compile_kernel(
        paged_attention._attend, types, constants, architecture, num_warps=tiles.num_warps, num_stages=tiles.num_stages
    )


def test_decode_loads_ahead() -> None:
    compiled = compile_attention("bf16", "bf16", 128, 4, 1, 90)
    # Three tiles of keys and of values, 8 KiB each.
    assert compiled.metadata.shared >= 6 * (8 << 10)
    assert "cp.async" in compiled.asm["ptx"]
    assert "mma.sync" in compiled.asm["ptx"]


def test_prefill_uses_the_tensor_cores_of_hopper() -> None:
    assert "wgmma" in compile_attention("bf16", "bf16", 128, 4, 512, 90).asm["ptx"]


def test_e4m3_caches_with_everything_else() -> None:
    assert "e4m3" in compile_attention("bf16", "fp8e4nv", 128, 4, 1, 90, is_odd=True).asm["ptx"]


def norm_of(dtype: str, architecture: int, *, adds: bool, is_layer_norm: bool) -> Any:
    types = dict.fromkeys(("x", "residual", "out"), f"*{dtype}") | {"weight": "*fp32", "bias": "*fp32"}
    types |= {"epsilon": "fp32", "offset": "fp32"}
    constants = {
        "COLUMNS": 4096, "WIDTH": 4096, "ROWS": 1, "ADDS": adds, "HAS_BIAS": is_layer_norm,
        "IS_LAYER_NORM": is_layer_norm,
    }  # fmt: skip
    return compile_kernel(norm._norm, types, constants, architecture)


def rope_kv_of(dtype: str, cache: str, rotary_dim: int, architecture: int) -> Any:
    types = dict.fromkeys(("q", "k", "v"), f"*{dtype}") | dict.fromkeys(("k_cache", "v_cache"), f"*{cache}")
    types |= {"positions": "*i64", "slots": "*i64", "table": "*fp32", "k_scale": "*fp32", "v_scale": "*fp32"}
    constants = {
        "N_HEADS": 32, "N_KV_HEADS": 8, "HEAD_DIM": 128, "HALF": rotary_dim // 2, "PAIRS": max(1, rotary_dim // 2),
        "WIDTH": 128, "ROWS": 8, "IS_FP8": cache == "u8",
    }  # fmt: skip
    return compile_kernel(kv_write._rope_kv, types, constants, architecture)


def test_the_small_kernels() -> None:
    norm_of("bf16", 90, adds=True, is_layer_norm=False)
    rope_kv_of("bf16", "u8", 128, 90)
    rope_kv_of("bf16", "bf16", 64, 90)
    constants = {"COLUMNS": 14336, "WIDTH": 1024, "ROWS": 1, "KIND": 0, "IS_GATED": True}
    compile_kernel(activation._activate, {"x": "*bf16", "out": "*bf16"}, constants, 90)
    constants = {"HEAD_DIM": 128, "WIDTH": 128, "ROWS": 4}
    types = {"part_out": "*fp32", "part_max": "*fp32", "part_sum": "*fp32", "out": "*bf16"}
    compile_kernel(paged_attention._merge, types, constants, 90)
    types = dict.fromkeys(("experts", "who", "starts", "tile_starts"), "*i32")
    for num_experts, num_pairs in ((1, 16), (128, 4096)):
        constants = {"TOKENS": 16, "WIDTH": num_experts, "COUNTED": min(8192 // num_experts, num_pairs)}
        compile_kernel(routing._group, types, constants | {"PLACED": min(2048, num_pairs)}, 90)


@pytest.mark.nightly
@pytest.mark.parametrize("architecture", SHARED_BYTES)
@pytest.mark.parametrize("queries", [1, 5, 512])
@pytest.mark.parametrize(("head_dim", "group"), [(64, 4), (80, 1), (96, 3), (128, 8), (256, 2)])
@pytest.mark.parametrize(
    ("dtype", "kv_dtype"), [("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "fp32"), ("bf16", "fp8e4nv")]
)
def test_attention_for_every_architecture(
    dtype: str, kv_dtype: str, head_dim: int, group: int, queries: int, architecture: int
) -> None:
    if kv_dtype == "fp8e4nv" and architecture < 89:
        with pytest.raises(Exception, match="fp8e4nv"):
            compile_attention(dtype, kv_dtype, head_dim, group, queries, architecture, is_odd=True)
        return
    compile_attention(dtype, kv_dtype, head_dim, group, queries, architecture, is_odd=True)


@pytest.mark.nightly
@pytest.mark.parametrize("architecture", SHARED_BYTES)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_small_kernels_for_every_architecture(dtype: str, architecture: int) -> None:
    for adds in (False, True):
        for is_layer_norm in (False, True):
            norm_of(dtype, architecture, adds=adds, is_layer_norm=is_layer_norm)
    for cache in (dtype, "u8"):
        for rotary_dim in (0, 32, 128):
            rope_kv_of(dtype, cache, rotary_dim, architecture)
    for kind in range(3):
        constants = {"COLUMNS": 1000, "WIDTH": 1024, "ROWS": 1, "KIND": kind, "IS_GATED": kind == 1}
        compile_kernel(activation._activate, {"x": f"*{dtype}", "out": f"*{dtype}"}, constants, architecture)
