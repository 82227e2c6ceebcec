"""The models that are published: built without data, each asks for its checkpoint's tensors and for no other.

The numbers are those of the models' config.json; transformers, on the meta device, says which tensors belong to them.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from serve_app.models.registry import find_family
from serve_app.quant.weight import DenseWeight, Weight

# Kind: hidden, intermediate, layers, heads, KV heads, vocabulary, and what else differs from the family's defaults.
PUBLISHED: dict[str, tuple[str, tuple[int, int, int, int, int, int], dict[str, Any]]] = {
    "Llama-3.1-8B": ("Llama", (4096, 14336, 32, 32, 8, 128256), {}),
    "Mistral-7B-v0.3": ("Mistral", (4096, 14336, 32, 32, 8, 32768), {"sliding_window": None}),
    "Phi-2": ("Phi", (2560, 10240, 32, 32, 32, 51200), {"partial_rotary_factor": 0.4}),
    "Phi-3-mini": ("Phi3", (3072, 8192, 32, 32, 32, 32064), {"sliding_window": 2047}),
    "Phi-3-medium": ("Phi3", (5120, 17920, 40, 40, 10, 32064), {}),
    "Gemma-2-2b": ("Gemma2", (2304, 9216, 26, 8, 4, 256000), {"head_dim": 256}),
    "Gemma-2-9b": ("Gemma2", (3584, 14336, 42, 16, 8, 256000), {"head_dim": 256}),
    "Gemma-2-27b": ("Gemma2", (4608, 36864, 46, 32, 16, 256000), {"head_dim": 128, "query_pre_attn_scalar": 144}),
    "Gemma-3-1b": ("Gemma3", (1152, 6912, 26, 4, 1, 262144), {"head_dim": 256, "sliding_window": 512}),
    "Qwen2.5-0.5B": ("Qwen2", (896, 4864, 24, 14, 2, 151936), {"tie_word_embeddings": True}),
    "Qwen2.5-7B": ("Qwen2", (3584, 18944, 28, 28, 4, 152064), {}),
    "Qwen3-0.6B": ("Qwen3", (1024, 3072, 28, 16, 8, 151936), {"head_dim": 128, "tie_word_embeddings": True}),
    "StarCoder2-3b": ("Starcoder2", (3072, 12288, 30, 24, 2, 49152), {"sliding_window": 4096}),
}
KEYS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
)  # fmt: skip


class Asked:
    """A WeightSource without data that notes what is asked for."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.shapes = shapes
        self.asked: dict[str, tuple[int, ...]] = {}

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        self.asked[name] = shape
        return torch.empty(shape, device="meta")

    def weight(self, names: Sequence[str], out_features: Sequence[int], in_features: int) -> Weight:
        for name, out in zip(names, out_features, strict=True):
            self.asked[name] = (out, in_features)
        return DenseWeight(torch.empty((sum(out_features), in_features), device="meta"))

    def has(self, name: str) -> bool:
        return name in self.shapes


@pytest.mark.parametrize("name", PUBLISHED)
def test_asks_for_the_published_tensors(name: str) -> None:
    kind, sizes, changes = PUBLISHED[name]
    config_class = getattr(transformers, f"{kind}TextConfig" if kind == "Gemma3" else f"{kind}Config")
    config = config_class(**dict(zip(KEYS, sizes, strict=True)), **changes)
    with torch.device("meta"):
        hf = getattr(transformers, f"{kind}ForCausalLM")(config)
    published = {key: tuple(value.shape) for key, value in hf.state_dict().items()}
    if config.tie_word_embeddings:
        del published["lm_head.weight"]
    family = find_family(f"{kind}ForCausalLM", "config.json")
    source = Asked(published)
    family.build(family.args.from_hf(config.to_dict()), source)
    assert source.asked == published
