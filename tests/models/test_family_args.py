"""What each family reads of its configuration beyond the common facts, in both formats, and what it refuses."""

from typing import Any

import pytest

from serve_app.errors import ModelFileError
from serve_app.models.gemma2 import Gemma2Args
from serve_app.models.gemma3 import Gemma3Args
from serve_app.models.phi3 import Phi3Args
from serve_app.models.qwen2 import Qwen2Args
from serve_app.models.qwen3_moe import Qwen3MoeArgs
from serve_app.models.starcoder2 import Starcoder2Args

HF: dict[str, Any] = {
    "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 4,
    "intermediate_size": 96, "vocab_size": 100, "max_position_embeddings": 512,
}  # fmt: skip


def gguf(name: str, *, eps: str = "layer_norm_rms_epsilon", layers: int = 4, **more: Any) -> dict[str, Any]:
    common = {
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 16, "embedding_length": 64,
        "block_count": layers, "feed_forward_length": 96, "vocab_size": 100, "context_length": 512,
        f"attention.{eps}": 1e-6,
    }  # fmt: skip
    return {f"{name}.{key}": value for key, value in (common | more).items()}


def test_gemma_2_knows_what_a_silent_file_means() -> None:
    silent = Gemma2Args.from_hf(HF)
    assert (silent.attn_logit_softcapping, silent.final_logit_softcapping) == (50.0, 30.0)
    assert silent.windows == (4096, 0, 4096, 0)
    null = dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "sliding_window"))
    none = Gemma2Args.from_hf(HF | null)
    assert (none.attn_logit_softcapping, none.final_logit_softcapping, none.windows) == (0.0, 0.0, ())


def test_gemma_2_in_gguf() -> None:
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    none = Gemma2Args.from_gguf(gguf("gemma2", **caps, **{"attention.sliding_window": 0}))
    assert none.windows == ()
    args = Gemma2Args.from_gguf(gguf("gemma2", **caps, **{"attention.sliding_window": 7}))
    assert (args.attn_logit_softcapping, args.final_logit_softcapping) == (50.0, 30.0)
    assert (args.windows, args.query_pre_attn_scalar) == ((7, 0, 7, 0), 16)
    largest = Gemma2Args.from_gguf(gguf("gemma2", layers=46, **{"attention.key_length": 32}))
    assert largest.query_pre_attn_scalar == 64 / 4


def test_gemma_3_in_gguf() -> None:
    keys = {
        "attention.sliding_window": 9, "attention.sliding_window_pattern": 2, "rope.freq_base": 1e6,
        "rope.freq_base_swa": 5000.0, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0,
        "final_logit_softcapping": 20.0,
    }  # fmt: skip
    args = Gemma3Args.from_gguf(gguf("gemma3", **keys))
    assert args.windows == (9, 0, 9, 0)
    assert (args.rope.theta, args.rope.scaling.kind, args.rope.scaling.factor) == (1e6, "linear", 8.0)
    assert (args.local_rope.theta, args.local_rope.scaling.kind) == (5000.0, "default")
    assert (args.final_logit_softcapping, args.query_pre_attn_scalar) == (20.0, 16)
    assert Gemma3Args.from_gguf(gguf("gemma3", layers=62)).query_pre_attn_scalar == 16
    assert Gemma3Args.from_gguf(gguf("gemma3", layers=62, **{"attention.key_length": 32})).query_pre_attn_scalar == 16


def test_windows_of_other_families() -> None:
    window = {"attention.sliding_window": 11}
    starcoder = gguf("starcoder2", eps="layer_norm_epsilon", **window)
    assert Starcoder2Args.from_gguf(starcoder).windows == (11,) * 4
    assert Starcoder2Args.from_gguf(starcoder | {"starcoder2.attention.sliding_window": 0}).windows == ()
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "sliding_window": 5}
    assert Qwen3MoeArgs.from_hf(HF | experts).windows == ()
    assert Qwen3MoeArgs.from_hf(HF | experts | {"use_sliding_window": True}).windows == (5,) * 4
    qwen = HF | {"use_sliding_window": True, "sliding_window": 5}
    assert Qwen2Args.from_hf(qwen | {"max_window_layers": 0}).windows == (5,) * 4
    assert Qwen2Args.from_hf(qwen | {"max_window_layers": 3}).windows == (0, 0, 0, 5)


@pytest.mark.parametrize(
    ("family", "changes", "sentence"),
    [
        (Qwen2Args, {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": "3"}, "'max_window_layers'"),
        (Gemma2Args, {"layer_types": ["sliding_attention"] * 3}, "'layer_types' does not name"),
        (Gemma2Args, {"layer_types": ["attention"] * 4}, "'layer_types' does not name"),
        (Gemma2Args, {"sliding_window": -4}, "'sliding_window' is -4"),
        (
            Phi3Args,
            {
                "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0]},
                "original_max_position_embeddings": 64,
            },
            "'long_factor' has 1 numbers, the heads need 8",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(family: Any, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ModelFileError, match=sentence):
        family.from_hf(HF | changes)
