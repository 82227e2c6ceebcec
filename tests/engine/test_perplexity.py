"""Texts are scored as llama-perplexity scores them, and no type's default arithmetic costs quality."""

import math
from pathlib import Path

import pytest
import torch

import serve_app
from serve_app.engine.llm import LLM
from serve_app.engine.perplexity import perplexity
from serve_app.options import EngineConfig
from tests.requantise import requantise

STORIES = Path(__file__).parents[1] / "data" / "models" / "stories3M"
TEXT = (STORIES / "sampled_text.txt").read_text()
CONTEXT, ALL_CHUNKS, FEW_CHUNKS = 256, 120, 4
BOUND = 0.005

# llama-perplexity (ggml 0.25.3) on all chunks.
FIGURES = {"F16": 4.747, "Q8_0": 4.747, "Q6_K": 4.752, "Q4_K_M": 4.765, "Q4_0": 4.775, "Q2_K": 4.945}
OTHERS = ["BF16", "Q4_1", "Q5_0", "Q5_1", "Q3_K", "Q5_K"]


def model(name: str, folder: Path) -> Path:
    """The GGUF of a type: llama-quantize's, or made here from the float32 one."""
    if name == "Q8_0":
        return Path(serve_app.__file__).parent / "assets" / "stories3M-Q8_0.gguf"
    stored = STORIES / f"stories3M-{name}.gguf"
    if not stored.exists():
        stored = folder / stored.name
        requantise(STORIES / "stories3M-F32.gguf", stored, name)
    return stored


def value(path: Path, chunks: int, *, is_exact: bool = False) -> float:
    with LLM(str(path), config=EngineConfig(cpu_exact=is_exact)) as llm:
        found = perplexity(llm, TEXT, CONTEXT, chunks)
    assert found.num_tokens == chunks * (CONTEXT // 2 - 1)
    return found.value


def test_the_second_half_of_each_chunk_is_scored_after_bos() -> None:
    with LLM() as llm:
        text = TEXT[:1500]
        ids = llm.tokenizer.encode(text)
        nlls = []
        for start in range(0, len(ids) - 63, 64):
            chunk = [llm.tokenizer.bos_id, *ids[start + 1 : start + 64]]
            scores = torch.log_softmax(llm.logits(chunk).double(), -1)
            nlls += [-float(scores[i - 1, chunk[i]]) for i in range(33, 64)]
        found = perplexity(llm, text, 64)
        assert found.num_tokens == len(nlls) > 100
        assert found.value == pytest.approx(math.exp(sum(nlls) / len(nlls)), rel=1e-5)
        spread = torch.tensor(nlls, dtype=torch.float64).var(correction=1).sqrt() / len(nlls) ** 0.5
        assert found.error == pytest.approx(found.value * float(spread), rel=1e-3)
        assert perplexity(llm, text, 64, max_chunks=2).num_tokens == 62
        with pytest.raises(ValueError, match="shorter than one chunk of 64"):
            perplexity(llm, "Once upon a time", 64)


@pytest.mark.parametrize("name", [*FIGURES, *OTHERS])
def test_a_part_of_the_text(name: str, tmp_path: Path) -> None:
    path = model(name, tmp_path)
    assert value(path, FEW_CHUNKS) == pytest.approx(value(path, FEW_CHUNKS, is_exact=True), rel=BOUND)


@pytest.mark.nightly
@pytest.mark.parametrize("name", [*FIGURES, *OTHERS])
def test_the_whole_text(name: str, tmp_path: Path) -> None:
    path = model(name, tmp_path)
    found = value(path, ALL_CHUNKS)
    assert found == pytest.approx(value(path, ALL_CHUNKS, is_exact=True), rel=BOUND)
    if name in FIGURES:
        assert found == pytest.approx(FIGURES[name], rel=BOUND)
