"""A Llama with random weights, made on the device in the form in which a loader would leave them there."""

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from benchmarks.gpu.sizes import Sizes
from kernels.gpu.planar import PlanarMatrix
from kernels.gpu.tune import random_matrix
from serve_app.layers.rope_scaling import RopeScaling
from serve_app.models.llama import LlamaArgs, LlamaForCausalLM
from serve_app.models.rope_config import RopeConfig
from serve_app.quant.planar_weight import FusedPlanarWeight, PlanarWeight
from serve_app.quant.weight import DenseWeight, Weight

LAYOUTS = ("bf16", "Q8_0", "Q4_K_M")
_DEVIATION = 0.02


class RandomWeights:
    """See WeightSource. layout: bf16, a type with planes, or the mixture Q4_K_M as llama-quantize chooses its types.

    bytes_per_step: of the matrices that a decode step reads, an embedding's only where it is the head too.
    """

    def __init__(self, sizes: Sizes, layout: str, device: torch.device) -> None:
        self._sizes = sizes
        self._layout = layout
        self._device = device
        self._generator = torch.Generator(device).manual_seed(0)
        self.bytes_per_step = 0

    def has(self, name: str) -> bool:
        """See WeightSource."""
        return name == "lm_head.weight" and not self._sizes.is_tied

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """See WeightSource: norms alone."""
        return torch.ones(shape, device=self._device)

    def weight(self, names: Sequence[str], out_features: Sequence[int], in_features: int) -> Weight:
        """See WeightSource."""
        weight = self._make(names, out_features, in_features)
        if "embed_tokens" not in names[0] or self._sizes.is_tied:
            self.bytes_per_step += weight.nbytes
        return weight

    def _make(self, names: Sequence[str], out_features: Sequence[int], in_features: int) -> Weight:
        if self._layout == "bf16":
            rows = torch.empty(sum(out_features), in_features, dtype=torch.bfloat16, device=self._device)
            return DenseWeight(rows.normal_(0, _DEVIATION, generator=self._generator))
        # As CheckpointSource does: neighbours of one type are one matrix.
        typed = zip(map(self._type_of, names), out_features, strict=True)
        runs = [
            self._planar(kind, sum(rows for _, rows in run), in_features)
            for kind, run in groupby(typed, lambda part: part[0])
        ]
        return runs[0] if len(runs) == 1 else FusedPlanarWeight(runs)

    def _planar(self, kind: str, rows: int, columns: int) -> PlanarWeight:
        matrix: PlanarMatrix = random_matrix(kind, rows, columns, self._device)
        return PlanarWeight(matrix, torch.bfloat16)

    def _type_of(self, name: str) -> str:
        if self._layout != "Q4_K_M":
            return self._layout
        if "layers" not in name:
            return "Q6_K"  # the head, which a tied embedding is too
        if ".v_proj." in name or ".down_proj." in name:
            layer, count = int(name.split(".")[2]), self._sizes.layers
            has_more = layer < count // 8 or layer >= 7 * count // 8 or (layer - count // 8) % 3 == 2
            return "Q6_K" if has_more else "Q4_K"
        return "Q4_K"


def random_llama(sizes: Sizes, layout: str, device: torch.device, context: int) -> tuple[LlamaForCausalLM, int]:
    """The model, and the bytes of weights that a decode step reads; context: positions that it is made for."""
    args = LlamaArgs(
        n_layers=sizes.layers,
        n_heads=sizes.heads,
        n_kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        vocab_size=sizes.vocabulary,
        max_position_embeddings=context,
        norm_eps=1e-5,
        rope=RopeConfig(theta=500000.0, scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)),
        tie_word_embeddings=sizes.is_tied,
        attention_bias=False,
        mlp_bias=False,
    )
    weights = RandomWeights(sizes, layout, device)
    return LlamaForCausalLM(args, weights), weights.bytes_per_step
