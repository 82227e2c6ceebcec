"""Logits of a GGUF by llama.cpp, through the bindings of llama-cpp-python.

Needs `pip install llama-cpp-python`; LLAMA_CPP_LIB_PATH names a folder with another build of libllama than its own. In
one batch, with float32 keys and values and without flash attention, which rounds to 16 bits.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from llama_cpp import llama_cpp as c
from numpy.typing import NDArray


@c.llama_log_callback
def _silent(level: int, text: bytes, data: object) -> None:
    if level >= 4:  # errors
        print(text.decode(errors="replace"), end="")


def llama_cpp_logits(path: Path, ids: Sequence[int], *, context: int = 128) -> NDArray[np.float32]:
    """float32 [tokens, vocabulary]. context: what longrope's set is chosen by. ValueError where it does not load."""
    c.llama_log_set(_silent, None)
    c.llama_backend_init()
    options = c.llama_model_default_params()
    options.n_gpu_layers = 0
    model = c.llama_model_load_from_file(str(path).encode(), options)
    if not model:
        raise ValueError(f"llama.cpp does not load {path}")
    settings = c.llama_context_default_params()
    settings.n_ctx = context
    settings.n_batch = settings.n_ubatch = len(ids)
    settings.n_threads = settings.n_threads_batch = 1
    settings.type_k = settings.type_v = c.GGML_TYPE_F32
    settings.flash_attn_type = c.LLAMA_FLASH_ATTN_TYPE_DISABLED
    run = c.llama_init_from_model(model, settings)
    batch = c.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, 1
    if c.llama_decode(run, batch):
        raise ValueError(f"llama.cpp fails on {path}")
    width = c.llama_vocab_n_tokens(c.llama_model_get_vocab(model))
    rows = [np.ctypeslib.as_array(c.llama_get_logits_ith(run, i), (width,)).copy() for i in range(len(ids))]
    c.llama_batch_free(batch)
    c.llama_free(run)
    c.llama_model_free(model)
    return np.stack(rows)
