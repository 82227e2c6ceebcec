"""Steps by Triton's kernels against steps in plain torch, for what families may be made of."""

from types import SimpleNamespace

import pytest
import torch
from tiny_llama import Piece, TinyPool, make_batch
from torch import Tensor
from torch_operators import WAITING, Operators

from serve_app.attention.backend import AttentionShape
from serve_app.attention.device_batch import DeviceBatch
from serve_app.attention.torch_backend import TorchAttention
from serve_app.attention.triton_backend import TritonAttention
from serve_app.layers.gpu_step import GpuStep
from serve_app.layers.rotary import Rotary
from serve_app.layers.step import NormWeights
from serve_app.layers.step_choice import step_type
from serve_app.layers.torch_step import TorchStep

HEADS, KV_HEADS, HEAD_DIM = 6, 2, 16
ARGS = SimpleNamespace(n_layers=2, n_kv_heads=KV_HEADS, head_dim=HEAD_DIM)
WIDTH = (HEADS + 2 * KV_HEADS) * HEAD_DIM


def steps(dtype: torch.dtype, kv_dtype: torch.dtype, device: torch.device) -> tuple[GpuStep, TorchStep]:
    """Two steps over pools of their own with the same contents."""
    found = []
    for kind, backend in ((GpuStep, TritonAttention()), (TorchStep, TorchAttention())):
        pool = TinyPool(ARGS, 12, 16, kv_dtype, device)
        generator = torch.Generator().manual_seed(0)
        for cache in (*pool.k, *pool.v):
            cache.copy_(torch.randn(cache.shape, generator=generator))
        pieces = [
            Piece(range(90), 30, 47, [3, 9, 1]),
            Piece(range(90), 0, 1, [2]),
            Piece(range(90), 89, 90, range(4, 10)),
        ]
        found.append(kind(DeviceBatch.of(make_batch(pool, pieces), pool, device), backend))
    return found[0], found[1]


def rows(tokens: int, width: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def close(ours: Tensor, theirs: Tensor) -> None:
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[ours.dtype]
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kv_dtype", [None, torch.float8_e4m3fn], ids=["same", "e4m3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rotary_dim", [0, 6, 16])
def test_attention(rotary_dim: int, dtype: torch.dtype, kv_dtype: torch.dtype | None, device: torch.device) -> None:
    gpu, plain = steps(dtype, kv_dtype or dtype, device)
    rotary = Rotary(torch.rand(rotary_dim // 2).to(device), 512) if rotary_dim else None
    for layer, (softcap, window) in enumerate([(0.0, 0), (3.0, 20)]):
        shape = AttentionShape(layer, HEADS, KV_HEADS, HEAD_DIM, 0.25, softcap, window)
        qkv = rows(19, WIDTH, dtype, device, layer)
        close(gpu.attention(qkv.clone(), shape, rotary), plain.attention(qkv.clone(), shape, rotary))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms_and_activations(dtype: torch.dtype, device: torch.device) -> None:
    gpu, plain = steps(dtype, dtype, device)
    weight, bias = torch.rand(96, device=device), torch.randn(96, device=device)
    x, residual = rows(19, 96, dtype, device), rows(19, 96, dtype, device, 1)
    for weights in (
        NormWeights(weight, 1e-5),
        NormWeights(weight, 1e-6, offset=1.0),
        NormWeights(weight, 1e-5, bias, is_layer_norm=True),
        NormWeights(weight, 1e-5, bias, 0.5, is_layer_norm=True),
    ):
        close(gpu.norm(x, weights), plain.norm(x, weights))
        left, right = residual.clone(), residual.clone()
        close(gpu.add_norm(x, left, weights), plain.add_norm(x, right, weights))
        assert torch.equal(left, right)
    for kind in ("silu", "gelu_tanh", "gelu_erf"):
        close(gpu.gate(x, kind), plain.gate(x, kind))  # type: ignore[arg-type]
        close(gpu.activate(x, kind), plain.activate(x, kind))  # type: ignore[arg-type]
    head_weights = NormWeights(torch.rand(HEAD_DIM, device=device), 1e-6)
    ours = rows(19, WIDTH, dtype, device)
    theirs = ours.clone()
    for first, count in ((0, HEADS), (HEADS, KV_HEADS)):
        gpu.head_norm(ours, first, count, head_weights)
        plain.head_norm(theirs, first, count, head_weights)
    close(ours, theirs)


def test_plain_torch_is_asked_for_by_its_attention(device: torch.device) -> None:
    assert step_type(device, "triton") is GpuStep
    assert step_type(device, "torch") is TorchStep


def test_no_operator_of_a_step_waits_for_the_device(device: torch.device) -> None:
    """Decodes and prefills, from the plan on: nothing is read back, and no shape depends on what a tensor holds."""
    gpu, _ = steps(torch.float32, torch.float32, device)
    batch, backend = gpu._batch, TritonAttention()
    rotary = Rotary(torch.rand(HEAD_DIM // 2).to(device), 512)
    rotary.on_device(batch.host.max_context_len)
    qkv = rows(19, WIDTH, torch.float32, device)
    with Operators() as operators:
        step = GpuStep(batch, backend)
        step.attention(qkv, AttentionShape(0, HEADS, KV_HEADS, HEAD_DIM, 0.25), rotary)
        step.gate(step.norm(qkv, NormWeights(qkv.new_ones(WIDTH), 1e-5)), "silu")
    names = {name.split(".")[1] for name in operators.names}
    assert names
    assert not names & WAITING
    with Operators() as operators:
        int(batch.context_lens[0])
    assert any("_local_scalar_dense" in name for name in operators.names)
