"""Decode steps filled up to their bucket: the same logits, and nothing written where nothing belongs.

On a GPU they are recorded as graphs; in the interpreter a recording is run again as it is, on the same inputs.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from family_cases import hf_model, our_model

from serve_app.attention.torch_backend import TorchAttention
from serve_app.attention.triton_backend import TritonAttention
from serve_app.batch import ForwardBatch, GroupTables
from serve_app.engine import graph_forward
from serve_app.engine.forward import TorchForward
from serve_app.engine.graph_forward import (
    CudaRecorder,
    GraphForward,
    GraphLimits,
    Recorder,
    request_buckets,
    table_widths,
)
from serve_app.engine.llm import LLM
from serve_app.kv_cache.kv_pool import KvPool
from serve_app.options import EngineConfig, SamplingParams

FOLDER = Path(__file__).parents[1] / "data" / "models" / "stories260K"


class Rerun:
    """See Recorder."""

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        run()
        return run


class Broken:
    """See Recorder: records only so many times."""

    def __init__(self, times: int) -> None:
        self._times = times

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        self._times -= 1
        if self._times < 0:
            raise RuntimeError("operation not permitted when stream is capturing")
        return Rerun().record(run)


def decode(contexts: list[int], block_size: int = 16) -> ForwardBatch:
    """A decode behind contexts, the token included; requests have blocks of their own, in falling order."""
    count = len(contexts)
    width = -(-max(contexts) // block_size)
    tables = np.arange(count * width, dtype=np.int32)[::-1].reshape(count, width).copy()
    last = np.array(contexts) - 1
    return ForwardBatch(
        token_ids=np.arange(count) + 5,
        positions=last.astype(np.int64),
        slot_mapping=tables[np.arange(count), last // block_size].astype(np.int64) * block_size + last % block_size,
        block_tables=tables,
        query_start=np.arange(count + 1, dtype=np.int32),
        context_lens=np.array(contexts, np.int32),
        logit_index=np.arange(count),
        sample_rows=np.arange(count),
        sample_positions=last + 1,
        max_query_len=1,
        max_context_len=max(contexts),
    )


@pytest.fixture(scope="module")
def llm(device: torch.device) -> Iterator[LLM]:
    config = EngineConfig(
        max_seqs=4, block_size=16, attention_backend="triton", pool_tokens=512, device=device.type, cuda_graphs=False
    )
    with LLM(str(FOLDER / "stories260K-F32.gguf"), dtype="f32", config=config) as made:
        yield made


def eager_of(llm: LLM) -> TorchForward:
    forward = llm.engine.parts.runner._forward  # type: ignore[attr-defined]
    assert isinstance(forward, TorchForward)
    return forward


def graphs_of(llm: LLM, device: torch.device, recorder: Recorder | None = None, max_context: int = 64) -> GraphForward:
    eager = eager_of(llm)
    by = recorder or (CudaRecorder(device) if device.type == "cuda" else Rerun())
    vocab_size = llm.tokenizer.vocab_size
    return GraphForward(eager.run, eager, llm.engine.parts.kv, vocab_size, GraphLimits(4, max_context), by)


@pytest.fixture(scope="module")
def graphs(llm: LLM, device: torch.device) -> GraphForward:
    return graphs_of(llm, device)


def test_logits_and_caches_are_those_of_the_step_alone(llm: LLM, graphs: GraphForward, device: torch.device) -> None:
    eager, kv = eager_of(llm), llm.engine.parts.kv
    for tensor in (*kv.k, *kv.v):
        tensor.normal_(generator=torch.Generator(device).manual_seed(1))
    begin = [tensor.clone() for tensor in (*kv.k, *kv.v)]
    # The larger step first: the smaller one must not see what it left in the inputs.
    for contexts in ([20, 3, 33], [7], [1, 40]):
        batch = decode(contexts)
        logits = graphs(batch).clone()
        after = [tensor.clone() for tensor in (*kv.k, *kv.v)]
        for tensor, value in zip((*kv.k, *kv.v), begin, strict=True):
            tensor.copy_(value)
        right = eager(batch)
        torch.testing.assert_close(logits, right, rtol=1e-5, atol=1e-5)
        for tensor, value, old in zip((*kv.k, *kv.v), after, begin, strict=True):
            torch.testing.assert_close(value, tensor, rtol=1e-5, atol=1e-5)
            assert (value != old).any()
            tensor.copy_(old)


def of_two_groups(contexts: list[int], window: int, nobodys: int) -> ForwardBatch:
    """A decode whose first group has given up what is before its window: nobody's block stands there."""
    batch = decode(contexts)
    num_blocks = batch.block_tables.size
    further = GroupTables(batch.slot_mapping + num_blocks * 16, batch.block_tables + num_blocks)
    for table, context in zip(batch.block_tables, contexts, strict=True):
        table[: max(0, context - window) // 16] = nobodys
    return replace(batch, further_groups=(further,))


def test_every_group_of_layers_has_its_tables(device: torch.device) -> None:
    """A windowed layer and one without over the same memory, as plain torch computes them; nobody's block is NaN."""
    model = our_model(hf_model("gemma2, short window"), str(device))
    args = model.args
    assert args.windows == (8, 0)
    kv = KvPool.on_device(device, 19, 16, 1, args.n_kv_heads, args.head_dim, torch.float32, [[0], [1]])
    eager, plain = (TorchForward(model, kv, device, by) for by in (TritonAttention(), TorchAttention()))
    recorder = CudaRecorder(device) if device.type == "cuda" else Rerun()
    graphs = GraphForward(eager.run, eager, kv, args.vocab_size, GraphLimits(4, 48), recorder)
    caches = (kv.k[0], kv.v[0])
    begin = [torch.randn(cache.shape, generator=torch.Generator().manual_seed(1)) for cache in caches]
    for contexts in ([40, 20, 5], [33]):
        batch = of_two_groups(contexts, 8, 18)
        after = []
        for forward in (graphs, plain):
            for cache, value in zip(caches, begin, strict=True):
                cache.copy_(value)
                cache[18] = torch.nan
            logits = forward(batch).clone()
            after.append([logits, *(cache[:18].clone() for cache in caches)])
        for ours, right in zip(*after, strict=True):
            torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-4)


def test_other_steps_run_as_they_are(graphs: GraphForward, monkeypatch: pytest.MonkeyPatch) -> None:
    eager_runs: list[ForwardBatch] = []
    monkeypatch.setattr(graphs, "_run_eagerly", lambda batch: eager_runs.append(batch) or torch.zeros(1))
    too_long, too_many = decode([65]), decode([2] * 5)
    prefill = replace(decode([8, 4]), max_query_len=2, query_start=np.array([0, 2, 3], np.int32))
    prefill = replace(prefill, token_ids=np.arange(3), positions=np.array([6, 7, 3]))
    for batch in (too_long, too_many, prefill):
        graphs(batch)
    assert eager_runs == [too_long, too_many, prefill]
    graphs(decode([64]))
    assert len(eager_runs) == 3


def test_an_engine_without_capture_goes_on(llm: LLM, device: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    graphs = graphs_of(llm, device, Broken(0))
    assert "(RuntimeError: operation not permitted" in caplog.text
    assert "CUDA graphs are not used" in caplog.text
    batch = decode([3])
    assert torch.equal(graphs(batch), eager_of(llm)(batch))
    assert graphs.num_graphs == 0


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_one_graph_that_fails_leaves_the_others(
    llm: LLM, device: torch.device, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The longest, and the three shortest, are recorded at the start; one in between fails when a step needs it."""
    monkeypatch.setattr(graph_forward, "SHORTEST_CONTEXT", 16)
    graphs = graphs_of(llm, device, Broken(4), max_context=256)
    assert graphs.num_graphs == 4
    between, short = decode([40]), decode([5])
    for _ in range(2):
        assert torch.equal(graphs(between), eager_of(llm)(between))
    assert caplog.text.count("no CUDA graph for 1 requests of 64 tokens") == 1
    monkeypatch.setattr(graphs, "_run_eagerly", None)
    assert graphs(short).shape == (1, llm.tokenizer.vocab_size)


@pytest.mark.gpu
def test_an_engine_on_a_gpu_runs_graphs() -> None:
    case = json.loads((FOLDER / "golden_greedy.json").read_text())["cases"][0]
    ids = case.get("generated_ids") or case["greedy_ids"]
    with LLM(str(FOLDER / "stories260K-F32.gguf"), dtype="f32", config=EngineConfig(device="cuda")) as llm:
        forward = llm.engine.parts.runner._forward  # type: ignore[attr-defined]
        assert isinstance(forward, GraphForward)
        assert forward.num_graphs > 1
        [result] = llm.generate(case["prompt_ids"], SamplingParams(temperature=0.0, max_tokens=len(ids)))
    assert result.token_ids == ids


def test_a_golden_text_through_graphs(llm: LLM, graphs: GraphForward, monkeypatch: pytest.MonkeyPatch) -> None:
    case = json.loads((FOLDER / "golden_greedy.json").read_text())["cases"][0]
    ids = (case.get("generated_ids") or case["greedy_ids"])[:6]
    monkeypatch.setattr(llm.engine.parts.runner, "_forward", graphs)
    [result] = llm.generate(case["prompt_ids"], SamplingParams(temperature=0.0, max_tokens=len(ids)))
    assert result.token_ids == ids


def test_buckets() -> None:
    assert request_buckets(1) == [1]
    assert request_buckets(20) == [1, 2, 4, 8, 16, 20]
    assert request_buckets(100) == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 96, 100]
    assert table_widths(100, 16) == [7]
    assert table_widths(2048, 32) == [64]
    assert table_widths(131072, 32) == [64, 256, 1024, 4096]
    assert graph_forward.SHORTEST_CONTEXT == 2048
