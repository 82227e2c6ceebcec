"""The encoders compile for a Hopper GPU, which needs none, and keep every operation that must be rounded by itself."""

import re
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.gpu import encode_affine, encode_scales, encode_search, encode_simple, encode_symmetric

FLOATS = {"x", "w", "out", "codes", "terms"}
NUMBERS = {"first", "step", "tenth"}

CASES: list[tuple[Any, dict[str, Any]]] = [
    (encode_search._running_sum, {"LANES": 128}),
    (encode_affine.search_affine, {"N": 32, "TOP": 15, "IS_ABSOLUTE": False, "LANES": 128}),
    (encode_symmetric.search_symmetric, {"N": 16, "TOP": 32, "LANES": 128}),
    (encode_symmetric.refine_symmetric, {"N": 16, "TOP": 4, "LANES": 128}),
    (encode_scales.quantise_scales, {"N": 8, "TOP": 63, "LANES": 128}),
    (encode_simple._eight_bits, {"BLOCKS": 16}),
    (encode_simple._symmetric, {"BITS": 5, "BLOCKS": 16}),
    (encode_simple._affine, {"BITS": 5, "BLOCKS": 16}),
    (encode_simple._mxfp4, {"BLOCKS": 16}),
    (encode_simple._fp8, {"BLOCKS": 16}),
]


@pytest.mark.parametrize(("kernel", "constants"), CASES, ids=lambda case: getattr(case, "__name__", ""))
def test_each_operation_is_rounded_by_itself(
    kernel: Any, constants: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No fused product and sum, none of the approximate divisions, no subnormal numbers flushed to zero."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    is_simple = kernel.__module__ == encode_simple.__name__
    kinds = {"first_up": "*i32", **dict.fromkeys(FLOATS, "*fp32"), **dict.fromkeys(NUMBERS, "fp32")}
    if is_simple:
        kinds["out"] = "*u8"
    signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in kernel.arg_names}
    compiled = triton.compile(
        ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32), options=encode_search.OPTIONS
    )
    ptx = str(compiled.asm["ptx"])
    assert len(compiled.asm["cubin"]) > 0
    assert not re.findall(r"\bfma\.|\.ftz|\.approx|div\.full", ptx)
    assert ".local .align" not in ptx
    # Codes that are refined in memory stay with one thread: no lane is handed from one to another.
    assert is_simple or "convert_layout" not in str(compiled.asm["ttgir"])
