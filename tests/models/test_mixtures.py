"""Mixtures of experts against transformers, against themselves however a prompt is cut, and from both formats."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from mixtures import from_gguf, hf_mixture, our_model, saved, source, write_gguf
from safetensors.torch import save_file
from tiny_llama import DictSource, Piece, TinyPool, full_logits, step_logits
from torch import Tensor

from serve_app.errors import ModelFileError
from serve_app.loaders.safetensors import SafetensorsCheckpoint
from serve_app.models.registry import find_family

SHORT = [1.0 + 0.1 * i for i in range(6)]
LONG = [1.0 + 1.5 * i for i in range(6)]
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": SHORT,
    "long_factor": LONG,
    "short_mscale": 1.19,
    "long_mscale": 1.19,
    "original_max_position_embeddings": 64,
    "factor": 4.0,
}
ODD = {"vocab_size": 53, "hidden_size": 36, "intermediate_size": 41, "num_attention_heads": 6, "num_key_value_heads": 6}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {}),
    "mixtral, window shorter than the prompt": ("mixtral", {"sliding_window": 9}),
    "mixtral, tied, one expert a token": ("mixtral", {"num_experts_per_tok": 1, "tie_word_embeddings": True}),
    "mixtral, all experts, odd sizes": ("mixtral", ODD | {"num_experts_per_tok": 5, "sliding_window": 4000}),
    "qwen2moe": ("qwen2moe", {}),
    "qwen2moe, renormalised": ("qwen2moe", {"norm_topk_prob": True, "num_experts_per_tok": 2}),
    "qwen2moe, dense layers between": ("qwen2moe", {"num_hidden_layers": 4, "decoder_sparse_step": 2}),
    "qwen2moe, windows, no bias": (
        "qwen2moe",
        {"use_sliding_window": True, "sliding_window": 11, "max_window_layers": 2, "qkv_bias": False},
    ),
    "qwen2moe, odd sizes": ("qwen2moe", ODD | {"moe_intermediate_size": 21, "shared_expert_intermediate_size": 19}),
    "qwen3moe": ("qwen3moe", {}),
    "qwen3moe, factors as they are": ("qwen3moe", {"norm_topk_prob": False}),
    "qwen3moe, dense first, tied": ("qwen3moe", {"mlp_only_layers": [0], "tie_word_embeddings": True}),
    "qwen3moe, biases, many experts": (
        "qwen3moe",
        {"attention_bias": True, "num_experts": 40, "num_experts_per_tok": 8, "moe_intermediate_size": 16},
    ),
    "qwen3moe, odd sizes": ("qwen3moe", ODD | {"moe_intermediate_size": 17, "head_dim": 10}),
    "phimoe": ("phimoe", {}),
    "phimoe, published jitter, no biases": (
        "phimoe",
        {"router_jitter_noise": 0.01, "attention_bias": False, "lm_head_bias": False},
    ),
    "phimoe, window": ("phimoe", {"sliding_window": 9}),
    "phimoe, longrope within the original length": (
        "phimoe",
        {"rope_parameters": LONGROPE, "max_position_embeddings": 64},
    ),
    "phimoe, odd sizes": ("phimoe", ODD | {"num_local_experts": 2}),
}


def random_ids(count: int, vocab_size: int, seed: int = 1) -> list[int]:
    return torch.randint(0, vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    family, changes = CONFIGS[name]
    hf = hf_mixture(family, **changes)
    model = our_model(hf, DictSource(saved(hf, tmp_path)))
    for length in (1, 50):
        ids = random_ids(length, hf.config.vocab_size)
        theirs = hf(torch.tensor([ids])).logits[0]
        for backend in ("cpu", "torch"):
            assert close(full_logits(model, ids, backend), theirs, 1e-4)


def test_beyond_the_original_length_the_long_factors_hold(tmp_path: Path) -> None:
    # This version of transformers takes the short factors at every length: it is given the long ones as such.
    long = LONGROPE | {"original_max_position_embeddings": 16, "long_mscale": 1.3}
    hf = hf_mixture("phimoe", rope_parameters=long | {"short_factor": LONG}, max_position_embeddings=256)
    weights = DictSource(saved(hf, tmp_path))
    ids = random_ids(70, hf.config.vocab_size)
    theirs = hf(torch.tensor([ids])).logits[0]
    hf.config.rope_parameters = long
    model = our_model(hf, weights)
    hf.config.rope_parameters = long | {"long_factor": SHORT}
    other = our_model(hf, weights)
    for backend in ("cpu", "torch"):
        assert close(full_logits(model, ids, backend), theirs, 1e-4)
        assert not close(full_logits(other, ids, backend), theirs, 1e-2)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("family", ["mixtral", "qwen2moe", "qwen3moe", "phimoe"])
def test_chunks_decodes_and_batches_give_the_logits_of_one_pass(family: str, backend: str, tmp_path: Path) -> None:
    hf = hf_mixture(family)
    model = our_model(hf, DictSource(saved(hf, tmp_path)))
    lengths = [45, 1, 90, 33]
    prompts = [random_ids(n, 97, seed=n) for n in lengths]
    chooser = random.Random(4)
    free = chooser.sample(range(40), 40)
    tables = [[free.pop() for _ in range(-(-n // 16))] for n in lengths]
    pool = TinyPool(model.args, 40, 16)
    got: list[list[Tensor]] = [[] for _ in lengths]
    done = [0] * len(lengths)
    while any(d < n for d, n in zip(done, lengths, strict=True)):
        active = [r for r in range(len(lengths)) if done[r] < lengths[r] and chooser.random() < 0.8]
        if not active:
            continue
        stops = {r: min(lengths[r], done[r] + chooser.choice([1, 1, 16, 40])) for r in active}
        pieces = [Piece(prompts[r], done[r], stops[r], tables[r]) for r in active]
        for r, logits in zip(active, step_logits(model, pool, pieces, backend), strict=True):
            got[r].append(logits)
            done[r] = stops[r]
    for prompt, parts in zip(prompts, got, strict=True):
        whole = full_logits(model, prompt, backend)
        assert close(torch.cat(parts), whole)
        if backend == "cpu":
            assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("is_old", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "mixtral",
        "mixtral, tied, one expert a token",
        "mixtral, all experts, odd sizes",
        "qwen2moe",
        "qwen2moe, odd sizes",
        "qwen3moe",
        "qwen3moe, odd sizes",
    ],
)
def test_a_gguf_gives_the_logits_of_the_safetensors_form(name: str, is_old: bool, tmp_path: Path) -> None:
    family, changes = CONFIGS[name]
    hf = hf_mixture(family, **changes)
    tensors = saved(hf, tmp_path)
    plain = our_model(hf, source(SafetensorsCheckpoint([tmp_path / "model.safetensors"])))
    model = from_gguf(write_gguf(tmp_path / "m.gguf", family, hf.config, tensors, is_old=is_old))
    ids = random_ids(40, hf.config.vocab_size)
    for backend in ("cpu", "torch"):
        assert close(full_logits(model, ids, backend), full_logits(plain, ids, backend))
    assert close(full_logits(model, ids, "cpu"), hf(torch.tensor([ids])).logits[0], 1e-4)


@pytest.mark.parametrize("rope", [None, LONGROPE])
def test_a_phimoe_gguf_gives_the_logits_of_the_safetensors_form(rope: dict[str, Any] | None, tmp_path: Path) -> None:
    # The format has no key for the jitter: it is the published one.
    changes = {} if rope is None else {"rope_parameters": rope, "max_position_embeddings": 256}
    hf = hf_mixture("phimoe", router_jitter_noise=0.01, **changes)
    tensors = saved(hf, tmp_path)
    plain = our_model(hf, source(SafetensorsCheckpoint([tmp_path / "model.safetensors"])))
    model = from_gguf(write_gguf(tmp_path / "m.gguf", "phimoe", hf.config, tensors))
    ids = random_ids(100, hf.config.vocab_size)
    assert close(full_logits(model, ids), full_logits(plain, ids))


MIXTURE_HF: dict[str, Any] = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_size": 64,
    "intermediate_size": 128,
    "vocab_size": 100,
    "max_position_embeddings": 512,
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}


@pytest.mark.parametrize(
    ("architecture", "key", "value"),
    [
        ("MixtralForCausalLM", "num_local_experts", None),
        ("MixtralForCausalLM", "num_experts_per_tok", 5),
        ("MixtralForCausalLM", "hidden_act", "gelu"),
        ("Qwen2MoeForCausalLM", "shared_expert_intermediate_size", 0),
        ("Qwen2MoeForCausalLM", "norm_topk_prob", "yes"),
        ("Qwen3MoeForCausalLM", "mlp_only_layers", ["0"]),
        ("Qwen3MoeForCausalLM", "decoder_sparse_step", 0),
        ("PhimoeForCausalLM", "num_experts_per_tok", 3),
        ("PhimoeForCausalLM", "router_jitter_noise", -1.0),
    ],
)
def test_misfits_name_file_and_key(architecture: str, key: str, value: Any) -> None:
    args = find_family(architecture, "config.json").args
    args.from_hf(MIXTURE_HF)
    with pytest.raises(ModelFileError, match=rf"model/config\.json.*{key}"):
        args.from_hf(MIXTURE_HF | {key: value}, "model/config.json")


def test_experts_of_different_types_in_one_layer_are_refused(tmp_path: Path) -> None:
    hf = hf_mixture("mixtral")
    tensors = saved(hf, tmp_path)
    name = "model.layers.1.block_sparse_moe.experts.3.w1.weight"
    tensors[name] = tensors[name].half()
    save_file(tensors, tmp_path / "mixed.safetensors")
    with pytest.raises(ModelFileError, match=r"experts\.3\.w1.*F16.*must have one type"):
        our_model(hf, source(SafetensorsCheckpoint([tmp_path / "mixed.safetensors"])))


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    hf = hf_mixture("qwen3moe")
    tensors = saved(hf, tmp_path)
    del tensors["model.layers.0.mlp.experts.7.up_proj.weight"]
    save_file(tensors, tmp_path / "short.safetensors")
    with pytest.raises(ModelFileError, match=r"experts\.7\.up_proj\.weight' is missing"):
        our_model(hf, source(SafetensorsCheckpoint([tmp_path / "short.safetensors"])))
