"""Random targets with draft models that agree with them to a wanted degree."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.random_models.folder_writer import write_folder
from benchmarks.random_models.shapes import Shape, Tensor
from benchmarks.random_models.values import EMBEDDING_DEVIATION, random_values
from benchmarks.random_models.vocabulary import make_vocabulary

# Deviations of the embedding, so that a layer's output changes it a little, and of the head: with it the likeliest
# token has most of the mass, as in texts that drafts pay for.
_EMBEDDING = 1.0
_HEAD = 0.25


@dataclass(frozen=True, slots=True)
class DraftPair:
    """A target, of which the draft is the first layers and the head. change: how much the other layers add to the
    residual stream, of what they would add in a plain random model; the less, the more often both agree."""

    shape: Shape
    draft_layers: int
    change: float
    seed: int = 0

    def write_target(self, folder: Path) -> None:
        """A Hugging Face folder in bfloat16."""
        write_folder(folder, self.shape, make_vocabulary(self.shape.vocab_size), "bf16", self.seed, self._values)

    def write_draft(self, folder: Path) -> None:
        """The draft, likewise."""
        write_folder(folder, self._draft, make_vocabulary(self.shape.vocab_size), "bf16", self.seed, self._values)

    def write_stranger(self, folder: Path) -> None:
        """A draft of the same sizes that knows nothing of the target."""
        vocabulary = make_vocabulary(self.shape.vocab_size)
        write_folder(folder, self._draft, vocabulary, "bf16", self.seed + 1, self._values)

    @property
    def _draft(self) -> Shape:
        return replace(self.shape, n_layers=self.draft_layers)

    def _values(self, shape: Shape, tensor: Tensor, seed: int) -> NDArray[np.float32]:
        # Of the target's shape, whosever tensor it is: both have the same.
        values = random_values(self.shape, tensor, seed)
        if tensor.kind == "embedding":
            deviation = _HEAD if tensor.name == "lm_head.weight" else _EMBEDDING
            return values * np.float32(deviation / EMBEDDING_DEVIATION)
        if tensor.name.endswith(("o_proj.weight", "down_proj.weight")):
            layer = int(tensor.name.split(".")[2])
            return values * np.float32(self.change if layer >= self.draft_layers else 1.0)
        return values
