"""Weights in planes, as layers use them and as loaders make them."""

from collections.abc import Iterator
from pathlib import Path

import gguf
import pytest
import torch
from block_data import usual_blocks
from planar_cases import matrix_and_weights

from kernels import dispatch
from kernels.dispatch import triton_computes
from kernels.formats import BY_NAME
from kernels.gpu.encode import encode
from kernels.gpu.planar import PlanarMatrix
from kernels.gpu.planar_forms import PLANAR
from kernels.reference.quant import dequantize
from serve_app.gguf_file import open_gguf
from serve_app.loaders.gguf import GgufCheckpoint
from serve_app.loaders.pages import as_tensor
from serve_app.loaders.quantized import Source
from serve_app.loaders.quantized_plan import plan_steps
from serve_app.loaders.recoded_checkpoint import RecodedCheckpoint
from serve_app.loaders.weight_source import CheckpointSource
from serve_app.quant.encode import requantize
from serve_app.quant.mix import ModelFacts, Recipe
from serve_app.quant.packed import PackedWeight
from serve_app.quant.planar_weight import FusedPlanarWeight, PlanarExperts, PlanarWeight, grouped_matrix
from serve_app.quant.quant_type import QuantType
from serve_app.quant.weight import DenseWeight, FusedWeight

COLUMNS = 256


def test_products_rows_and_numbers(device: torch.device) -> None:
    matrix, weights = matrix_and_weights("Q4_K", 37, COLUMNS, device)
    weight = PlanarWeight(matrix, torch.float32)
    assert (weight.shape, weight.dtype, weight.nbytes) == ((37, COLUMNS), torch.float32, matrix.nbytes)
    assert torch.equal(weight.dequantize().cpu(), weights)
    ids = torch.tensor([36, 0, 16, 16], device=device)
    assert torch.equal(weight.rows(ids).cpu(), weights[ids.cpu()])
    x = torch.randn(5, COLUMNS, generator=torch.Generator().manual_seed(1))
    expected = x.double() @ weights.double().t()
    assert (weight.matmul(x.to(device)).cpu() - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_activations_of_sixteen_bits(device: torch.device) -> None:
    matrix, weights = matrix_and_weights("Q8_0", 16, COLUMNS, device)
    weight = PlanarWeight(matrix, torch.bfloat16)
    x = torch.randn(2, COLUMNS, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(1)).to(device)
    y = weight.matmul(x)
    assert {y.dtype, weight.dequantize().dtype, weight.rows(torch.tensor([3], device=device)).dtype} == {torch.bfloat16}
    expected = x.cpu().double() @ weights.double().t()
    assert (y.cpu().double() - expected).abs().max() <= 0.01 * expected.abs().max()


def test_experts(device: torch.device) -> None:
    """Each of them is part of the one matrix, in the same memory."""
    matrix, weights = matrix_and_weights("Q6_K", 3 * 20, COLUMNS, device)
    experts = PlanarExperts(matrix, 3, torch.float32)
    assert (experts.num_experts, experts.shape, experts.nbytes) == (3, (20, COLUMNS), matrix.nbytes)
    assert grouped_matrix(experts) is matrix
    second = experts.expert(1)
    assert (second.shape, second.nbytes * 3) == ((20, COLUMNS), matrix.nbytes)
    assert torch.equal(second.dequantize().cpu(), weights[20:40])
    with pytest.raises(IndexError, match="matrix of 60"):
        matrix.part(50, 11)
    with pytest.raises(ValueError, match="60 rows are no whole number of 7 experts"):
        PlanarExperts(matrix, 7, torch.float32)


TYPES = {"q": "Q4_K", "k": "Q4_K", "v": "Q6_K", "output": "IQ4_XS", "norm": "F32"}


@pytest.fixture
def source(tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[CheckpointSource]:
    """Over a file of five matrices; CPU tensors are only multiplied by Triton where it is asked to."""
    monkeypatch.setenv("SIROCCO_TRITON", "1")
    dispatch.native.cache_clear()
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for key, value in {"attention.head_count": 4, "attention.head_count_kv": 4}.items():
        writer.add_uint32(f"llama.{key}", value)
    for name, kind in TYPES.items():
        tensor = f"blk.0.attn_{name}.weight"
        blocks = usual_blocks(kind, 32, COLUMNS, seed=len(name)).numpy()
        writer.add_tensor(tensor, blocks, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = GgufCheckpoint(open_gguf((str(tmp_path / "m.gguf"),), with_texts=False))
    yield CheckpointSource(checkpoint, torch.float32, device)
    dispatch.native.cache_clear()


def attention(*names: str) -> list[str]:
    return [f"model.layers.0.self_attn.{name}_proj.weight" for name in names]


def test_matrices_of_one_type_become_one(source: CheckpointSource) -> None:
    weight = source.weight(attention("q", "k"), [32, 32], COLUMNS)
    assert isinstance(weight, PlanarWeight)
    assert weight.shape == (64, COLUMNS)
    parts = [source.weight(attention(name), [32], COLUMNS) for name in "qk"]
    assert torch.equal(weight.dequantize(), torch.cat([part.dequantize() for part in parts]))
    q = dequantize("Q4_K", usual_blocks("Q4_K", 32, COLUMNS, seed=1))
    half_split = q.view(4, 4, 2, COLUMNS).transpose(1, 2).reshape(32, COLUMNS)
    assert torch.equal(parts[0].dequantize().cpu(), half_split)


def test_matrices_of_several_types_stay_apart(source: CheckpointSource) -> None:
    weight = source.weight(attention("q", "k", "v"), [32, 32, 32], COLUMNS)
    assert isinstance(weight, FusedPlanarWeight)
    assert [part.shape[0] for part in weight.parts] == [64, 32]
    ids = torch.tensor([95, 0, 64, 63], device=weight.dequantize().device)
    assert torch.equal(weight.rows(ids), weight.dequantize()[ids])
    for tokens in (1, 9, 65):
        x = torch.randn(tokens, COLUMNS).to(ids.device)
        assert torch.equal(weight.matmul(x), torch.cat([part.matmul(x) for part in weight.parts], dim=-1))


def test_planar_and_other_matrices_together(source: CheckpointSource) -> None:
    weight = source.weight(attention("q", "o"), [32, 32], COLUMNS)
    assert isinstance(weight, FusedWeight)
    assert [type(part) for part in weight.parts] == [PlanarWeight, PackedWeight]
    assert weight.matmul(torch.ones(2, COLUMNS).to(weight.dequantize().device)).shape == (2, 64)


@pytest.fixture
def encoded_types(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The type of everything that the device's encoder was given."""
    names: list[str] = []

    def spy(name: str, *operands: torch.Tensor) -> torch.Tensor:
        names.append(name)
        return encode(name, *operands)

    monkeypatch.setattr("kernels.gpu.encode.encode", spy)
    return names


def recoding(source: CheckpointSource, wanted: str, device: torch.device) -> CheckpointSource:
    """The same file, all of it to be quantised."""
    checkpoint = source._checkpoint
    tensors = [Source.of(tensor, tensor.name) for tensor in checkpoint.stored()]
    facts = ModelFacts("llama", 1, 4, 4)
    steps = plan_steps(tensors, Recipe.parse(wanted, promotes=False), facts, needs_gguf=False)
    return CheckpointSource(RecodedCheckpoint(checkpoint, steps), torch.float32, device)


def by_the_host(source: CheckpointSource, out: str, wanted: str) -> torch.Tensor:
    """The numbers of the file's matrix that the host's encoder makes."""
    stored = next(tensor for tensor in source._checkpoint.stored() if out in tensor.name)
    return dequantize(wanted, requantize(stored.form.name, as_tensor(stored.data).view(32, -1), QuantType(wanted)))


@pytest.mark.parametrize(("wanted", "is_on_device"), [("Q5_0", True), ("HQQ8", False)])
def test_matrices_quantised_while_they_are_loaded(
    source: CheckpointSource, device: torch.device, encoded_types: list[str], wanted: str, *, is_on_device: bool
) -> None:
    """Planes of what the encoder makes, the device's or the host's, in the file's order of rows and the rotary one."""
    weights = recoding(source, wanted, device)
    for name in ("k", "v"):
        weight = weights.weight(attention(name), [32], COLUMNS)
        assert isinstance(weight, PlanarWeight)
        assert weight.matrix.form.name == wanted
        expected = by_the_host(source, f"attn_{name}", wanted)
        if name == "k":
            expected = expected.view(4, 4, 2, COLUMNS).transpose(1, 2).reshape(32, COLUMNS)
        assert torch.equal(weight.dequantize().cpu(), expected)
    fused = weights.weight(attention("q", "k", "v"), [32, 32, 32], COLUMNS)
    assert isinstance(fused, PlanarWeight)
    assert torch.equal(fused.dequantize()[64:], weights.weight(attention("v"), [32], COLUMNS).dequantize())
    assert encoded_types == ([wanted] * 6 if is_on_device else [])


@pytest.mark.parametrize("wanted", ["FP8", "MXFP4"])
def test_blocks_without_planes_are_encoded_on_the_device_too(
    source: CheckpointSource, device: torch.device, encoded_types: list[str], wanted: str
) -> None:
    weight = recoding(source, wanted, device).weight(attention("v"), [32], COLUMNS)
    assert isinstance(weight, PackedWeight)
    assert torch.equal(weight.dequantize().cpu(), by_the_host(source, "attn_v", wanted))
    assert encoded_types == [wanted]


def test_types_without_planes_are_decoded_by_the_tile(source: CheckpointSource) -> None:
    assert isinstance(source.weight(attention("o"), [32], COLUMNS), PackedWeight)


def test_nothing_is_planar_without_triton(
    source: CheckpointSource, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIROCCO_TRITON", "0")
    monkeypatch.setenv("SIROCCO_NATIVE", "0")
    dispatch.native.cache_clear()
    assert triton_computes(device) == (False, "turned off by SIROCCO_TRITON=0")
    other = CheckpointSource(source._checkpoint, torch.float32, device)
    assert isinstance(other.weight(attention("q"), [32], COLUMNS), PackedWeight | DenseWeight)


def test_the_device_holds_one_piece_besides(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are packed piece by piece, whatever the size of the tensor."""
    sizes: list[int] = []
    split = PlanarMatrix._store

    def spy(self: PlanarMatrix, first: int, *planes: torch.Tensor | None) -> None:
        assert planes[0] is not None
        sizes.append(len(planes[0]))
        split(self, first, *planes)  # type: ignore[arg-type]

    monkeypatch.setattr(PlanarMatrix, "_store", spy)
    monkeypatch.setattr("kernels.gpu.planar.PACK_BYTES", 10 * BY_NAME["Q4_K"].row_bytes(COLUMNS))
    matrix = PlanarMatrix(PLANAR["Q4_K"], 25, COLUMNS, device)
    matrix.pack(0, usual_blocks("Q4_K", 25, COLUMNS))
    assert sizes == [10, 10, 5]


def test_a_device_without_kernels_is_said(source: CheckpointSource, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIROCCO_TRITON", "0")
        CheckpointSource(source._checkpoint, torch.float32, torch.device("cuda"))
    assert "turned off by SIROCCO_TRITON=0" in caplog.text
