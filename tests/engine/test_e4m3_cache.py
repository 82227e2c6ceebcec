"""Keys and values in float8_e4m3fn, in plain torch: what the engine computes with it."""

from pathlib import Path

import pytest
import torch
from tiny_llama import Piece, TinyPool, full_logits, hf_llama, make_batch, our_llama, step_logits
from torch import Tensor

from serve_app.attention.device_batch import DeviceBatch
from serve_app.attention.slot_write import write_slots
from serve_app.attention.torch_backend import TorchAttention
from serve_app.engine.forward import TorchForward
from serve_app.engine.llm import LLM
from serve_app.errors import LaunchError
from serve_app.layers import torch_step
from serve_app.options import EngineConfig, SamplingParams

MODEL = str(Path(__file__).parents[1] / "data" / "models" / "stories260K" / "stories260K-F32.gguf")


def test_a_text_comes_out() -> None:
    with LLM(MODEL, dtype="f32", config=EngineConfig(block_size=16, pa_cache_type="f8e4m3")) as llm:
        kv = llm.engine.parts.kv
        assert kv.dtype == torch.float8_e4m3fn
        texts = llm.generate(["Once upon a time", "One day"], SamplingParams(temperature=0.0, max_tokens=24))
        assert all(len(text.token_ids) == 24 for text in texts)
        assert texts[0].text.startswith(",")


def rounded(x: Tensor, scale: float) -> Tensor:
    """Rounded to e4m3 on the way, by torch itself."""
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


def write_rounded(batch: DeviceBatch, layer: int, k: Tensor, v: Tensor) -> None:
    """Keeps float32, of keys and values that were rounded before. The scales are TinyPool's."""
    write_slots(batch, layer, rounded(k, 0.05), rounded(v, 0.02))


def test_logits_are_those_of_keys_and_values_rounded_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = our_llama(hf_llama())
    ids = list(range(60))
    pools = [TinyPool(model.args, 4, 16, dtype) for dtype in (torch.float8_e4m3fn, torch.float32)]
    rounding = TorchForward(model, pools[1], torch.device("cpu"), TorchAttention())
    for span in ((0, 40), (40, 41), (41, 60)):
        piece = Piece(ids, *span, range(4))
        ours = step_logits(model, pools[0], [piece], "torch")[0]
        with monkeypatch.context() as patch:
            patch.setattr(torch_step, "write_slots", write_rounded)
            theirs = torch.as_tensor(rounding(make_batch(pools[1], [piece])))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (ours - full_logits(model, ids)[41:]).abs().max() > 0.01


def test_the_native_kernels_refuse_it_by_name() -> None:
    config = EngineConfig(block_size=16, pa_cache_type="f8e4m3", attention_backend="cpu")
    with pytest.raises(LaunchError, match="'cpu' cannot run here: the KV cache is float8_e4m3fn"):
        LLM(MODEL, dtype="f32", config=config)
