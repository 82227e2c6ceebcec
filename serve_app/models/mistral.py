"""Mistral from SafeTensors: a Llama with a sliding window where the configuration has one. GGUF calls it a llama."""

from dataclasses import dataclass
from typing import Any

from serve_app.models.config_reader import ConfigReader
from serve_app.models.decoder_args import check_rotary, common_from_hf
from serve_app.models.llama import LlamaArgs, LlamaForCausalLM
from serve_app.models.rope_config import rope_from_hf
from serve_app.models.window_config import every_layer, windows_from_hf


@dataclass(frozen=True, slots=True, kw_only=True)
class MistralArgs(LlamaArgs):
    """See LlamaArgs."""

    @classmethod
    def from_hf(cls, config: dict[str, Any], file: str = "config.json") -> "MistralArgs":
        """See ModelArgs."""
        reader = ConfigReader(config, file)
        reader.choice("hidden_act", "silu", ("silu",))
        common = common_from_hf(reader)
        args = cls(
            **common,
            rope=rope_from_hf(reader, common["head_dim"]),
            windows=windows_from_hf(reader, common["n_layers"], every_layer),
            attention_bias=False,
            mlp_bias=False,
        )
        check_rotary(args, reader, "head_dim")
        return args


class MistralForCausalLM(LlamaForCausalLM):
    """See CausalLM."""
