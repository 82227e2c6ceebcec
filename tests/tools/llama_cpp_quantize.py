"""llama.cpp's quantiser through the bindings of llama-cpp-python: what llama-quantize calls."""

import ctypes
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from llama_cpp import llama_cpp as c

from serve_app.gguf_file import open_gguf


def llama_cpp_quantize(
    source: Path, target: Path, file_type: int, types: Mapping[str, int] | None = None, *, has_imatrix: bool = False
) -> None:
    """Writes target. types: regular expressions for names of tensors → ggml's number of the type for them.

    has_imatrix: with one, of random numbers, which the types below three bits need.
    """
    options = c.llama_model_quantize_default_params()
    options.ftype, options.nthread, options.allow_requantize = file_type, 2, True
    if types:
        entries = [c.llama_model_tensor_override(name.encode(), kind) for name, kind in types.items()]
        overrides = (c.llama_model_tensor_override * (len(entries) + 1))(*entries)
        options.tt_overrides = ctypes.cast(overrides, ctypes.POINTER(c.llama_model_tensor_override))
    if has_imatrix:
        random = np.random.default_rng(0)
        with open_gguf(source) as file:
            columns = {name: t.shape[-1] for name, t in file.tensors.items() if len(t.shape) == 2}
        values = {name: random.uniform(0.5, 2, n).astype(np.float32) for name, n in columns.items()}
        rows = [
            c.llama_model_imatrix_data(name.encode(), v.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), v.size)
            for name, v in values.items()
        ]
        table = (c.llama_model_imatrix_data * (len(rows) + 1))(*rows)
        options.imatrix = ctypes.cast(table, ctypes.POINTER(c.llama_model_imatrix_data))
    if c.llama_model_quantize(str(source).encode(), str(target).encode(), options):
        raise ValueError(f"llama.cpp does not quantise {source} to {file_type}")
