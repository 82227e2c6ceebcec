"""Importance matrices as files: GGUF, with sums and counts, or the older .dat, by the name's ending."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kernels.formats import BY_NAME
from serve_app.errors import LaunchError
from serve_app.loaders.gguf_writer import GgufWriter, TensorPlan, encoded
from serve_app.quant.imatrix import Importance, write_imatrix

SUFFIXES = (".gguf", ".dat")


def check_imatrix_name(path: Path) -> None:
    """LaunchError for a name of which no form follows, or a folder that is not there."""
    if path.suffix not in SUFFIXES:
        raise LaunchError(f"An importance matrix is saved as .gguf or .dat, not as {path.name!r}.")
    if not path.parent.is_dir():
        raise LaunchError(f"There is no folder {path.parent} for the importance matrix.")


def save_imatrix(
    path: Path,
    importance: Importance,
    counts: Mapping[str, NDArray[np.int64]],
    *,
    num_chunks: int,
    chunk_tokens: int,
    dataset: str,
) -> None:
    """Writes means and the numbers of rows they are of, in the form that the name says, for other programs too.

    counts: by the names of importance, int64 [experts] (one for a plain matrix). dataset: the text's name.
    """
    if path.suffix == ".dat":
        write_imatrix(path, importance, evaluations=num_chunks)
        return
    metadata = {
        "general.type": encoded("imatrix"),
        "imatrix.datasets": encoded([dataset]),
        "imatrix.chunk_count": encoded(num_chunks),
        "imatrix.chunk_size": encoded(chunk_tokens),
    }
    tensors: dict[str, NDArray[np.float32]] = {}
    for name in sorted(importance):
        seen = counts[name].astype(np.float32)[:, None]
        tensors[f"{name}.in_sum2"] = importance[name].reshape(len(seen), -1) * seen
        tensors[f"{name}.counts"] = seen
    plans = [TensorPlan(name, BY_NAME["F32"], values.shape) for name, values in tensors.items()]
    writer = GgufWriter(path, metadata, plans)
    try:
        for values in tensors.values():
            writer.begin()
            writer.write(np.ascontiguousarray(values, "<f4"))
        writer.finish()
    except BaseException:
        writer.abandon()
        raise
