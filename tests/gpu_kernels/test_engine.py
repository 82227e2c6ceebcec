"""The whole engine with Triton's attention, products and step: texts of a trained model, and logits of random ones."""

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from family_cases import CASES, hf_model, our_model
from tiny_llama import full_logits, hf_llama, our_llama

from kernels import dispatch
from kernels.gpu import attention_plan, dense_gemv, launch_shapes
from serve_app.engine.forward import TorchForward
from serve_app.engine.llm import LLM
from serve_app.layers.gpu_step import GpuStep
from serve_app.options import EngineConfig, SamplingParams
from tests.engine.tiny_engine import TinyEngine

FOLDER = Path(__file__).parents[1] / "data" / "models" / "stories260K"
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
CONFIG = EngineConfig(
    max_seqs=4, block_size=16, attention_backend="triton", prefix_cache_n=0, device=DEVICE, cuda_graphs=False
)
TOKENS = 24

Case = tuple[list[int], list[int]]


def golden() -> list[Case]:
    cases = json.loads((FOLDER / "golden_greedy.json").read_text())["cases"]
    return [(case["prompt_ids"], case.get("generated_ids") or case["greedy_ids"]) for case in cases]


def check(llm: LLM, cases: list[Case]) -> None:
    prompts = [prompt for prompt, _ in cases]
    sampling = [SamplingParams(temperature=0.0, max_tokens=len(ids)) for _, ids in cases]
    for result, (_, ids) in zip(llm.generate(prompts, sampling), cases, strict=True):
        assert result.token_ids == ids


def cut(case: Case, start: int, count: int) -> Case:
    """The case from some output token on, those before being prompt."""
    prompt, ids = case
    return prompt + ids[:start], ids[start : start + count]


def open_llm(config: EngineConfig = CONFIG) -> LLM:
    llm = LLM(str(FOLDER / "stories260K-F32.gguf"), dtype="f32", config=config)
    forward = llm.engine.parts.runner._forward  # type: ignore[attr-defined]
    assert isinstance(forward, TorchForward)
    assert forward._step_type is GpuStep
    return llm


@pytest.fixture(autouse=True)
def one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many parts as one core needs: the tests of the kernel cut contexts, and programs take their time when they are
    interpreted."""
    if DEVICE != "cpu":
        return
    for module in (attention_plan, dense_gemv, launch_shapes):
        monkeypatch.setattr(module, "num_cores", lambda device: 1)


@pytest.fixture(autouse=True, scope="module")
def triton_multiplies() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIROCCO_TRITON", "1")
        dispatch.native.cache_clear()
        yield
    dispatch.native.cache_clear()


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with open_llm() as llm:
        yield llm


def test_a_golden_text_alone_and_four_at_once(llm: LLM) -> None:
    cases = [cut(case, 0, TOKENS) for case in golden()]
    check(llm, cases[:1])
    four = (cases * 4)[:4]
    check(llm, [(prompt, ids[: TOKENS // (1 + i)]) for i, (prompt, ids) in enumerate(four)])


def test_a_prompt_in_chunks() -> None:
    case = max(golden(), key=lambda case: len(case[0]) + len(case[1]))
    config = replace(CONFIG, prefill_chunk_tokens=16, max_batched_tokens=16)
    with open_llm(config) as llm:
        check(llm, [cut(case, 40, 4)])


def test_a_preemption() -> None:
    """Two requests outgrow their first block, and the blocks are one too few for both."""
    cases = [cut(case, 12 - len(case[0]), 8) for case in golden()[:2]]
    blocks = [-(-(len(prompt) + len(ids) - 1) // 16) for prompt, ids in cases]
    config = replace(CONFIG, pool_tokens=16 * (sum(blocks) - 1))
    with open_llm(config) as llm:
        check(llm, cases)
        assert llm.engine.stats().preemptions > 0


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_keys_and_values_in_e4m3() -> None:
    """The text need not be the same, but Triton's and plain torch's are, token for token."""
    config = replace(CONFIG, pa_cache_type="f8e4m3")
    case = golden()[0]
    sampling = SamplingParams(temperature=0.0, max_tokens=8)
    with open_llm(config) as llm:
        assert llm.engine.parts.runner.kv_pool.dtype == torch.float8_e4m3fn  # type: ignore[attr-defined]
        ours = llm.generate([case[0]], sampling)[0].token_ids
    with LLM(
        str(FOLDER / "stories260K-F32.gguf"), dtype="f32", config=replace(config, attention_backend="torch")
    ) as llm:
        assert llm.generate([case[0]], sampling)[0].token_ids == ours


@pytest.mark.parametrize(
    ("changes", "length"),
    [
        ({"num_key_value_heads": 1, "head_dim": 20, "attention_bias": True}, 130),
        ({"num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 60, "tie_word_embeddings": True}, 33),
    ],
    ids=["one KV head", "tied, odd sizes"],
)
def test_logits_of_random_models_are_those_of_transformers(changes: dict[str, object], length: int) -> None:
    hf = hf_llama(**changes)
    ids = torch.randint(0, 97, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    ours = full_logits(our_llama(hf, device=DEVICE), ids, "triton", device=DEVICE).cpu()
    theirs = hf(torch.tensor([ids])).logits[0]
    assert (ours - theirs).abs().amax() <= 1e-4 * theirs.abs().max()


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        pytest.param("Mistral", {"sliding_window": 9}, id="one group", marks=pytest.mark.nightly),
        pytest.param("Gemma2", {"head_dim": 16, "sliding_window": 9}, id="two groups", marks=pytest.mark.nightly),
    ],
)
def test_windows_give_up_blocks(kind: str, changes: dict[str, object]) -> None:
    """A chunked prompt and a decode of several windows; blocks that nobody holds are NaN."""
    CASES["here"] = (kind, {"vocab_size": 512, **changes})
    model = our_model(hf_model("here"), DEVICE)
    config = replace(CONFIG, prefill_chunk_tokens=20, max_batched_tokens=20)
    tiny = TinyEngine(model, config, 8)
    prompt = torch.randint(3, 512, (45,), generator=torch.Generator().manual_seed(3)).tolist()
    tiny.add("a", prompt, max_tokens=8)
    output = tiny.run()["a", 0]
    assert len(output) == 8
    logits = full_logits(model, prompt + output, "torch", device=DEVICE)[len(prompt) - 1 : -1].cpu()
    assert (logits.amax(1) - logits[range(8), output]).max() <= 1e-4 * logits.abs().max()
    tiny.close()


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_all_golden_texts_at_length(llm: LLM) -> None:
    check(llm, golden())
