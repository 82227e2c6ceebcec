"""A whole engine that multiplies with Triton's kernels: the texts of trained models, plain and quantised."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kernels import dispatch
from serve_app.engine.llm import LLM
from serve_app.models.llama import LlamaForCausalLM
from serve_app.options import EngineConfig, SamplingParams
from serve_app.quant.planar_weight import PlanarWeight
from serve_app.quant.weight import DenseWeight
from tests.requantise import requantise

MODELS = Path(__file__).parents[1] / "data" / "models"


@pytest.fixture
def triton_multiplies(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SIROCCO_TRITON", "1")
    dispatch.native.cache_clear()
    yield
    monkeypatch.undo()
    dispatch.native.cache_clear()


def open_llm(path: Path, device: torch.device) -> LLM:
    return LLM(
        str(path), dtype="f32", config=EngineConfig(max_seqs=4, block_size=16, device=str(device), cuda_graphs=False)
    )


def texts(llm: LLM, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    return [result.token_ids for result in llm.generate(prompts, [sampling] * len(prompts))]


def matrices(llm: LLM) -> set[type]:
    model = llm.engine.parts.runner._forward._model  # type: ignore[attr-defined]
    assert isinstance(model, LlamaForCausalLM)
    return {type(model.head.weight), type(model.embedding.weight)}


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_a_golden_text_of_plain_weights(triton_multiplies: None, device: torch.device) -> None:
    folder = MODELS / "stories260K"
    cases = json.loads((folder / "golden_greedy.json").read_text())["cases"]
    expected = [(case.get("generated_ids") or case["greedy_ids"])[:12] for case in cases[:2]]
    with open_llm(folder / "stories260K-F32.gguf", device) as llm:
        assert matrices(llm) == {DenseWeight}
        assert texts(llm, [case["prompt_ids"] for case in cases[:2]], 12) == expected


@pytest.mark.parametrize(
    ("name", "num_tokens"),
    [pytest.param("Q8_0", 3, marks=pytest.mark.nightly), pytest.param("Q5_K", 8, marks=pytest.mark.nightly)],
)
def test_quantised_weights_give_the_text_of_their_decoded_numbers(
    name: str,
    num_tokens: int,
    tmp_path: Path,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    triton_multiplies: None,
) -> None:
    source = MODELS / "stories3M" / "stories3M-F32.gguf"
    requantise(source, tmp_path / "quantised.gguf", name)
    prompts = [[1, 403, 407], [1, 500]]
    with open_llm(tmp_path / "quantised.gguf", device) as llm:
        assert matrices(llm) == {PlanarWeight}
        found = texts(llm, prompts, num_tokens)
    monkeypatch.setenv("SIROCCO_TRITON", "0")
    monkeypatch.setenv("SIROCCO_NATIVE", "0")
    dispatch.native.cache_clear()
    with open_llm(tmp_path / "quantised.gguf", device) as llm:
        assert PlanarWeight not in matrices(llm)
        assert texts(llm, prompts, num_tokens) == found
