"""What quantised files are made by: a model that was opened and described once, planned and written for each type."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from serve_app.loaders.checkpoint import Checkpoint
from serve_app.loaders.model_files import ModelFiles
from serve_app.loaders.opening import open_checkpoint
from serve_app.loaders.quantized import Step
from serve_app.loaders.recode import Progress
from serve_app.loaders.safetensors import SafetensorsCheckpoint
from serve_app.quant.mix import Recipe


class Target(Protocol):
    """A GGUF, or a folder, that a model becomes."""

    def plan(self, recipe: Recipe) -> list[Step]:
        """What becomes of each tensor, before any importance; see plan_steps."""
        ...

    def write(self, path: Path, recipe: Recipe, steps: Sequence[Step], progress: Progress) -> int:
        """Writes it; no weights bear their name until they are whole. Bytes of the file with the weights."""
        ...


class TokenizerForms(Protocol):
    """A model's tokenizer and chat templates in the words of either format; text has them, which loaders do not know.

    They are what the model is served with: those that the options name, else its own.
    """

    def gguf_values(self, vocab_size: int, pre_tokenizer: str | None) -> dict[str, Any]:
        """Keys and values of a GGUF; of a model that is one, those alone that come in the place of its own.

        See text.gguf_tokenizer. LaunchError or ModelFileError, with the reason, for what a GGUF cannot describe.
        """
        ...

    def write_files(self, folder: Path) -> tuple[int | None, tuple[int, ...]] | None:
        """The same as files of a folder, which has the model's other files already; the ids of BOS and of the ends,
        None where the model's own tokenizer stays, or it has none."""
        ...


def open_readable(files: ModelFiles) -> Checkpoint:
    """A model's tensors; ModelFileError where weights are among them that cannot be read."""
    checkpoint = open_checkpoint(files)
    if isinstance(checkpoint, SafetensorsCheckpoint):
        checkpoint.require_readable_weights()
    return checkpoint
