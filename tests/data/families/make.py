"""Writes this folder's files: random models as GGUF, and the logits that llama.cpp computes with them.

Needs llama-cpp-python, whose library is llama.cpp's; run from the project's root: python tests/data/families/make.py
"""

import ctypes
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

TESTS = Path(__file__).parents[2]
sys.path.insert(0, str(TESTS))

import llama_cpp  # noqa: E402
from family_cases import SMALL, hf_model  # noqa: E402
from family_gguf import write_gguf  # noqa: E402

# File → a case of tests/family_cases.py, GGUF's architecture, and the context that is served.
FILES = {
    "llama": ("llama", "llama", 512),
    "llama-linear": ("llama, linear", "llama", 512),
    "llama-yarn": ("llama yarn", "llama", 512),
    "llama3": ("llama3", "llama", 512),
    "qwen2": ("qwen2", "qwen2", 512),
    "qwen3": ("qwen3, tied", "qwen3", 512),
    "gemma": ("gemma, one KV head", "gemma", 512),
    "gemma2": ("gemma2, short window", "gemma2", 512),
    "gemma3": ("gemma3, published pattern", "gemma3", 512),
    "phi2": ("phi2", "phi2", 512),
    "phi3": ("phi3", "phi3", 512),
    "phi3-short": ("phi3, longer than trained", "phi3", 256),
    "phi3-long": ("phi3, long", "phi3", 512),
    "starcoder2": ("starcoder2", "starcoder2", 512),
    "granite": ("granite", "granite", 512),
}
NUM_TOKENS = 48


def logits_of(path: Path, token_ids: list[int], context: int) -> NDArray[np.float32]:
    """[tokens, vocabulary], all in one batch, keys and values in float32, without flash attention."""
    model_params = llama_cpp.llama_model_default_params()
    model_params.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_params)
    assert model, path
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = context
    params.n_threads = params.n_threads_batch = 1
    params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context_of_model = llama_cpp.llama_init_from_model(model, params)
    batch = llama_cpp.llama_batch_init(len(token_ids), 0, 1)
    batch.n_tokens = len(token_ids)
    for i, token in enumerate(token_ids):
        batch.token[i] = token
        batch.pos[i] = i
        batch.n_seq_id[i] = 1
        batch.seq_id[i][0] = 0
        batch.logits[i] = 1
    assert llama_cpp.llama_decode(context_of_model, batch) == 0
    found = llama_cpp.llama_get_logits(context_of_model)
    pointer = ctypes.cast(found, ctypes.POINTER(ctypes.c_float))
    logits = np.ctypeslib.as_array(pointer, (len(token_ids), SMALL["vocab_size"])).copy()
    llama_cpp.llama_free(context_of_model)
    llama_cpp.llama_model_free(model)
    return logits


def main() -> None:
    """All files, or those named as arguments."""
    token_ids = np.random.default_rng(3).integers(3, SMALL["vocab_size"], NUM_TOKENS)
    for name in sys.argv[1:] or FILES:
        case, arch, context = FILES[name]
        path = Path(__file__).with_name(f"{name}.gguf")
        write_gguf(path, arch, hf_model(case))
        logits = logits_of(path, token_ids.tolist(), context)
        assert logits.std() > 0.1
        np.savez_compressed(path.with_suffix(".npz"), token_ids=token_ids, logits=logits, context=np.array(context))


if __name__ == "__main__":
    main()
