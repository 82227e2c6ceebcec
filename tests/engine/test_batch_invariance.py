"""A request's text and logits have the same bits whatever else runs, however its prompt is cut, with any threads."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from kernels import dispatch
from serve_app.engine.llm import LLM
from serve_app.messages import GenerateRequest
from serve_app.options import EngineConfig, KvDType, SamplingParams

MODELS = Path(__file__).parents[1] / "data" / "models" / "stories3M"
PROMPTS = ["Once upon a time, there was a little girl named Lily. She had a red ball and", "Tom saw a big dog."]
NUM_TOKENS = 40


@pytest.fixture(scope="module", params=["BF16", "Q4_K"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    if request.param == "Q4_K":
        return str(MODELS / "stories3M-Q4_K_M.gguf")
    folder = tmp_path_factory.mktemp("bf16")
    for file in (MODELS / "hf").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(MODELS / "hf" / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    yield
    dispatch.set_num_threads(1)


class Watched:
    """Runs requests to their ends and keeps, by request and position, the logits that each token was drawn from."""

    def __init__(self, model: str, **changes: Any) -> None:
        self.llm = LLM(model, config=EngineConfig(**({"num_threads": 1, "pool_tokens": 4096} | changes)))
        self.logits: dict[tuple[str, int], np.ndarray] = {}
        self.tokens: dict[str, list[int]] = {}
        # Logits are nowhere handed out with the request that they belong to: they are seen on their way to the draw.
        sampler = self.llm.engine.parts.runner.sampler
        self._sample = sampler.sample  # type: ignore[attr-defined]
        sampler.sample = self._watch  # type: ignore[attr-defined]

    def _watch(self, logits: np.ndarray, rows: np.ndarray, positions: np.ndarray) -> Any:
        live = [request for choices in self.llm.engine._live.values() for request in choices]
        names = {request.row: request.request_id for request in live}
        for row, position, values in zip(rows.tolist(), positions.tolist(), logits, strict=True):
            self.logits[names[row], position] = values.copy()
        return self._sample(logits, rows, positions)

    def run(self, requests: dict[str, GenerateRequest], one_by_one: bool = False) -> None:
        engine, waiting = self.llm.engine, list(requests.values())
        while waiting or engine.has_requests:
            if waiting and not (one_by_one and engine.has_requests):
                for request in [waiting.pop()] if one_by_one else waiting:
                    engine.add(request)
                waiting = waiting if one_by_one else []
            for delta in engine.step():
                assert delta.finish is None or delta.finish.error is None
                self.tokens.setdefault(delta.request_id, []).extend(delta.token_ids)

    def close(self) -> "Watched":
        self.llm.close()
        return self


def request(llm: LLM, name: str, text: str, seed: int) -> GenerateRequest:
    sampling = SamplingParams(temperature=1.0, seed=seed, max_tokens=NUM_TOKENS, ignore_eos=True)
    return GenerateRequest(name, llm.tokenizer.encode(text), sampling)


def ours(llm: LLM) -> dict[str, GenerateRequest]:
    # Long enough for several chunks and blocks.
    texts = {"long": " ".join(PROMPTS * 9), "short": PROMPTS[1]}
    return {name: request(llm, name, text, i) for i, (name, text) in enumerate(texts.items())}


def others(llm: LLM, count: int) -> dict[str, GenerateRequest]:
    chooser = random.Random(5)
    words = " ".join(PROMPTS).split()
    return {
        f"other {i}": request(llm, f"other {i}", " ".join(chooser.choices(words, k=chooser.randint(1, 60))), 100 + i)
        for i in range(count)
    }


def check_equal(got: Watched, expected: Watched) -> None:
    for name, tokens in expected.tokens.items():
        assert got.tokens[name] == tokens, name
    for key, logits in expected.logits.items():
        assert np.array_equal(got.logits[key], logits), key


@pytest.fixture(scope="module")
def alone(model: str) -> Watched:
    """Each of our requests by itself, its prompt in one piece, on one thread."""
    watched = Watched(model, prefill_chunk_tokens=512)
    watched.run(ours(watched.llm), one_by_one=True)
    assert {len(tokens) for tokens in watched.tokens.values()} == {NUM_TOKENS}
    return watched.close()


@pytest.mark.parametrize(
    "changes",
    [
        {"prefill_chunk_tokens": 512},
        {"prefill_chunk_tokens": 32, "num_threads": 2},
        {"prefill_chunk_tokens": 7, "num_threads": 3},
        {"prefill_chunk_tokens": 1, "num_threads": 2, "prefix_cache_n": 0},
        {"block_size": 16, "max_batched_tokens": 48},
        {"paged_attention": False, "num_threads": 5},
    ],
    ids=str,
)
def test_the_same_bits_among_31_others(model: str, alone: Watched, changes: dict[str, Any]) -> None:
    watched = Watched(model, **changes)
    requests = {**others(watched.llm, 30), **ours(watched.llm)}
    names = list(requests)
    random.Random(3).shuffle(names)
    watched.run({name: requests[name] for name in names})
    check_equal(watched.close(), alone)


def test_the_same_bits_after_preemption(model: str, alone: Watched) -> None:
    watched = Watched(model, pool_tokens=512, block_size=16, prefill_chunk_tokens=48, num_threads=2)
    # Ours come last and are preempted first.
    watched.run({**others(watched.llm, 14), **ours(watched.llm)})
    assert watched.llm.engine.stats().preemptions > 2
    check_equal(watched.close(), alone)


@pytest.mark.parametrize("kv", ["f32", "f16", "q8"])
def test_the_same_bits_with_keys_and_values_of_any_type(model: str, kv: KvDType) -> None:
    runs = []
    for changes in ({"prefill_chunk_tokens": 512}, {"prefill_chunk_tokens": 5, "num_threads": 2}):
        watched = Watched(model, kv_cache_dtype=kv, **changes)
        watched.run({**ours(watched.llm), **(others(watched.llm, 6) if runs else {})})
        runs.append(watched.close())
    check_equal(runs[1], runs[0])


def test_exact_products_have_equal_bits_too(model: str, alone: Watched) -> None:
    runs = []
    for changes in ({"prefill_chunk_tokens": 512}, {"prefill_chunk_tokens": 5, "num_threads": 2}):
        watched = Watched(model, cpu_exact=True, **changes)
        watched.run({**ours(watched.llm), **(others(watched.llm, 6) if runs else {})})
        runs.append(watched.close())
    check_equal(runs[1], runs[0])
    key = next(iter(alone.logits))
    assert not np.array_equal(runs[0].logits[key], alone.logits[key])
    torch.testing.assert_close(
        torch.from_numpy(runs[0].logits[key]), torch.from_numpy(alone.logits[key]), rtol=0.1, atol=0.5
    )
