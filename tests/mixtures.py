"""Random mixtures of experts with transformers as their oracle, saved as their published checkpoints are."""

from pathlib import Path
from typing import Any

import gguf
import torch
import transformers
from safetensors.torch import load_file
from tiny_llama import SMALL as TINY
from torch import Tensor

from serve_app.gguf_file import open_gguf
from serve_app.loaders.checkpoint import Checkpoint
from serve_app.loaders.gguf import GgufCheckpoint
from serve_app.loaders.weight_source import CheckpointSource
from serve_app.models.registry import find_family, gguf_architecture

SMALL = TINY | {"pad_token_id": 0}
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "mixtral": (
        transformers.MixtralConfig,
        transformers.MixtralForCausalLM,
        {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "qwen2moe": (
        transformers.Qwen2MoeConfig,
        transformers.Qwen2MoeForCausalLM,
        {
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 40,
            "shared_expert_intermediate_size": 56,
        },
    ),
    "qwen3moe": (
        transformers.Qwen3MoeConfig,
        transformers.Qwen3MoeForCausalLM,
        {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 40,
            "head_dim": 16,
            "norm_topk_prob": True,
        },
    ),
    "phimoe": (
        transformers.PhimoeConfig,
        transformers.PhimoeForCausalLM,
        {"num_local_experts": 5, "attention_bias": True, "lm_head_bias": True, "router_jitter_noise": 0.2},
    ),
}


def hf_mixture(family: str, seed: int = 0, **changes: Any) -> Any:
    """A random transformers model in float32, its logits spread like a trained one's."""
    torch.manual_seed(seed)
    make_config, make_model, own = FAMILIES[family]
    config = make_config(**(SMALL | own | changes), initializer_range=0.2)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = make_model(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            parameter.uniform_(0.5, 1.5)
        elif name.endswith(".bias"):
            parameter.normal_(std=0.3)
        elif name.endswith((".gate.weight", ".router.weight")):
            parameter.normal_(std=0.2)
    return model


def saved(model: Any, folder: Path) -> dict[str, Tensor]:
    """The tensors by the names of the published checkpoints, as transformers writes them."""
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def write_gguf(path: Path, family: str, config: Any, tensors: dict[str, Tensor], *, is_old: bool = False) -> Path:
    """The model in llama.cpp's layout; names are those of the gguf package. is_old: a tensor for each expert."""
    name = "llama" if family == "mixtral" else family
    writer = gguf.GGUFWriter(path, name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    num_experts = getattr(config, "num_local_experts", None) or config.num_experts
    writer.add_expert_count(num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    if hasattr(config, "moe_intermediate_size"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if hasattr(config, "shared_expert_intermediate_size"):
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    scaling = config.rope_parameters
    if scaling["rope_type"] == "longrope":
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
        writer.add_rope_scaling_attn_factors(scaling["long_mscale"])
        for kind in ("long", "short"):
            writer.add_tensor(f"rope_factors_{kind}.weight", torch.tensor(scaling[f"{kind}_factor"]).numpy())
    arch = next(key for key, text in gguf.MODEL_ARCH_NAMES.items() if text == name)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    stacked: dict[str, list[Tensor]] = {}
    for hf_name in sorted(tensors, key=lambda n: [int(p) if p.isdigit() else -1 for p in n.split(".")]):
        tensor = tensors[hf_name].float()
        stem, kind = hf_name.rsplit(".", 1)
        if family == "mixtral" and stem.endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads if stem.endswith("q_proj") else config.num_key_value_heads
            tensor = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        parts = stem.split(".")
        if "experts" in parts:
            number = parts.index("experts") + 1
            merged = ".".join(parts[:number] + parts[number + 1 :])
            merged = (
                merged.replace("model.layers", "layers").replace("block_sparse_moe", "feed_forward")
                if (family == "mixtral")
                else merged
            )
            whole = names.get_name(merged)
            assert whole is not None, merged
            if is_old:
                one = f"{whole.removesuffix('_exps')}.{parts[number]}.weight"
                writer.add_tensor(one, tensor.contiguous().numpy())
            else:
                stacked.setdefault(f"{whole}.weight", []).append(tensor)
            continue
        new_name = names.get_name(stem)
        assert new_name is not None, stem
        if stem.endswith("shared_expert_gate"):
            tensor = tensor[0]
        writer.add_tensor(f"{new_name}.{kind}", tensor.contiguous().numpy())
    for new_name, experts in stacked.items():
        writer.add_tensor(new_name, torch.stack(experts).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def from_gguf(path: Path) -> Any:
    """Our model over a GGUF file, exact."""
    file = open_gguf([path])
    family = find_family(gguf_architecture(file.metadata), str(path))
    return family.build(family.args.from_gguf(file.metadata), source(GgufCheckpoint(file)))


def source(checkpoint: Checkpoint) -> CheckpointSource:
    """Exact weights of a checkpoint on the CPU."""
    return CheckpointSource(checkpoint, torch.float32, torch.device("cpu"), is_exact=True)


def our_model(hf: Any, weights: Any) -> Any:
    """Our model with the configuration of a transformers one."""
    family = find_family(type(hf).__name__, "config.json")
    return family.build(family.args.from_hf(hf.config.to_dict()), weights)
