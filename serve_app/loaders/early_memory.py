"""Memory for a model's weights, begun to be made ready before torch is imported. No torch."""

from pathlib import Path

from kernels.cpu import weight_memory
from serve_app.errors import ServeError
from serve_app.gguf_file import open_gguf
from serve_app.loaders.weight_files import find_weights
from serve_app.options import ModelSource


def prepare_memory(source: ModelSource) -> None:
    """For a local GGUF that the CPU will run as it is. What is wrong with the files is left to who loads them."""
    if source.isq is not None:
        return  # weights take another form, and quantising them keeps every core busy
    if source.model is None or not Path(source.model).expanduser().exists():
        return
    try:
        weights = find_weights(source)
        if weights.kind != "gguf":
            return
        with open_gguf(weights.files[0] if len(weights.files) == 1 else weights.files, with_texts=False) as file:
            matrices = [(t.type_id, *t.shape) for t in file.tensors.values() if len(t.shape) == 2]
    except ServeError:
        return
    weight_memory.prepare((type_id, rows, columns) for type_id, rows, columns in matrices)
