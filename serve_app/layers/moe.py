"""Mixtures of experts: a router that picks a few gated MLPs for each token, and perhaps one that all tokens share."""

from serve_app.layers.linear import Linear
from serve_app.layers.mlp import GatedMLP
from serve_app.layers.step import Activation, MixtureWeights, Routing, Rows, Step


class MixtureMLP:
    """The weighted sum of the MLPs that a router picks."""

    def __init__(self, weights: MixtureWeights, routing: Routing, activation: Activation = "silu") -> None:
        self._weights = weights
        self._routing = routing
        self._activation = activation

    def __call__(self, x: Rows, step: Step) -> Rows:
        """x [T, hidden] → [T, hidden]."""
        return step.experts(x, self._weights, self._routing, self._activation)


class SharedExpertMLP:
    """A mixture, and beside it an MLP for all tokens that is weighted by a gate of its own (Qwen2-MoE)."""

    def __init__(self, mixture: MixtureMLP, shared: GatedMLP, shared_gate: Linear) -> None:
        """shared_gate: hidden → 1, the logit of the shared MLP's factor."""
        self._mixture = mixture
        self._shared = shared
        self._shared_gate = shared_gate

    def __call__(self, x: Rows, step: Step) -> Rows:
        """x [T, hidden] → [T, hidden]."""
        out = self._mixture(x, step)
        step.add_gated(out, self._shared(x, step), self._shared_gate(x, step))
        return out
