"""The native operation of a mixture: routing against plain torch, and bits that do not depend on neighbours."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from block_data import randn, usual_blocks
from tiny_llama import Piece, TinyPool, make_batch
from torch import Tensor
from torch_operators import Operators

from kernels.cpu import _native
from kernels.formats import BY_NAME
from kernels.reference.routing import route
from serve_app.attention.backend import AttentionShape
from serve_app.engine.forward import choose_forward
from serve_app.layers.step import MixtureWeights, Routing, Rows, Step
from serve_app.quant.experts import DenseExperts, Experts, PackedExperts
from serve_app.quant.native import native_experts
from serve_app.quant.weight import DenseWeight

HIDDEN, INNER, EXPERTS, IDS = 256, 256, 7, 40
ROUTINGS = [
    Routing(2),
    Routing(3, is_renormalised=True),
    Routing(1, is_renormalised=True),
    Routing(EXPERTS),
    Routing(2, "sparsemixer", jitter=0.01),
    Routing(2, "sparsemixer", jitter=0.4),
]


class OneMixture:
    """Embedding rows are what the mixture gets, its results are the logits."""

    args = SimpleNamespace(n_layers=1, n_kv_heads=1, head_dim=8)

    def __init__(self, types: tuple[str, str, str], routing: Routing, hidden: int = HIDDEN, inner: int = INNER) -> None:
        gate, up, down = types
        self.embedding = DenseWeight(randn(IDS, hidden, seed=3))
        # A program ends its part for all tokens with an attention: this one adds nothing.
        self.qkv = DenseWeight(randn(24, hidden, seed=8))
        self.nothing = DenseWeight(torch.zeros(hidden, 8))
        self.routing = routing
        self.weights = MixtureWeights(
            DenseWeight(randn(EXPERTS, hidden, seed=4) * hidden**-0.5),
            experts(gate, inner, hidden, 5),
            experts(up, inner, hidden, 6),
            experts(down, hidden, inner, 7),
        )

    def forward(self, step: Step) -> Rows:
        x = step.embed(self.embedding)
        mixed = step.attention(step.linear(x, self.qkv, None), AttentionShape(0, 1, 1, 8, 0.1), None)
        step.add(x, step.linear(mixed, self.nothing, None))
        return x

    def logits(self, hidden: Rows, step: Step) -> Rows:
        return step.experts(hidden, self.weights, self.routing, "silu")


def experts(name: str, rows: int, columns: int, seed: int) -> Experts:
    if name == "dense":
        return DenseExperts(randn(EXPERTS, rows, columns, seed=seed) * columns**-0.5)
    blocks = usual_blocks(name, EXPERTS * rows, columns, seed).view(EXPERTS, rows, -1)
    return PackedExperts(BY_NAME[name], blocks, torch.float32)


def run(model: Any, ids: list[int], backend: str = "cpu", *, is_exact: bool = True) -> Tensor:
    pool = TinyPool(model.args, 4, 16)
    forward = choose_forward(model, pool, "cpu", backend, is_exact=is_exact)
    return torch.as_tensor(forward(make_batch(pool, [Piece(ids, 0, len(ids), range(4))]))).clone()


@pytest.fixture(params=[1, 3])
def team_size(request: pytest.FixtureRequest) -> Iterator[None]:
    before = _native.num_threads()
    _native.set_num_threads(request.param)
    yield
    _native.set_num_threads(before)


@pytest.mark.parametrize("routing", ROUTINGS, ids=str)
@pytest.mark.parametrize(("hidden", "inner"), [(HIDDEN, INNER), (37, 21), (16, 600)])
def test_the_native_mixture_is_that_of_plain_torch(routing: Routing, hidden: int, inner: int) -> None:
    model = OneMixture(("dense",) * 3, routing, hidden, inner)
    ids = list(range(IDS))
    theirs = run(model, ids, "torch")
    assert (run(model, ids) - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("is_exact", [False, True])
@pytest.mark.parametrize(
    "types",
    [("dense",) * 3, ("Q4_K", "Q4_K", "Q6_K"), ("Q8_0", "Q4_K", "Q5_0"), ("BF16", "BF16", "F16"), ("IQ4_NL",) * 3],
)
@pytest.mark.parametrize("routing", ROUTINGS[1:2], ids=str)
def test_a_row_has_the_same_bits_whoever_its_neighbours_are(
    types: tuple[str, str, str], routing: Routing, is_exact: bool, team_size: None
) -> None:
    model = OneMixture(types, routing)
    together = run(model, list(range(IDS)), is_exact=is_exact)
    assert together.isfinite().all()
    for token in (0, 7, 39):
        assert torch.equal(run(model, [token], is_exact=is_exact)[0], together[token])
    assert torch.equal(run(model, [9, 3, 9, 20], is_exact=is_exact), together[[9, 3, 9, 20]])


@pytest.mark.parametrize("types", [("Q4_K", "Q4_K", "Q6_K"), ("Q8_0", "Q8_0", "Q4_0"), ("IQ4_NL", "Q4_K", "IQ4_NL")])
def test_packed_experts_multiply_as_their_numbers_do(types: tuple[str, str, str]) -> None:
    model = OneMixture(types, Routing(2, is_renormalised=True))
    ids = list(range(IDS))
    theirs = run(model, ids, "torch")
    assert (run(model, ids) - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_no_torch_operator_runs_in_a_step() -> None:
    model = OneMixture(("Q4_K",) * 3, Routing(2))
    pool = TinyPool(model.args, 4, 16)
    forward = choose_forward(model, pool, "cpu", "cpu")  # type: ignore[arg-type]
    batch = make_batch(pool, [Piece([1, 2, 3], 0, 3, range(4))])
    with Operators() as operators:
        forward(batch)
    assert operators.names == []


def test_packed_experts_stay_packed() -> None:
    packed = experts("Q4_K", 32, HIDDEN, 1)
    assert native_experts(packed).nbytes == packed.nbytes


def test_nan_ends_in_its_own_row_alone() -> None:
    model = OneMixture(("dense",) * 3, Routing(2, is_renormalised=True))
    clean = run(model, [1, 3, 2])
    table = model.embedding.dequantize()
    table[2, 5] = torch.nan
    got = run(model, [1, 3, 2])
    assert got[2].isnan().all()
    assert torch.equal(got[:2], clean[:2])


def test_of_equal_logits_the_first_experts_are_taken() -> None:
    chosen, factors = route(torch.zeros(1, 5), "softmax", 2, is_renormalised=True)
    assert chosen.tolist() == [[0, 1]]
    assert factors.tolist() == [[0.5, 0.5]]
    model = OneMixture(("dense",) * 3, Routing(2))
    model.weights.router.dequantize().zero_()
    assert torch.allclose(run(model, [4]), run(model, [4], "torch"), atol=1e-5)
