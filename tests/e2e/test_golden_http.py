"""Greedy texts of trained models over HTTP, by the official client, equal to what other software computed.

Two servers a model file: one as it starts by default, and one that computes prompts in chunks of 16 tokens in a pool so
small that requests are preempted. The ids behind the texts are compared in tests/engine/test_golden_texts.py too, in
more ways to compute them.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from serve_app.text.tokenizer import open_tokenizer
from tests.server_process import Server

MODELS = Path(__file__).parents[1] / "data" / "models"
TIGHT = ["--prefill-chunk-tokens", "16", "--max-batched-tokens", "64", "--pa-blk-size", "16", "--pa-ctxt-len", "640"]
SOURCES = [
    ("stories260K", "stories260K-F32.gguf"),
    ("stories260K", "stories260K-F16.gguf"),
    ("stories260K", "hf"),
    ("stories3M", "stories3M-F32.gguf"),
    ("stories3M", "hf"),
]
pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


class Case:
    """A prompt and its greedy continuation, as ids and as text."""

    def __init__(self, model: str, case: dict[str, list[int]]) -> None:
        self.prompt_ids = case["prompt_ids"]
        self.output_ids = case.get("generated_ids") or case["greedy_ids"]
        tokenizer = open_tokenizer(MODELS / model / "hf")
        before = tokenizer.decode(self.prompt_ids)
        self.text = tokenizer.decode(self.prompt_ids + self.output_ids)[len(before) :]

    def ask(self, client: openai.OpenAI, stream: bool, prefix: int = 0) -> None:
        """Checks the continuation after the prompt and the first `prefix` output tokens."""
        prompt = self.prompt_ids + self.output_ids[:prefix]
        wanted = self.output_ids[prefix:]
        options = {"model": "default", "prompt": prompt, "max_tokens": len(wanted), "temperature": 0, "logprobs": 0}
        if stream:
            options |= {"stream": True, "stream_options": {"include_usage": True}}
            chunks = list(client.completions.create(**options))  # type: ignore[call-overload]
            usage = chunks[-1].usage
            choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
        else:
            answer = client.completions.create(**options)  # type: ignore[call-overload]
            usage, choices = answer.usage, answer.choices
        text = "".join(choice.text for choice in choices)
        assert usage.completion_tokens == len(wanted)
        assert sum(len(choice.logprobs.tokens) for choice in choices if choice.logprobs) == len(wanted)
        assert choices[-1].finish_reason == ("stop" if wanted[-1] == 1 else "length")
        assert self.text.endswith(text)
        assert prefix or text == self.text


def cases(model: str) -> list[Case]:
    listed = json.loads((MODELS / model / "golden_greedy.json").read_text())["cases"]
    return [Case(model, case) for case in listed]


def check(server: Server, model: str) -> None:
    client = server.client()
    found = cases(model)
    for case in found:
        for stream in (False, True):
            case.ask(client, stream)
    # Long prompts: something to chunk, and blocks to find again.
    long = [case for case in found if len(case.output_ids) > 150]
    for case in long * 2:
        case.ask(client, stream=True, prefix=100)
    with ThreadPoolExecutor(32) as pool:
        waiting = [pool.submit(found[i % len(found)].ask, client, bool(i % 2)) for i in range(32)]
        waiting += [pool.submit(case.ask, client, False, 100) for case in long]
        for future in waiting:
            future.result()
    assert server.metric("sirocco_prefix_cache_hits_total") > 0
    server.until("sirocco_kv_blocks_used", 0.0)


def serve(model: str, file: str, *options: str) -> Iterator[Server]:
    server = Server("--dtype", "f32", *options, "run", "-m", str(MODELS / model / file))
    try:
        yield server.wait()
        assert server.end() == 0
    finally:
        server.kill()


def check_default(model: str, file: str) -> None:
    for server in serve(model, file):
        check(server, model)


def check_tight(model: str, file: str) -> None:
    for server in serve(model, file, *TIGHT):
        check(server, model)
        assert server.metric("sirocco_preemptions_total") > 0


def test_a_folder_as_served_by_default() -> None:
    check_default("stories260K", "hf")


def test_a_gguf_in_chunks_and_preempted() -> None:
    check_tight("stories3M", "stories3M-F32.gguf")


@pytest.mark.nightly
@pytest.mark.parametrize(("model", "file"), SOURCES)
def test_every_file_both_ways(model: str, file: str) -> None:
    check_default(model, file)
    check_tight(model, file)
