import pytest
import torch
from torch import Tensor
from torch.nn import functional

from kernels.cpu.packed import PackedMatrix
from kernels.dispatch import native_matrix
from kernels.formats import BY_NAME
from kernels.reference.quant import dequantize
from serve_app.quant.native_weight import NativeWeight
from serve_app.quant.packed import fuse
from serve_app.quant.weight import FusedWeight
from tests.quant.blocks import DECODABLE, IN_FEATURES, random_blocks


def native(name: str, blocks: Tensor, *, is_exact: bool = False, dtype: torch.dtype = torch.float32) -> NativeWeight:
    return NativeWeight(PackedMatrix.of(BY_NAME[name].type_id, blocks, IN_FEATURES), dtype, is_exact=is_exact)


@pytest.mark.parametrize("name", DECODABLE)
def test_exact_products_rows_and_numbers_of_every_type(name: str) -> None:
    blocks = random_blocks(name, rows=37)
    weight = native(name, blocks, is_exact=True)
    decoded = dequantize(name, blocks)
    assert torch.equal(weight.dequantize(), decoded)
    ids = torch.tensor([36, 0, 16, 16])
    assert torch.equal(weight.rows(ids), decoded[ids])
    x = torch.randn(5, IN_FEATURES, generator=torch.Generator().manual_seed(1))
    expected = functional.linear(x.double(), decoded.double())
    assert (weight.matmul(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert weight.form.name == name
    assert (weight.shape, weight.dtype) == ((37, IN_FEATURES), torch.float32)
    assert blocks.nbytes <= weight.nbytes <= 48 * blocks.shape[1] + 3 * 64


def test_the_input_is_rounded_unless_exact() -> None:
    blocks = random_blocks("Q8_0", rows=16)
    x = torch.randn(2, IN_FEATURES, generator=torch.Generator().manual_seed(1))
    exact, rounded = native("Q8_0", blocks, is_exact=True).matmul(x), native("Q8_0", blocks).matmul(x)
    assert not torch.equal(exact, rounded)
    assert (exact - rounded).abs().max() <= 0.02 * exact.abs().max()


def test_activations_of_sixteen_bits() -> None:
    blocks = random_blocks("Q4_K", rows=16)
    weight = native("Q4_K", blocks, is_exact=True, dtype=torch.bfloat16)
    x = (torch.randn(3, IN_FEATURES) / 16).bfloat16()
    expected = functional.linear(x.float(), dequantize("Q4_K", blocks))
    actual = weight.matmul(x)
    assert actual.dtype == weight.rows(torch.tensor([0])).dtype == weight.dequantize().dtype == torch.bfloat16
    assert (actual.float() - expected).abs().max() <= 0.01 * expected.abs().max()


def test_fused_matrices_stay_where_they_are() -> None:
    parts = [
        native(name, random_blocks(name, rows, seed=rows)) for name, rows in [("Q4_K", 5), ("Q6_K", 3), ("F16", 20)]
    ]
    fused = fuse(parts)
    assert isinstance(fused, FusedWeight)
    assert list(fused.parts) == parts
    x = torch.randn(2, IN_FEATURES)
    assert torch.equal(fused.matmul(x), torch.cat([part.matmul(x) for part in parts], dim=-1))
    whole = torch.cat([part.dequantize() for part in parts])
    assert torch.equal(fused.dequantize(), whole)
    ids = torch.tensor([27, 0, 5, 4])
    assert torch.equal(fused.rows(ids), whole[ids])
    same = [native("Q4_K", random_blocks("Q4_K", rows=4)) for _ in range(2)]
    assert isinstance(fuse(same), FusedWeight)


def test_without_native_kernels_there_is_no_native_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    assert native_matrix(BY_NAME["Q1_0"].type_id, 16, 32) is None
    monkeypatch.setattr("kernels.dispatch.native", lambda: type("Found", (), {"ops": None}))
    assert native_matrix(BY_NAME["Q8_0"].type_id, 16, 32) is None
