"""Layers with a window give up blocks: nothing that is computed may change, and memory stays bounded."""

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from family_cases import CASES, hf_model, our_model
from tiny_llama import full_logits

from serve_app.errors import ContextTooLong
from serve_app.models.base import CausalLM
from serve_app.options import EngineConfig
from tests.engine.tiny_engine import TinyEngine

Outputs = dict[tuple[str, int], list[int]]
VOCABULARY = 512


def model_of(kind: str, **changes: Any) -> CausalLM:
    CASES["here"] = (kind, {"vocab_size": VOCABULARY, "max_position_embeddings": 1024} | changes)
    return our_model(hf_model("here"))


@pytest.fixture(scope="module")
def mistral() -> CausalLM:
    return model_of("Mistral", sliding_window=19)


def config_of(block_size: int = 16, backend: str = "auto", **changes: Any) -> EngineConfig:
    small = {"max_seqs": 6, "max_batched_tokens": 40, "prefill_chunk_tokens": 24, "max_waiting": 64}
    return EngineConfig(block_size=block_size, attention_backend=backend, cuda_graphs=False, **(small | changes))


def ids(seed: int, count: int) -> list[int]:
    return random.Random(seed).choices(range(3, VOCABULARY), k=count)


def load(tiny: TinyEngine, *, preempts: bool = False) -> Outputs:
    """Prompts and answers of many windows: alike, alone, with choices, paused for a while, aborted."""
    shared = ids(1, 70)
    tiny.add("alike 1", shared + ids(2, 20), max_tokens=20)
    tiny.add("long", ids(3, 130), max_tokens=40)
    tiny.add("choices", ids(4, 49), max_tokens=30, n=3, temperature=0.9, top_k=20)
    outputs: Outputs = {}
    for _ in range(9):
        tiny.step(outputs)
    tiny.engine.pause("long")
    tiny.add("alike 2", shared + ids(6, 21), max_tokens=25)
    tiny.add("gone", shared + ids(7, 30), max_tokens=45)
    for i in range(12):
        tiny.step(outputs)
        if preempts and i % 5 == 0:
            scheduler = tiny.engine.parts.scheduler
            scheduler.preempt(scheduler.running[-1])
    tiny.engine.resume("long")
    tiny.engine.abort("gone")
    tiny.add("alike 1 again", shared + ids(2, 20), max_tokens=20)
    for key, more in tiny.run().items():
        outputs.setdefault(key, []).extend(more)
    return {key: tokens for key, tokens in outputs.items() if key[0] != "gone"}


def check_greedy(model: CausalLM, prompt: list[int], output: list[int]) -> None:
    """Each token is the likeliest one by a pass over the whole text."""
    logits = full_logits(model, prompt + output, "torch")[len(prompt) - 1 : -1]
    chosen = logits[range(len(output)), output]
    assert (logits.amax(1) - chosen).max() <= 1e-4 * logits.abs().max()


@pytest.fixture
def engines() -> Iterator[list[TinyEngine]]:
    opened: list[TinyEngine] = []
    yield opened
    for tiny in opened:
        tiny.close()


WINDOWED: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral 8": ("Mistral", {"sliding_window": 8}),
    "mistral 16": ("Mistral", {"sliding_window": 16}),
    "mistral 40": ("Mistral", {"sliding_window": 40}),
    "mistral 1": ("Mistral", {"sliding_window": 1}),
    "phi3": ("Phi3", {"sliding_window": 21}),
    "gemma2": ("Gemma2", {"head_dim": 16, "sliding_window": 12, "num_hidden_layers": 4}),
    "gemma3": (
        "Gemma3",
        {"head_dim": 16, "num_hidden_layers": 5, "sliding_window_pattern": 3, "sliding_window": 17},
    ),
    "qwen2": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 11, "max_window_layers": 2, "num_hidden_layers": 3},
    ),
}


# The quick ones: a model with one group of layers and two with several, natively and in plain torch.
QUICK = [("mistral 8", "auto"), ("gemma2", "auto"), ("mistral 8", "torch")]
ALL = [(name, backend) for name in WINDOWED for backend in ("auto", "torch")]


@pytest.mark.parametrize(
    ("name", "backend"),
    [*QUICK, *(pytest.param(*pair, marks=pytest.mark.nightly) for pair in ALL if pair not in QUICK)],
)
def test_outputs_are_those_of_an_engine_that_keeps_all(name: str, backend: str, engines: list[TinyEngine]) -> None:
    kind, changes = WINDOWED[name]
    model = model_of(kind, **changes)
    block_size = 32 if name == "mistral 40" else 16
    engines.append(TinyEngine(model, config_of(block_size, backend, prefix_cache_n=0), 200, gives_up=False))
    expected = load(engines[0])
    engines.append(TinyEngine(model, config_of(block_size, backend), 300))
    tiny = engines[1]
    assert load(tiny, preempts=True) == expected
    stats = tiny.engine.stats()
    assert stats.preemptions == 3
    assert stats.prefix_hits > 0
    assert tiny.finishes["alike 1 again", 0].usage.cached_tokens > 0
    assert stats.blocks_free == stats.blocks_total
    if backend == "auto":
        check_greedy(model, ids(3, 130), expected["long", 0])
        # So small that not all fit at once: admissions wait, and where the pool has groups that keep all, decodes too.
        num_all = sum(window.most_blocks(200) for window in tiny.windows)
        engines.append(TinyEngine(model, config_of(block_size, backend), num_all + 2))
        assert load(engines[2]) == expected


def test_a_request_that_is_longer_than_the_pool(mistral: CausalLM, engines: list[TinyEngine]) -> None:
    """64 tokens in the cache are enough for a window of 19 and its chunks: 200 go through."""
    engines.append(TinyEngine(mistral, config_of(prefix_cache_n=8), 4))
    tiny = engines[0]
    prompt = ids(8, 150)
    tiny.add("long", prompt, max_tokens=50)
    output = tiny.run()["long", 0]
    assert len(output) == 50
    check_greedy(mistral, prompt, output)
    with pytest.raises(ContextTooLong, match="the model's context holds 512"):
        tiny.add("too long", ids(8, 512))


def test_a_pool_that_is_smaller_than_the_window_limits_requests(mistral: CausalLM, engines: list[TinyEngine]) -> None:
    engines.append(TinyEngine(mistral, config_of(), 2))
    with pytest.raises(ContextTooLong, match="the KV cache holds 32"):
        engines[0].add("long", ids(8, 40))
    engines[0].add("fits", ids(8, 20), max_tokens=30)
    assert len(engines[0].run()["fits", 0]) == 12


def test_a_decode_holds_its_window_and_no_more(mistral: CausalLM, engines: list[TinyEngine]) -> None:
    engines.append(TinyEngine(mistral, config_of(), 30))
    tiny = engines[0]
    tiny.add("a", ids(9, 3), max_tokens=150)
    outputs: Outputs = {}
    most = 0
    while tiny.engine.has_requests:
        tiny.step(outputs)
        most = max(most, tiny.pool.num_total - tiny.pool.num_free)
    # 19 tokens lie in at most three blocks of 16, and the next token's block may be a further one.
    assert most <= 3


def test_a_prefix_is_found_by_the_blocks_of_its_last_window(mistral: CausalLM, engines: list[TinyEngine]) -> None:
    """The first blocks of the chain are used for something else; what follows is enough, and gives the same."""
    engines.append(TinyEngine(mistral, config_of(max_seqs=1), 12))
    tiny, prompt = engines[0], ids(10, 200)
    tiny.add("first", prompt, max_tokens=1)
    tiny.run()
    tiny.add("evicts", ids(11, 20), max_tokens=1)
    tiny.run()
    scheduler = tiny.engine.parts.scheduler
    hashes = tiny.pool.hasher.chain(b"", prompt, 16)
    # The root of a request's chain names its angles, of which there is one set here.
    assert tiny.pool.peek_tables(hashes[:1], (1,)).num_matched == 0
    assert tiny.pool.peek_tables(hashes, (2,)).num_matched == 12
    tiny.add("again", prompt + ids(12, 7), max_tokens=30)
    output = tiny.run()["again", 0]
    assert tiny.finishes["again", 0].usage.cached_tokens == 192
    assert (scheduler.prefix_lookups, scheduler.prefix_hits) == (3, 1)
    check_greedy(mistral, prompt + ids(12, 7), output)


def test_blocks_given_up_stay_in_the_prefix_cache(mistral: CausalLM, engines: list[TinyEngine]) -> None:
    """A shorter prompt finds blocks that a longer one has long left behind, although it counts as one prompt."""
    engines.append(TinyEngine(mistral, config_of(prefix_cache_n=1), 40))
    tiny, prompt = engines[0], ids(13, 200)
    tiny.add("long", prompt, max_tokens=30)
    tiny.run()
    tiny.add("short", prompt[:60] + ids(14, 9), max_tokens=20)
    output = tiny.run()["short", 0]
    assert tiny.finishes["short", 0].usage.cached_tokens == 48
    check_greedy(mistral, prompt[:60] + ids(14, 9), output)


def test_prompt_scores_with_blocks_given_up(mistral: CausalLM, engines: list[TinyEngine]) -> None:
    engines.append(TinyEngine(mistral, config_of(), 6))
    tiny, prompt = engines[0], ids(15, 250)
    chunks = tiny.engine.parts.collector.raw_logits["a"] = []
    tiny.add("a", prompt, max_tokens=1, prompt_logprobs=True)
    tiny.run()
    expected = full_logits(mistral, prompt)
    assert (torch.cat(chunks) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_request_that_is_computed_again_up_to_its_last_token(mistral: CausalLM, engines: list[TinyEngine]) -> None:
    """Chunks of 24 leave one token for a decode, whose blocks were taken while the window moved."""
    engines += [TinyEngine(mistral, config_of(), 40), TinyEngine(mistral, config_of(), 40)]
    plain, disturbed = engines
    for tiny in (plain, disturbed):
        for length in range(40, 46):
            tiny.add(f"r{length}", ids(length, length), max_tokens=20)
    expected, outputs, preempted = plain.run(), {}, set()
    scheduler = disturbed.engine.parts.scheduler
    while disturbed.engine.has_requests:
        disturbed.step(outputs)
        for request in [r for r in scheduler.running if r.num_tokens % 24 == 1 and r.num_output]:
            if request.request_id not in preempted:
                preempted.add(request.request_id)
                scheduler.preempt(request)
    assert len(preempted) == 6
    assert outputs == expected
