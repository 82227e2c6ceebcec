"""One forward a step, and no Python loop over requests below the engine."""

import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from tiny_llama import Piece, TinyPool, full_logits, hf_llama, make_batch, our_llama

import kernels
import serve_app
from serve_app.batch import ForwardBatch
from serve_app.engine.model_runner import ModelRunner, StepResult
from serve_app.engine.sampler import Sampler
from serve_app.layers.step import Rows, Step
from serve_app.models.llama import LlamaForCausalLM
from serve_app.options import DryParams, SamplingParams

PARAMS = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.8, top_p=0.9, logprobs=2),
    SamplingParams(frequency_penalty=0.5, logit_bias=((3, 1.0),), min_tokens=3),
    SamplingParams(top_k=10, dry=DryParams(multiplier=0.5)),
]


class CountingModel:
    """A model that counts its forwards."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.args = model.args
        self.model = model
        self.forwards = 0

    def forward(self, step: Step) -> Rows:
        self.forwards += 1
        return self.model.forward(step)

    def logits(self, hidden: Rows, step: Step) -> Rows:
        return self.model.logits(hidden, step)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return our_llama(hf_llama())


def runner_for(model: Any, requests: int) -> ModelRunner:
    sampler = Sampler(97, requests, eos_ids=[2])
    for row in range(requests):
        sampler.set_row(row, PARAMS[row % 4], row, [7] * 5)
    return ModelRunner(model, sampler, TinyPool(model.args, 2 * requests, 16), "cpu")


def pieces_for(requests: int, prefills: int) -> list[Piece]:
    """The first ones prefill 20 tokens, the others decode their 6th."""
    ids = [(i * 7) % 97 for i in range(20)]
    spans = [(0, 20) if r < prefills else (5, 6) for r in range(requests)]
    return [Piece(ids, a, b, [2 * r, 2 * r + 1]) for r, (a, b) in enumerate(spans)]


def fill_pool(runner: ModelRunner) -> None:
    for tensor in (*runner.kv_pool.k, *runner.kv_pool.v):
        tensor.normal_()


@pytest.mark.parametrize(("requests", "prefills"), [(1, 0), (1, 1), (8, 0), (12, 5)])
def test_a_step_runs_the_recorded_forward(model: LlamaForCausalLM, requests: int, prefills: int) -> None:
    counting = CountingModel(model)
    runner = runner_for(counting, requests)
    fill_pool(runner)
    batch = make_batch(runner.kv_pool, pieces_for(requests, prefills), rows=list(range(requests)))
    result = runner.execute(batch).wait()
    # Both before the step: what attention it needs was read off it, and the program recorded.
    assert counting.forwards == 2
    assert result.token_ids.shape == (requests,)


def lines_run(runner: ModelRunner, batch: ForwardBatch) -> Counter[str]:
    """How often Python ran a line of ours, by file, during a step."""
    roots = tuple(str(Path(package.__file__ or "").parent) for package in (serve_app, kernels))
    counts: Counter[str] = Counter()

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        name = frame.f_code.co_filename
        if not name.startswith(roots):
            return None
        if event == "line":
            counts[name] += 1
        return trace

    sys.settrace(trace)
    try:
        runner.execute(batch)
    finally:
        sys.settrace(None)
    return counts


@pytest.mark.parametrize("prefills", [0, 3])
def test_no_loop_over_requests_below_the_engine(model: LlamaForCausalLM, prefills: int) -> None:
    counts = []
    for requests in (8, 64):
        runner = runner_for(model, requests)
        fill_pool(runner)
        # Sampler state grows in the first step.
        for start in (0, 1):
            pieces = pieces_for(requests, prefills)
            batch = make_batch(runner.kv_pool, pieces, rows=list(range(requests)))
            if start:
                counts.append(lines_run(runner, batch))
            else:
                runner.execute(batch)
    files = {Path(name).parent.name for name in counts[0]}
    assert {"engine", "cpu"} <= files
    # A loop would run one line more, at least, for each of the 56 more requests; tables that grow run a few.
    more = {name: counts[1][name] - counts[0][name] for name in counts[1]}
    assert max(more.values()) < 28, more


def test_the_guard_sees_a_loop_over_requests(model: LlamaForCausalLM) -> None:
    """The plain attention loops when a prefill is in the batch: the count must show it."""
    counts = []
    for requests in (8, 64):
        runner = runner_for(model, requests)
        runner = ModelRunner(model, runner.sampler, runner.kv_pool, "cpu", "torch")
        fill_pool(runner)
        batch = make_batch(runner.kv_pool, pieces_for(requests, 1), rows=list(range(requests)))
        counts.append(lines_run(runner, batch).total())
    assert counts[1] > counts[0] + 56


def test_wanted_logits_come_back_and_the_sampled_ones_do_not(model: LlamaForCausalLM) -> None:
    ids = [(i * 5) % 97 for i in range(20)]
    expected = full_logits(model, ids)
    runner = runner_for(model, 1)
    batch = make_batch(runner.kv_pool, [Piece(ids, 0, 20, [1, 0])], rows=[0])
    batch.logit_index = torch.tensor([19, 4, 11])
    result: StepResult = runner.execute(batch).wait()
    assert result.token_ids.tolist() == [int(expected[19].argmax())]
    assert result.extra_logits is not None
    assert not result.extra_logits.is_inference()
    torch.testing.assert_close(result.extra_logits, expected[[4, 11]], rtol=1e-5, atol=1e-5)


def test_a_chunk_that_ends_no_prompt_wants_nothing(model: LlamaForCausalLM) -> None:
    runner = runner_for(model, 1)
    batch = make_batch(runner.kv_pool, [Piece([1] * 20, 0, 16, [1, 0])], rows=[])
    batch.logit_index = torch.tensor([], dtype=torch.int64)
    batch.sample_positions = torch.tensor([], dtype=torch.int64)
    result = runner.execute(batch).wait()
    assert result.token_ids.shape == (0,)
    assert result.logprobs is None
    assert result.extra_logits is None


def test_a_broken_batch_is_refused_and_the_next_one_works(model: LlamaForCausalLM) -> None:
    runner = runner_for(model, 1)
    broken = make_batch(runner.kv_pool, [Piece([1] * 5, 0, 5, [9])], rows=[0])
    with pytest.raises(IndexError):
        runner.execute(broken)
    fine = make_batch(runner.kv_pool, [Piece([1] * 5, 0, 5, [1])], rows=[0])
    expected = full_logits(model, [1] * 5)[-1].argmax()
    assert runner.execute(fine).wait().token_ids.tolist() == [int(expected)]
    assert isinstance(runner.execute(fine).wait().token_ids, np.ndarray)
