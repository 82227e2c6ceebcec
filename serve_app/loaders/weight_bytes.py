"""How much memory a model's weights take in a type, without making them."""

from dataclasses import dataclass

from serve_app.loaders.isq import plan, recipe_of
from serve_app.loaders.model_files import ModelFiles
from serve_app.loaders.opening import open_checkpoint
from serve_app.options import IsqOptions


@dataclass(frozen=True, slots=True)
class WeightBytes:
    """kept: of all tensors as they will be. working: what making them takes besides, two of the largest tensors.
    source: of the files' tensors."""

    kept: int
    working: int
    source: int


def weight_bytes(files: ModelFiles, isq: IsqOptions | None) -> WeightBytes:
    """For the types of the files themselves where isq is None or names none. Raises ModelFileError."""
    opened = open_checkpoint(files)
    sizes = [tensor.data.size for tensor in opened.stored()]
    recipe = None if isq is None else recipe_of(isq)
    kept = (
        sum(sizes)
        if recipe is None
        else sum(t.num_bytes for step in plan(files, opened, recipe) for t in step.targets())
    )
    return WeightBytes(kept, 2 * max(sizes, default=0), sum(sizes))
