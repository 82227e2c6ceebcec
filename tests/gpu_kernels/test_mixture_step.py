"""Mixtures by Triton's kernels: every family's logits, from plain and from packed experts, and nobody waits."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from block_data import usual_blocks
from mixtures import FAMILIES, hf_mixture, our_model, saved, write_gguf
from tiny_llama import DictSource, Piece, TinyPool, full_logits, make_batch, step_logits
from torch import Tensor
from torch_operators import WAITING, Operators

from kernels import dispatch
from kernels.formats import BY_NAME
from serve_app.attention.device_batch import DeviceBatch
from serve_app.attention.triton_backend import TritonAttention
from serve_app.engine.forward import TorchForward, attention_needs
from serve_app.engine.graph_forward import CudaRecorder, GraphForward, GraphLimits
from serve_app.gguf_file import open_gguf
from serve_app.layers.gpu_step import GpuStep
from serve_app.layers.torch_step import TorchStep
from serve_app.loaders.gguf import GgufCheckpoint
from serve_app.loaders.weight_source import CheckpointSource
from serve_app.models.registry import find_family
from serve_app.quant.experts import DenseExperts, Experts, PackedExperts
from serve_app.quant.planar_weight import PlanarExperts
from tests.requantise import requantise

IDS = torch.randint(0, 97, (24,), generator=torch.Generator().manual_seed(3)).tolist()
WHOLE_BLOCKS = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
"""So that all matrices of a model can be of a type with blocks of 32 weights."""


@pytest.fixture(autouse=True)
def triton_multiplies(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SIROCCO_TRITON", "1")
    dispatch.native.cache_clear()
    yield
    dispatch.native.cache_clear()


def close(ours: Tensor, theirs: Tensor) -> None:
    assert (ours.cpu() - theirs.cpu()).abs().max() <= 1e-4 * theirs.abs().max()


def refuse(*arguments: Any) -> None:
    raise AssertionError("the step of plain torch")


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_every_family_are_those_of_transformers(
    family: str, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many tokens, which other kernels multiply than those of few; and plain torch's step agrees."""
    hf = hf_mixture(family, num_hidden_layers=1)
    model = our_model(hf, DictSource(saved(hf, tmp_path), device=device))
    theirs = hf(torch.tensor([IDS])).logits[0]
    close(full_logits(model, IDS, "torch", device=device), theirs)
    monkeypatch.setattr(TorchStep, "experts", refuse)
    close(full_logits(model, IDS, "triton", device=device), theirs)
    close(full_logits(model, IDS[:1], "triton", device=device), theirs[:1])


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_every_family_in_bfloat16_are_near_those_in_float32(
    family: str, backend: str, device: torch.device, tmp_path: Path
) -> None:
    """Of the same weights; routers and gates are float32 in both. Two of the 24 tokens may be nearly undecided between
    two experts, and take the other one."""
    hf = hf_mixture(family, num_hidden_layers=1)
    tensors = {name: tensor.bfloat16() for name, tensor in saved(hf, tmp_path).items()}
    found = []
    for dtype, by in ((torch.float32, "torch"), (torch.bfloat16, backend)):
        model = our_model(hf, DictSource(tensors, dtype, device))
        pool = TinyPool(model.args, 2, 16, dtype, device)
        found.append(step_logits(model, pool, [Piece(IDS, 0, len(IDS), range(2))], by)[0].float())
    difference = (found[1] - found[0]).abs().amax(dim=1) / found[0].abs().max()
    assert (difference > 0.02).sum() <= 2
    assert difference.max() > 0, "it is another dtype that is looked at"


@pytest.mark.parametrize("type_name", ["Q8_0", "F16"])
def test_experts_of_a_file_stay_packed(
    type_name: str, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In planes, or as the plain numbers that they are; plain torch decodes the same ones."""
    hf = hf_mixture("mixtral", **WHOLE_BLOCKS)
    path = write_gguf(tmp_path / "whole.gguf", "mixtral", hf.config, saved(hf, tmp_path))
    requantise(path, tmp_path / "packed.gguf", type_name)
    file = open_gguf([tmp_path / "packed.gguf"])
    family = find_family("MixtralForCausalLM", "packed.gguf")
    args = family.args.from_gguf(file.metadata)

    def opened(on: torch.device) -> tuple[Any, CheckpointSource]:
        source = CheckpointSource(GgufCheckpoint(file), torch.float32, on)
        return family.build(args, source), source

    model, source = opened(device)
    kind = PackedExperts if type_name == "F16" else PlanarExperts
    experts = source.experts("model.layers.0.block_sparse_moe.experts.{}.w1.weight", 5, 64, 64)
    assert isinstance(experts, kind)
    assert (experts.num_experts, experts.shape) == (5, (64, 64))
    with monkeypatch.context() as patch:
        patch.setattr(TorchStep, "experts", refuse)
        ours = full_logits(model, IDS, "triton", device=device)
    monkeypatch.setenv("SIROCCO_TRITON", "0")
    monkeypatch.setenv("SIROCCO_NATIVE", "0")
    dispatch.native.cache_clear()
    plain, source = opened(torch.device("cpu"))
    theirs = source.experts("model.layers.0.block_sparse_moe.experts.{}.w1.weight", 5, 64, 64)
    assert isinstance(theirs, PackedExperts | DenseExperts)
    for number in (0, 4):
        assert torch.equal(experts.expert(number).dequantize().cpu(), theirs.expert(number).dequantize())
    close(ours, full_logits(plain, IDS, "torch"))


@pytest.mark.parametrize("family", ["qwen2moe", "phimoe"])
def test_no_operator_of_a_mixtures_step_waits_for_the_device(family: str, device: torch.device, tmp_path: Path) -> None:
    """Both ways to route, an expert for all, decodes and a prefill: nothing is read back, no shape follows contents."""
    hf = hf_mixture(family, num_hidden_layers=1)
    model = our_model(hf, DictSource(saved(hf, tmp_path), device=device))
    pool = TinyPool(model.args, 4, 16, device=device)
    host = make_batch(pool, [Piece(IDS, 0, 1, [2]), Piece(IDS, 0, 5, [1]), Piece(IDS, 0, 1, [3])])
    batch = DeviceBatch.of(host, pool, device)
    found = {}
    for kind in (GpuStep, TorchStep):
        with Operators() as operators:
            step = kind(batch, TritonAttention())
            model.logits(step.wanted(model.forward(step)), step)
        found[kind] = {name.split(".")[1] for name in operators.names} & WAITING
    assert not found[GpuStep]
    assert found[TorchStep], "an operator that waits is noticed"


class DownOf(DictSource):
    """See DictSource: the experts' last matrices are random blocks of a type, in file order."""

    type_name = ""

    def experts(self, name: str, num_experts: int, out_features: int, in_features: int) -> Experts:
        if ".w2." not in name:
            return super().experts(name, num_experts, out_features, in_features)
        blocks = usual_blocks(self.type_name, num_experts * out_features, in_features)
        shaped = blocks.view(num_experts, out_features, -1).to(self.device)
        return PackedExperts(BY_NAME[self.type_name], shaped, self.dtype)


@pytest.mark.parametrize(("type_name", "is_safe"), [("F16", True), ("IQ4_NL", False)])
def test_graphs_are_recorded_where_no_experts_are_waited_for(
    type_name: str, is_safe: bool, device: torch.device, tmp_path: Path
) -> None:
    """Types without planes are multiplied expert by expert, which the host has to know: no graph can hold that."""
    hf = hf_mixture("mixtral", **WHOLE_BLOCKS)
    source = DownOf(saved(hf, tmp_path), device=device)
    source.type_name = type_name
    model = our_model(hf, source)
    pool = TinyPool(model.args, 4, 16, device=device)
    forward = TorchForward(model, pool, device, TritonAttention())
    assert forward.is_graph_safe == is_safe
    assert attention_needs(model, pool, device, wants_graphs=True).wants_graphs == is_safe
    with Operators() as operators:
        forward(make_batch(pool, [Piece(IDS, 0, 1, [2])]))
    assert ({name.split(".")[1] for name in operators.names}.isdisjoint(WAITING)) == is_safe


class Rerun:
    """See graph_forward.Recorder."""

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        run()
        return run


def test_a_graph_holds_for_every_routing(device: torch.device, tmp_path: Path) -> None:
    """Recorded while idle requests route somehow, replayed with others; on a GPU as a CUDA graph."""
    hf = hf_mixture("qwen2moe", num_hidden_layers=1)
    model = our_model(hf, DictSource(saved(hf, tmp_path), device=device))
    pool = TinyPool(model.args, 4, 16, device=device)
    for cache in (*pool.k, *pool.v):
        cache.copy_(torch.randn(cache.shape, generator=torch.Generator().manual_seed(1)))
    eager = TorchForward(model, pool, device, TritonAttention())
    recorder = CudaRecorder(device) if device.type == "cuda" else Rerun()
    graphs = GraphForward(eager.run, eager, pool, model.args.vocab_size, GraphLimits(2, 16), recorder)
    assert graphs.num_graphs == 2
    for some in ([IDS, IDS[9:]], [IDS[3:]]):
        pieces = [Piece(ids, 4, 5, [3 - block]) for block, ids in enumerate(some)]
        batch = make_batch(pool, pieces, rows=range(len(some)))
        logits = graphs(batch).clone()
        torch.testing.assert_close(logits, eager(batch), rtol=1e-5, atol=1e-5)
