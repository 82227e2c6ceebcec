"""Our Llama against transformers', and against itself however a prompt is cut and its blocks lie."""

import random
from typing import Any

import pytest
import torch
from tiny_llama import SMALL, Piece, TinyPool, full_logits, hf_llama, our_llama, step_logits
from torch import Tensor

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "every head its own": {"num_key_value_heads": 4},
    "one KV head": {"num_key_value_heads": 1, "num_attention_heads": 6},
    "tied": {"tie_word_embeddings": True},
    "odd sizes": {
        "vocab_size": 517,
        "hidden_size": 72,
        "intermediate_size": 173,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 24,
    },
    "head size apart from the hidden size": {"head_dim": 40},
    "head size of no whole vector": {
        "head_dim": 6,
        "hidden_size": 50,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
    },
    "llama3 scaling": {"rope_parameters": LLAMA3},
    "linear scaling": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "one layer, wide": {"num_hidden_layers": 1, "hidden_size": 256, "intermediate_size": 688, "head_dim": 64},
    "deep, other epsilon": {"num_hidden_layers": 6, "rms_norm_eps": 1e-3},
}


def random_ids(count: int, vocab_size: int = SMALL["vocab_size"], seed: int = 1) -> list[int]:
    return torch.randint(0, vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def check_against_transformers(changes: dict[str, Any], length: int, backend: str) -> None:
    hf = hf_llama(**changes)
    ids = random_ids(length, hf.config.vocab_size)
    ours = full_logits(our_llama(hf), ids, backend)
    theirs = hf(torch.tensor([ids])).logits[0]
    assert ours.dtype == torch.float32
    assert ours.shape == theirs.shape
    limit = 1e-4 * theirs.abs().max()
    assert (ours - theirs).abs().amax() <= limit


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("length", [1, 2, 33, 200])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_transformers(name: str, length: int, backend: str) -> None:
    check_against_transformers(CONFIGS[name], length, backend)


@pytest.mark.parametrize("name", ["odd sizes", "llama3 scaling"])
def test_logits_are_those_of_transformers_at_700_tokens(name: str) -> None:
    check_against_transformers(CONFIGS[name], 700, "cpu")


@pytest.mark.nightly
@pytest.mark.parametrize("length", [1500, 3000])
@pytest.mark.parametrize("name", CONFIGS)
def test_long_logits_are_those_of_transformers(name: str, length: int) -> None:
    check_against_transformers(CONFIGS[name], length, "cpu")


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(60))
def test_logits_of_random_configurations(seed: int) -> None:
    r = random.Random(seed)
    n_kv_heads, group, head_dim = r.choice([1, 2, 3]), r.choice([1, 2, 4, 5]), 2 * r.randint(1, 40)
    rope = r.choice([{"rope_type": "default", "rope_theta": 1e4}, LLAMA3, CONFIGS["linear scaling"]["rope_parameters"]])
    changes = {
        "num_key_value_heads": n_kv_heads,
        "num_attention_heads": n_kv_heads * group,
        "head_dim": head_dim,
        "hidden_size": n_kv_heads * group * r.randint(1, 20),
        "intermediate_size": r.randint(1, 400),
        "vocab_size": r.randint(2, 900),
        "num_hidden_layers": r.randint(1, 4),
        "tie_word_embeddings": r.random() < 0.5,
        "attention_bias": r.random() < 0.3,
        "mlp_bias": r.random() < 0.3,
        "rope_parameters": rope,
    }
    check_against_transformers(changes, r.choice([1, 5, 64, 257, 1000, 3000]), r.choice(["cpu", "torch"]))


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-5 * b.abs().max())


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("chunk", [1, 16, 37])
def test_a_prompt_in_chunks_over_scattered_blocks_gives_the_logits_of_one_pass(chunk: int, backend: str) -> None:
    model = our_llama(hf_llama())
    ids = random_ids(150)
    blocks = random.Random(0).sample(range(40), 10)
    pool = TinyPool(model.args, 40, 16)
    parts = [
        step_logits(model, pool, [Piece(ids, start, min(start + chunk, 150), blocks)], backend)[0]
        for start in range(0, 150, chunk)
    ]
    assert close(torch.cat(parts), full_logits(model, ids, backend))


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_prefills_and_decodes_in_one_batch_do_not_touch_each_other(backend: str) -> None:
    model = our_llama(hf_llama())
    lengths = [45, 1, 130, 33, 16, 90]
    prompts = [random_ids(n, seed=n) for n in lengths]
    free = random.Random(3).sample(range(80), 80)
    tables = [[free.pop() for _ in range(-(-n // 16))] for n in lengths]
    pool = TinyPool(model.args, 80, 16)
    got: list[list[Tensor]] = [[] for _ in lengths]
    done = [0] * len(lengths)
    chooser = random.Random(4)
    # Each step advances a random choice of requests, some by one token and some by many.
    while any(d < n for d, n in zip(done, lengths, strict=True)):
        active = [r for r in range(len(lengths)) if done[r] < lengths[r] and chooser.random() < 0.8]
        chooser.shuffle(active)
        if not active:
            continue
        stops = {r: min(lengths[r], done[r] + chooser.choice([1, 1, 16, 40])) for r in active}
        pieces = [Piece(prompts[r], done[r], stops[r], tables[r]) for r in active]
        for r, logits in zip(active, step_logits(model, pool, pieces, backend), strict=True):
            got[r].append(logits)
            done[r] = stops[r]
    for prompt, parts in zip(prompts, got, strict=True):
        assert close(torch.cat(parts), full_logits(model, prompt, backend))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_half_precision_stays_close_to_float32(dtype: torch.dtype, tolerance: float, backend: str) -> None:
    hf = hf_llama()
    ids = random_ids(80)
    model = our_llama(hf, dtype)
    pool = TinyPool(model.args, 5, 16, dtype)
    got = step_logits(model, pool, [Piece(ids, 0, 80, range(5))], backend)[0]
    theirs = hf(torch.tensor([ids])).logits[0]
    plain = hf.to(dtype)(torch.tensor([ids])).logits[0].float()
    assert got.dtype == torch.float32
    assert (got - theirs).abs().max() <= max(2 * (plain - theirs).abs().max(), tolerance * theirs.abs().max())
