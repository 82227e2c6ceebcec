"""What the configurations of mixtures have in common, and the parts that they are built from."""

from serve_app.layers.moe import MixtureMLP
from serve_app.layers.step import MixtureWeights, Routing
from serve_app.models.base import WeightSource
from serve_app.models.config_reader import ConfigReader
from serve_app.quant.weight import DenseWeight

HF_NAMES = ("gate_proj", "up_proj", "down_proj")
MIXTRAL_NAMES = ("w1", "w3", "w2")


def mixture(
    weights: WeightSource, prefix: str, names: tuple[str, str, str], sizes: tuple[int, int, int], routing: Routing
) -> MixtureMLP:
    """The router `<prefix>gate` and the experts `<prefix>experts.{}.<name>`, names: of gate, up and down.

    sizes: number of experts, hidden size, size of an expert. The router is float32 whatever the file's type is.
    """
    num_experts, hidden, inner = sizes
    router = DenseWeight(weights.tensor(f"{prefix}gate.weight", (num_experts, hidden)))
    gate, up, down = (f"{prefix}experts.{{}}.{name}.weight" for name in names)
    experts = MixtureWeights(
        router,
        weights.experts(gate, num_experts, inner, hidden),
        weights.experts(up, num_experts, inner, hidden),
        weights.experts(down, num_experts, hidden, inner),
    )
    return MixtureMLP(experts, routing)


def expert_counts(reader: ConfigReader, count_key: str, used_key: str) -> tuple[int, int]:
    """Experts of a layer, and those that a token takes."""
    num_experts, top_k = reader.count(count_key), reader.count(used_key)
    if top_k > num_experts:
        raise reader.fail(used_key, f"is {top_k}, more than the {num_experts} experts")
    return num_experts, top_k


def sparse_layers(reader: ConfigReader, n_layers: int) -> tuple[bool, ...]:
    """Which layers are mixtures: each `decoder_sparse_step`th one that `mlp_only_layers` does not name."""
    step, dense = reader.count("decoder_sparse_step", 1), reader.get("mlp_only_layers") or []
    if not isinstance(dense, list) or any(type(layer) is not int for layer in dense):
        raise reader.fail("mlp_only_layers", "is not a list of layers")
    return tuple((layer + 1) % step == 0 and layer not in dense for layer in range(n_layers))
