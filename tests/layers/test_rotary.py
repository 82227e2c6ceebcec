import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from serve_app.layers.rope_scaling import RopeScaling, inverse_frequencies

LLAMA31 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_frequencies_are_those_of_transformers() -> None:
    config = LlamaConfig(head_dim=128, rope_parameters=LLAMA31, max_position_embeddings=131072)
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    torch.testing.assert_close(inverse_frequencies(128, 5e5, RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)), expected)


def test_linear_scaling_stretches_every_frequency() -> None:
    plain = inverse_frequencies(64, 1e4, RopeScaling())
    torch.testing.assert_close(inverse_frequencies(64, 1e4, RopeScaling("linear", 4.0)), plain / 4)
