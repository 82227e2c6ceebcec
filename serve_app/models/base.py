"""What a model family fulfils and what it is built from; no code to inherit."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

from torch import Tensor

from serve_app.models.gguf_form import GgufForm

if TYPE_CHECKING:
    from serve_app.layers.step import Rows, Step
    from serve_app.quant.experts import Experts
    from serve_app.quant.weight import Weight


class ModelArgs(Protocol):
    """The facts that every family's frozen args dataclass exposes to loaders and engine. GGUF: that format's way."""

    GGUF: ClassVar[GgufForm]

    @property
    def n_layers(self) -> int: ...
    @property
    def n_heads(self) -> int: ...
    @property
    def n_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def max_position_embeddings(self) -> int: ...

    @classmethod
    def from_hf(cls, config: dict[str, Any], file: str = "config.json") -> Self:
        """From a checkpoint's config.json; a missing or absurd key raises ModelFileError naming file and key."""
        ...

    @classmethod
    def from_gguf(cls, metadata: dict[str, Any], file: str = "the GGUF file") -> Self:
        """From a GGUF's metadata; a missing or absurd key raises ModelFileError naming file and key."""
        ...


class WeightSource(Protocol):
    """Where a family takes its tensors from, by the Hugging Face checkpoint's names.

    Rows of q and k (and their biases) come in the half-split rotary order whatever the file's order is. GGUF's
    rotary divisors keep their own name, "rope_freqs.weight". A missing or misshapen tensor raises ModelFileError
    naming the file and the tensor.
    """

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A small dense tensor (norm, bias), float32, on the model's device."""
        ...

    def weight(self, names: Sequence[str], out_features: Sequence[int], in_features: int) -> "Weight":
        """The named matrices [out_features[i], in_features] fused along dimension 0, packed or dense."""
        ...

    def experts(self, name: str, num_experts: int, out_features: int, in_features: int) -> "Experts":
        """A mixture's matrices [out_features, in_features] as one grouped tensor.

        name: with "{}" for the expert's number ("model.layers.0.mlp.experts.{}.up_proj.weight"). The file may have one
        tensor of all experts instead; its name lacks the number.
        """
        ...

    def has(self, name: str) -> bool:
        """Whether the file has this tensor."""
        ...


class CausalLM(Protocol):
    """A loaded model: one forward over the flat tokens of a step, then logits where they are wanted.

    Both only call the step's operations and never look at its numbers: the step may be a recording (layers.step).
    """

    @property
    def args(self) -> ModelArgs: ...

    def forward(self, step: "Step") -> "Rows":
        """Final hidden states [T, hidden_size], normalised; writes the step's K and V of args.n_layers layers."""
        ...

    def logits(self, hidden: "Rows", step: "Step") -> "Rows":
        """hidden [L, hidden_size] → [L, vocab_size]."""
        ...
