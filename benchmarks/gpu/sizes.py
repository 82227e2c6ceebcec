"""The sizes of the models that are measured; weights are random and made on the device."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sizes:
    """A Llama's; the head is a matrix of its own where it is not tied."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    is_tied: bool

    @property
    def layer_matrices(self) -> dict[str, tuple[int, int]]:
        """(rows, columns) of a layer's matrices as loaders fuse them."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "qkv": (queries + 2 * keys, self.hidden),
            "out": (self.hidden, queries),
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }

    @property
    def kv_bytes_per_token(self) -> int:
        """Of keys and values in 16 bits, all layers."""
        return self.layers * 2 * self.kv_heads * self.head_dim * 2


@dataclass(frozen=True, slots=True)
class MixtureSizes:
    """Of a layer's experts: each is three matrices between hidden and inner; a token takes top_k."""

    name: str
    hidden: int
    inner: int
    experts: int
    top_k: int


LLAMA_8B = Sizes("Llama-3.1-8B", 4096, 32, 32, 8, 128, 14336, 128256, False)
LLAMA_1B = Sizes("Llama-3.2-1B", 2048, 16, 32, 8, 64, 8192, 128256, True)
TINY = Sizes("tiny", 256, 1, 4, 2, 64, 256, 640, True)
QWEN3_30B = MixtureSizes("Qwen3-30B-A3B", 2048, 768, 128, 8)
TINY_MIXTURE = MixtureSizes("tiny", 256, 256, 4, 2)
