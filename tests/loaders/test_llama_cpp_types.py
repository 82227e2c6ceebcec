"""Files of llama.cpp's quantiser and of ours mean here what they mean to llama.cpp, whatever the type.

`plain` are llama.cpp's logits over the file's weights, decoded to float32 by its own quantiser; `theirs` are those over
the file itself, where llama.cpp rounds what it multiplies to 8 bits. Made by tests/tools/llama_cpp_types.py.
"""

from pathlib import Path

import numpy as np
import pytest
from tiny_llama import full_logits

from kernels.formats import GGML_BY_ID
from serve_app.__main__ import main
from serve_app.gguf_file import open_gguf
from serve_app.loaders.load import load_model
from serve_app.loaders.model_files import resolve
from serve_app.options import ModelSource

DATA = Path(__file__).parents[1] / "data"
WRITTEN = np.load(DATA / "llama_cpp" / "written.npz")
# Largest difference, in standard deviations of the logits: of float32 sums in another order, and of 8-bit activations.
EXACT, ROUNDED = 5e-5, 0.1
QUICK = ("F16", "Q4_1", "Q5_1", "Q8_0", "Q3_K_M", "Q5_K_M", "Q6_K", "MXFP4")
OF_FLOATS = {"F16": 2e-3, "BF16": 1e-2}  # llama.cpp rounds activations to the weights' type


def logits(path: Path, ids: list[int], backend: str, *, is_exact: bool = True) -> np.ndarray:
    loaded = load_model(resolve(ModelSource(model=str(path))), dtype="f32", device="cpu", is_exact=is_exact)
    found: np.ndarray = full_logits(loaded.model, ids, backend).numpy()
    return found


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_every_type_of_llama_quantize_is_read(backend: str) -> None:
    path, golden = DATA / "llama_cpp" / "every_type.gguf", np.load(DATA / "llama_cpp" / "every_type.npz")
    with open_gguf(path) as file:
        names = {GGML_BY_ID[info.type_id].name for info in file.tensors.values()}
    assert names >= {
        "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS", "IQ4_NL", "TQ1_0", "TQ2_0",
        "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4", "NVFP4", "BF16",
    }  # fmt: skip
    found = logits(path, golden["token_ids"].tolist(), backend)
    spread = found.std()
    assert np.abs(found - golden["plain"]).max() <= EXACT * spread
    assert np.abs(found - golden["theirs"].astype(np.float32)).max() <= 0.25 * spread


def each_type() -> list[object]:
    names = sorted({key.split()[0] for key in WRITTEN.files} - {"token_ids"})
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.nightly) for name in names]


@pytest.mark.parametrize("name", each_type())
def test_llama_cpp_reads_what_we_write(name: str, tmp_path: Path) -> None:
    source = DATA / "models" / "stories3M" / "stories3M-F32.gguf"
    assert main(["quantize", "-m", str(source), "--isq", name, "-o", str(tmp_path / "a.gguf")]) == 0
    found = logits(tmp_path / "a.gguf", WRITTEN["token_ids"].tolist(), "cpu")[-1]
    plain, theirs = (WRITTEN[f"{name} {kind}"].astype(np.float32) for kind in ("plain", "theirs"))
    assert np.abs(found - plain).max() <= EXACT * plain.std()
    assert np.abs(found - theirs).max() <= OF_FLOATS.get(name, ROUNDED) * plain.std()
