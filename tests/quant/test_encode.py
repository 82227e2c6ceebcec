"""Quantising from Python, with and without the native module."""

import numpy as np
import pytest
import torch

from kernels import dispatch
from serve_app.quant import dequantize, quantize
from serve_app.quant.encode import ENCODERS


@pytest.mark.parametrize("quant_type", [t for t in ENCODERS if t not in ("F32", "F16", "BF16")])
def test_arrays_give_arrays_and_tensors_tensors(quant_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(0).standard_normal((3, 512)).astype(np.float32)
    blocks = quantize(x, quant_type)
    assert isinstance(blocks, np.ndarray)
    assert blocks.dtype == np.uint8
    assert blocks.shape[0] == 3
    back = dequantize(blocks, quant_type)
    assert isinstance(back, np.ndarray)
    assert back.shape == x.shape
    as_tensor = quantize(torch.from_numpy(x), quant_type)
    assert isinstance(as_tensor, torch.Tensor)
    assert np.array_equal(as_tensor.numpy(), blocks)
    monkeypatch.setattr(dispatch, "native", lambda: dispatch.NativeModule(None, "taken away"))
    in_torch = quantize(x, quant_type)
    assert isinstance(in_torch, np.ndarray)
    if not quant_type.startswith("HQQ"):
        assert np.array_equal(in_torch, blocks)
        assert np.array_equal(dequantize(blocks, quant_type), back)


def test_names_and_widths() -> None:
    x = torch.randn(2, 256)
    expected = quantize(x, "Q4_K")
    assert all(torch.equal(torch.as_tensor(quantize(x, name)), torch.as_tensor(expected)) for name in ("q4k", "4", 4))


def test_types_that_are_only_read_are_refused() -> None:
    with pytest.raises(ValueError, match=r"IQ2_XS can be read but not written; quantise to one of .*Q4_K"):
        quantize(torch.zeros(1, 256), "IQ2_XS")
    with pytest.raises(ValueError, match="a matrix is needed, not 1 dimensions"):
        quantize(torch.zeros(256), "Q4_K")
