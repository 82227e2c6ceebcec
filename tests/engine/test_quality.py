"""Distances between a model and its quantised variants, against llama-perplexity's."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from serve_app.engine import reference_logits
from serve_app.engine.llm import LLM
from serve_app.engine.quality import chunks_of, compare, open_model, size_of, with_cache_of
from serve_app.engine.reference_logits import ReferenceLogits, scored_logits
from serve_app.errors import LaunchError
from serve_app.loaders.model_files import ModelFiles, resolve
from serve_app.options import EngineConfig, IsqOptions, ModelSource

STORIES = Path(__file__).parents[1] / "data" / "models" / "stories3M"
TEXT = (STORIES / "sampled_text.txt").read_text(encoding="utf-8")
CONTEXT, CHUNKS, ALL_CHUNKS = 256, 12, 120
CONFIG = EngineConfig(num_threads=1, kv_cache_dtype="f32", device="cpu")

# llama-perplexity --kl-divergence (ggml 0.25.3, -c 256 -b 256 --chunks 12 -fa off -ctk f32 -ctv f32) of the files of
# llama-quantize, against F32: perplexity, mean KL divergence and its error, same top token.
THEIRS = {
    "Q2_K": (4.633306, 0.038092, 0.001682, 0.89698),
    "Q4_0": (4.494941, 0.004570, 0.000188, 0.96194),
    "Q4_K_M": (4.496736, 0.002860, 0.000113, 0.97244),
    "Q6_K": (4.477114, 0.000518, 0.000016, 0.98688),
}
REFERENCE = 4.475500
SLOW = ("Q4_0", "Q6_K")
# llama-perplexity on 120 chunks.
WHOLE = {"F16": 4.747, "Q8_0": 4.747, "Q6_K": 4.752, "Q4_K_M": 4.765, "Q4_0": 4.775, "Q2_K": 4.945}


def files(name: str) -> ModelFiles:
    return resolve(ModelSource(model=str(STORIES / name)))


@pytest.mark.parametrize("name", ["Q2_K", "Q4_K_M", *(pytest.param(n, marks=pytest.mark.nightly) for n in SLOW)])
def test_figures_are_those_of_llama_perplexity(name: str) -> None:
    perplexity, divergence, error, agreement = THEIRS[name]
    source = files("hf")
    with open_model(source, CONFIG, CONTEXT) as reference:
        chunks = chunks_of(reference, TEXT, CONTEXT, CHUNKS)
        # llama-quantize promotes an embedding to Q6_K, and not beyond.
        isq = IsqOptions(name, is_pure=name == "Q6_K")
        with open_model(replace(source, isq=isq), CONFIG, CONTEXT) as variant:
            found = compare(ReferenceLogits(reference, chunks), variant)
    assert found.perplexity.num_tokens == CHUNKS * (CONTEXT // 2 - 1)
    assert found.reference_perplexity.value == pytest.approx(REFERENCE, rel=1e-4)
    assert found.perplexity.value == pytest.approx(perplexity, rel=0.002)
    assert found.kl_divergence == pytest.approx(divergence, rel=0.05)
    assert found.kl_error == pytest.approx(error, rel=0.1)
    assert found.top1_agreement == pytest.approx(agreement, abs=0.004)


@pytest.mark.nightly
@pytest.mark.parametrize("name", WHOLE)
def test_perplexities_of_the_whole_text(name: str) -> None:
    source = files("stories3M-F32.gguf")
    with open_model(source, CONFIG, CONTEXT) as reference:
        chunks = chunks_of(reference, TEXT, CONTEXT, ALL_CHUNKS)
        with open_model(replace(source, isq=IsqOptions(name)), CONFIG, CONTEXT) as variant:
            found = compare(ReferenceLogits(reference, chunks), variant)
    assert found.perplexity.value == pytest.approx(WHOLE[name], rel=0.005)


def test_the_sums_are_what_their_names_say() -> None:
    with (
        open_model(files("hf"), CONFIG, 64) as reference,
        open_model(files("stories3M-Q2_K.gguf"), CONFIG, 64) as other,
    ):
        chunks = chunks_of(reference, TEXT, 64, 2)
        found = compare(ReferenceLogits(reference, chunks), other)
        divergences, nlls, agreed = [], [], 0
        for chunk in chunks:
            p, q = (torch.log_softmax(llm.logits(chunk).double(), -1)[32:-1] for llm in (reference, other))
            divergences += torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1).tolist()
            nlls += torch.nn.functional.nll_loss(q, torch.tensor(chunk[33:]), reduction="none").tolist()
            agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
    count = 2 * 31
    assert len(divergences) == found.perplexity.num_tokens == count
    assert found.kl_divergence == pytest.approx(sum(divergences) / count, rel=1e-6)
    spread = torch.tensor(divergences, dtype=torch.float64).std() / math.sqrt(count)
    assert found.kl_error == pytest.approx(float(spread), rel=1e-6)
    assert found.perplexity.value == pytest.approx(math.exp(sum(nlls) / count), rel=1e-6)
    assert found.top1_agreement == agreed / count


def test_a_model_beside_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits are taken a few rows at a time, and the whole context of the model can be a chunk."""
    monkeypatch.setattr("serve_app.engine.quality._NUMBERS_AT_ONCE", 5000)
    source = files("stories3M-Q4_0.gguf")
    rounds = []
    with open_model(source, CONFIG, 512) as one, open_model(source, CONFIG, 512) as two:
        found = compare(ReferenceLogits(one, chunks_of(one, TEXT, 512, 2)), two, lambda: rounds.append(1))
        assert size_of(one) == size_of(two)
    assert (found.kl_divergence, found.kl_error, found.top1_agreement) == (0.0, 0.0, 1.0)
    assert found.perplexity == found.reference_perplexity
    assert found.perplexity.num_tokens == 2 * 255
    assert len(rounds) == 2


@pytest.mark.parametrize("room", ["for all", "for one chunk", "none", "no file", "a quota"])
def test_the_reference_is_computed_once_where_it_can_be_kept(
    room: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []

    def counted(llm: LLM, chunk: Sequence[int]) -> torch.Tensor:
        computed.extend(i for i, known in enumerate(chunks) if known is chunk and llm is reference)
        return scored_logits(llm, chunk)

    def left(_: int) -> SimpleNamespace:
        chunk_bytes = 4 * 31 * reference.tokenizer.vocab_size
        free = {"for all": 1 << 60, "for one chunk": chunk_bytes * (not computed[1:]), "none": 0}.get(room, 1 << 60)
        return SimpleNamespace(f_bavail=free + (1 << 30), f_frsize=1)

    def fails(*_: object) -> int:
        raise OSError(122, "Disk quota exceeded")

    monkeypatch.setattr(reference_logits.os, "fstatvfs", left)
    monkeypatch.setattr(reference_logits, "scored_logits", counted)
    with (
        open_model(files("hf"), CONFIG, 64) as reference,
        open_model(files("stories3M-Q2_K.gguf"), CONFIG, 64) as other,
        (tmp_path / "logits").open("w+b") as file,
    ):
        chunks = chunks_of(reference, TEXT, 64, 3)
        expected = compare(ReferenceLogits(reference, chunks), other)
        computed.clear()
        kept = file if room != "a quota" else SimpleNamespace(fileno=file.fileno, seek=file.seek, write=fails)
        logits = ReferenceLogits(reference, chunks, None if room == "no file" else kept)  # type: ignore[arg-type]
        assert [compare(logits, other) for _ in range(3)] == [expected] * 3
    again = {"for all": [], "for one chunk": [1, 2]}.get(room, [0, 1, 2])
    assert computed == [0, 1, 2, *again, *again]


def test_caches_are_kept_alike() -> None:
    with open_model(files("hf"), EngineConfig(num_threads=1), 64) as reference:
        config = with_cache_of(reference, EngineConfig(num_threads=1, pa_cache_type="auto"))
    with open_model(files("stories3M-Q4_0.gguf"), config, 64) as variant:
        assert variant.engine.parts.kv.dtype == torch.float32


def test_short_texts_are_refused() -> None:
    with LLM(files("hf"), config=CONFIG) as llm, pytest.raises(LaunchError, match="shorter than one chunk of 512"):
        chunks_of(llm, "Once upon a time", 512, None)
