"""Which type each tensor of a model gets: one type with the embedding and the head promoted, or a mix that people know.

The mixes (Q4_K_M and the like) choose as llama-quantize does. Tensors go by their GGUF names.
"""

import re
from dataclasses import dataclass

from serve_app.quant.fallback import fitting_type
from serve_app.quant.quant_type import QuantType, recipe_name
from serve_app.quant.topology import Topology

_T = QuantType

# general.file_type of a GGUF, by the name of a type or mix.
_FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K_S": 11, "Q3_K": 12,
    "Q3_K_M": 12, "Q3_K_L": 13, "Q4_K_S": 14, "Q4_K": 15, "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K": 17, "Q5_K_M": 17,
    "Q6_K": 18, "BF16": 32, "MXFP4": 38,
}  # fmt: skip

_EIGHT_BITS = frozenset({_T.Q8_0, _T.Q8_1, _T.Q8_K, _T.FP8, _T.HQQ8, _T.F32, _T.F16, _T.BF16})
_LAYER = re.compile(r"blk\.(\d+)\.")
_EXPERT = re.compile(r"\.ffn_(?:gate|up|down|gate_up)(?:_exps|\.\d+)\.")

# Names of tensors that stay as they are, beside everything of one dimension: norms, routers, positions, small tables.
_KEPT = (
    "_norm.weight",
    "ffn_gate_inp.weight",
    "ffn_gate_inp_shexp.weight",
    "position_embd",
    "token_types",
    "ssm_conv1d",
    "attn_rel_b.weight",
    ".patch_embd",
    "rope_freqs",
)


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the choice of types looks at. is_tied: the embedding is the head too."""

    architecture: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    n_experts: int = 0
    is_tied: bool = False


@dataclass(frozen=True, slots=True)
class Recipe:
    """A type, or a mix of several. name: files are named after it; promotes: embedding and head get a better type.

    base None: only what the topology names is quantised. experts_only: nothing but the experts of mixtures, and what
    the topology names.
    """

    name: str
    base: QuantType | None
    is_mix: bool = False
    promotes: bool = True
    experts_only: bool = False
    topology: Topology | None = None

    @property
    def file_type(self) -> int | None:
        """general.file_type of a GGUF; None where ggml has no number for it."""
        return _FILE_TYPES.get(self.name)

    @property
    def types(self) -> tuple[QuantType, ...]:
        """The types that were asked for by name."""
        own = () if self.base is None else (self.base,)
        return own if self.topology is None else tuple(dict.fromkeys((*own, *self.topology.types)))

    @staticmethod
    def parse(
        name: str | None, *, promotes: bool = True, experts_only: bool = False, topology: Topology | None = None
    ) -> "Recipe":
        """From the name of a mix (Q4_K_M, q4km) or of a type; None where a topology alone says it.

        ValueError as in recipe_name.
        """
        if name is None:
            return Recipe("topology", None, promotes=promotes, topology=topology)
        return Recipe(*recipe_name(name, promotes=promotes), promotes, experts_only, topology)

    def type_of(
        self, name: str, shape: tuple[int, ...], facts: ModelFacts, stored_name: str | None = None
    ) -> tuple[QuantType, QuantType] | None:
        """The type wanted for a tensor of that GGUF name, and the one that fits its rows; None where it stays.

        stored_name: what the file calls it; patterns of a topology may match either.
        """
        if not is_quantisable(name, shape):
            return None
        wanted = self._wanted(name, facts, (name, stored_name or name))
        return None if wanted is None else (wanted, fitting_type(wanted, shape[-1]))

    def _wanted(self, name: str, facts: ModelFacts, names: tuple[str, str]) -> QuantType | None:
        if self.topology is not None:
            layer = _LAYER.match(name)
            named = self.topology.type_of(None if layer is None else int(layer[1]), names)
            if named is not None:
                return named
        if self.base is None or (self.experts_only and not is_expert(name)):
            return None
        is_head = name == "output.weight" or (name == "token_embd.weight" and facts.is_tied)
        if self.is_mix:
            return _T.Q6_K if is_head else _mixed(self.name, self.base, name, facts)
        if self.promotes and (is_head or name == "token_embd.weight"):
            return promoted(self.base)
        return self.base


def is_expert(name: str) -> bool:
    """Whether a tensor of that GGUF name is an expert of a mixture, or all experts of a layer; shared ones are none."""
    return _EXPERT.search(name) is not None


def is_quantisable(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a matrix of weights: norms, biases, routers and tables of positions are kept."""
    return len(shape) >= 2 and name.endswith("weight") and not any(part in name for part in _KEPT)


def promoted(base: QuantType) -> QuantType:
    """What embedding and head get where all other matrices get `base`."""
    if base in _EIGHT_BITS:
        return base
    if base is _T.HQQ4:
        return _T.HQQ8
    return _T.Q8_0 if base is _T.Q6_K else _T.Q6_K


def _gets_more(layer: int, n_layers: int) -> bool:
    """The first eighth and the last eighth of the layers, and every third between them."""
    eighth = n_layers // 8
    return layer < eighth or layer >= 7 * n_layers // 8 or (layer - eighth) % 3 == 2


def _mixed(mix: str, base: QuantType, name: str, facts: ModelFacts) -> QuantType:
    match = _LAYER.match(name)
    layer, n = int(match[1]) if match else 0, facts.n_layers
    if any(part in name for part in ("attn_v.weight", "attn_qkv.weight", "attn_kv_b.weight")):
        return _attention_values(mix, base, layer, facts)
    if "attn_k.weight" in name and facts.n_experts == 8:
        return _T.Q8_0
    if "ffn_down" in name:
        return _feed_forward_down(mix, base, layer, n, facts.architecture == "falcon")
    if "attn_output.weight" in name:
        if facts.architecture == "falcon":
            return _T.Q4_K if mix == "Q3_K_L" else base
        if facts.n_experts == 8:
            return _T.Q5_K if mix in ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M") else base
        return {"Q2_K": _T.Q3_K, "Q3_K_M": _T.Q4_K, "Q3_K_L": _T.Q5_K}.get(mix, base)
    return base


def _attention_values(mix: str, base: QuantType, layer: int, facts: ModelFacts) -> QuantType:
    chosen = base
    if mix == "Q2_K":
        chosen = _T.Q4_K if facts.n_heads >= 4 * facts.n_kv_heads else _T.Q3_K
    elif mix == "Q3_K_M":
        chosen = _T.Q5_K if layer < 2 else _T.Q4_K
    elif mix == "Q3_K_L" or (mix == "Q4_K_S" and layer < 4):
        chosen = _T.Q5_K
    elif mix in ("Q4_K_M", "Q5_K_M") and _gets_more(layer, facts.n_layers):
        chosen = _T.Q6_K
    # Eight heads share a value in Llama's 70B: these matrices are small there, and worth more bits.
    if facts.architecture == "llama" and facts.n_layers == 80 and chosen in (_T.Q3_K, _T.Q4_K):
        chosen = _T.Q5_K
    return _T.Q8_0 if facts.n_experts == 8 else chosen


def _feed_forward_down(mix: str, base: QuantType, layer: int, n: int, is_falcon: bool) -> QuantType:
    if mix == "Q2_K":
        return _T.Q3_K
    if mix == "Q3_K_M":
        if layer < n // 16:
            return _T.Q5_K
        return _T.Q4_K if not is_falcon or _gets_more(layer, n) else _T.Q3_K
    if mix == "Q3_K_L":
        return _T.Q4_K if is_falcon else _T.Q5_K
    if mix == "Q4_K_M" and is_falcon:
        return _T.Q6_K if layer < n // 16 else _T.Q5_K if _gets_more(layer, n) else _T.Q4_K
    if mix in ("Q4_K_M", "Q5_K_M") and _gets_more(layer, n):
        return _T.Q6_K
    if mix == "Q4_K_S" and not is_falcon and layer < n // 8:
        return _T.Q5_K
    return base
