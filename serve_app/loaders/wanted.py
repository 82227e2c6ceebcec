"""Which tensors a family takes out of a checkpoint: its constructor is run once over a source that writes them down."""

from collections.abc import Sequence
from dataclasses import dataclass

from serve_app.loaders.checkpoint import Checkpoint, StoredTensor
from serve_app.loaders.headers import HeaderSource
from serve_app.models.base import ModelArgs
from serve_app.models.registry import Family


@dataclass(frozen=True, slots=True)
class WantedTensor:
    """name: of the Hugging Face checkpoint, that of experts without their number; shape: as the model has it.

    parts: one stored tensor, or one for each expert, row_order set as WeightSource needs it.
    """

    name: str
    parts: tuple[StoredTensor, ...]
    shape: tuple[int, ...]


def wanted_tensors(family: Family, args: ModelArgs, checkpoint: Checkpoint) -> tuple[list[WantedTensor], list[str]]:
    """What the model is made of, in the order of asking, and the stored names of what it does not use.

    ModelFileError where one is missing, misshapen or no weight.
    """
    recorder = _Recorder(checkpoint)
    family.build(args, recorder)
    return list(recorder.wanted.values()), recorder.unused()


class _Recorder(HeaderSource):
    """Writes down what is asked for."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self.wanted: dict[str, WantedTensor] = {}

    def _note(self, name: str, parts: Sequence[StoredTensor], shape: tuple[int, ...]) -> None:
        self.wanted[name] = WantedTensor(name, tuple(parts), shape)
