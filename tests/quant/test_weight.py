import pytest
import torch
from torch import Tensor
from torch.nn import functional

from kernels.formats import BY_NAME
from kernels.reference.quant import dequantize
from serve_app.quant import packed, weight
from serve_app.quant.packed import PackedWeight, fuse
from serve_app.quant.weight import DenseWeight, FusedWeight
from tests.quant.blocks import DECODABLE, IN_FEATURES, random_blocks


@pytest.fixture(params=["native", "torch"])
def compute(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test of dense matrices with the native kernels, where they are built, and without them."""
    if request.param == "torch":
        monkeypatch.setattr(weight, "native_matmul", lambda type_id: None)
    return str(request.param)


@pytest.mark.parametrize("name", DECODABLE)
@pytest.mark.parametrize("tokens", [1, 5])
def test_packed_product_is_that_of_the_decoded_matrix(name: str, tokens: int) -> None:
    blocks = random_blocks(name, rows=37)
    packed_weight = PackedWeight(BY_NAME[name], blocks, torch.float32)
    x = torch.randn(tokens, IN_FEATURES, generator=torch.Generator().manual_seed(1))
    expected = functional.linear(x.double(), dequantize(name, blocks).double())
    actual = packed_weight.matmul(x)
    assert actual.dtype == torch.float32
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", ["Q4_K", "IQ2_S"])
def test_tiles_of_any_height_give_the_same_product(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = random_blocks(name, rows=37)
    x = torch.randn(3, IN_FEATURES)
    results = []
    for elements in (1, 8 * IN_FEATURES, 1 << 20):
        monkeypatch.setattr(packed, "TILE_ELEMENTS", elements)
        results.append(PackedWeight(BY_NAME[name], blocks, torch.float32).matmul(x))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-4, atol=1e-3)


def test_never_more_than_a_tile_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []

    def spy(form: object, blocks: Tensor) -> Tensor:
        result = dequantize("Q8_0", blocks)
        decoded.append(result.numel())
        return result

    monkeypatch.setattr(packed, "dequantize", spy)
    monkeypatch.setattr(packed, "TILE_ELEMENTS", 4 * IN_FEATURES)
    PackedWeight(BY_NAME["Q8_0"], random_blocks("Q8_0", rows=37), torch.float32).matmul(torch.randn(2, IN_FEATURES))
    assert max(decoded) == 4 * IN_FEATURES
    assert sum(decoded) == 37 * IN_FEATURES


@pytest.mark.parametrize("name", ["Q8_0", "Q6_K", "IQ3_S", "F16"])
def test_rows_and_whole_matrix_are_exact(name: str) -> None:
    blocks = random_blocks(name, rows=20)
    packed_weight = PackedWeight(BY_NAME[name], blocks, torch.float32)
    expected = dequantize(name, blocks)
    ids = torch.tensor([19, 0, 3, 3])
    assert torch.equal(packed_weight.rows(ids), expected[ids])
    assert torch.equal(packed_weight.dequantize(), expected)
    assert packed_weight.shape == (20, IN_FEATURES)
    assert packed_weight.nbytes == blocks.nbytes


def test_a_kept_copy_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = random_blocks("Q5_0", rows=8)
    kept = PackedWeight(BY_NAME["Q5_0"], blocks, torch.float32, keep_decoded=True)
    monkeypatch.setattr(packed, "dequantize", None)
    x = torch.randn(2, IN_FEATURES)
    torch.testing.assert_close(kept.matmul(x), functional.linear(x, dequantize("Q5_0", blocks)))
    assert torch.equal(kept.rows(torch.tensor([7])), kept.dequantize()[7:])
    assert kept.nbytes == blocks.nbytes + 8 * IN_FEATURES * 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_activations_of_sixteen_bits(dtype: torch.dtype) -> None:
    blocks = random_blocks("Q4_K", rows=16)
    packed_weight = PackedWeight(BY_NAME["Q4_K"], blocks, dtype)
    x = (torch.randn(3, IN_FEATURES) / 16).to(dtype)
    expected = functional.linear(x.float(), dequantize("Q4_K", blocks))
    actual = packed_weight.matmul(x)
    assert actual.dtype == packed_weight.rows(torch.tensor([0])).dtype == dtype
    assert (actual.float() - expected).abs().max() <= 0.02 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dense(dtype: torch.dtype, compute: str) -> None:
    matrix = torch.randn(9, IN_FEATURES).to(dtype)
    dense = DenseWeight(matrix)
    x = torch.randn(4, IN_FEATURES).to(dtype)
    expected = functional.linear(x.float(), matrix.float())
    assert (dense.matmul(x).float() - expected).abs().max() <= 0.02 * expected.abs().max()
    assert torch.equal(dense.rows(torch.tensor([8, 8])), matrix[[8, 8]])
    assert dense.dequantize().data_ptr() == matrix.data_ptr()
    assert (dense.shape, dense.dtype, dense.nbytes) == ((9, IN_FEATURES), dtype, matrix.nbytes)


@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16])
def test_a_dense_matrix_widens_narrower_rows(narrow: torch.dtype, compute: str) -> None:
    """As they are for routers, which stay float32 whatever a model computes in."""
    matrix, x = torch.randn(9, IN_FEATURES), torch.randn(4, IN_FEATURES).to(narrow)
    actual = DenseWeight(matrix).matmul(x)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, functional.linear(x.float(), matrix), rtol=1e-4, atol=1e-4)


def test_dense_product_of_a_strided_input(compute: str) -> None:
    matrix, wide = torch.randn(9, IN_FEATURES), torch.randn(4, 2 * IN_FEATURES)
    x = wide[:, IN_FEATURES:]
    torch.testing.assert_close(DenseWeight(matrix).matmul(x), functional.linear(x, matrix), rtol=1e-4, atol=1e-4)


def parts(*names: str) -> list[PackedWeight]:
    rows = (5, 3, 7)[: len(names)]
    blocks = [random_blocks(name, n, seed=n) for name, n in zip(names, rows, strict=True)]
    return [PackedWeight(BY_NAME[name], b, torch.float32) for name, b in zip(names, blocks, strict=True)]


@pytest.mark.parametrize("names", [("Q4_K", "Q4_K", "Q4_K"), ("Q4_K", "Q6_K", "Q4_K"), ("Q8_0", "Q8_0")])
def test_fused_outputs_are_those_of_the_parts(names: tuple[str, ...]) -> None:
    weights = parts(*names)
    fused = fuse(weights)
    x = torch.randn(2, IN_FEATURES, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(fused.matmul(x), torch.cat([w.matmul(x) for w in weights], dim=-1))
    whole = torch.cat([w.dequantize() for w in weights])
    ids = torch.tensor([len(whole) - 1, 0, 5, 4])
    assert torch.equal(fused.dequantize(), whole)
    assert torch.equal(fused.rows(ids), whole[ids])
    assert (fused.shape, fused.dtype) == (tuple(whole.shape), torch.float32)
    assert fused.nbytes == sum(w.nbytes for w in weights)


def test_small_parts_of_one_kind_become_one_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    same = parts("Q4_K", "Q4_K", "Q4_K")
    assert isinstance(fuse(same), PackedWeight)
    assert isinstance(fuse(parts("Q4_K", "Q6_K", "Q4_K")), FusedWeight)
    assert isinstance(fuse([DenseWeight(torch.ones(2, 4)), DenseWeight(torch.ones(3, 4))]), DenseWeight)
    assert fuse(same[:1]) is same[0]
    monkeypatch.setattr(packed, "FUSED_COPY_BYTES", 0)
    assert isinstance(fuse(same), FusedWeight)
