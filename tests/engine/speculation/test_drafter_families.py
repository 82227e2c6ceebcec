"""Draft models whose layers have windows, or whose ropes have several sets of angles."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from family_cases import CASES, LONG, hf_model, our_model
from tiny_llama import DictSource

from serve_app.engine.assembly import ledger
from serve_app.engine.kv_plan import KvPlan
from serve_app.engine.speculation.draft_call import DraftCall
from serve_app.engine.speculation.drafter import Drafter
from serve_app.kv_cache.arena import PosixShmArena
from serve_app.kv_cache.kv_pool import KvPool
from serve_app.kv_cache.layer_groups import LayerGroup
from serve_app.models.base import CausalLM
from serve_app.models.registry import find_family
from serve_app.options import EngineConfig

ORIGINAL, VOCABULARY = 40, 512
CONFIG = EngineConfig(
    max_seqs=6, max_batched_tokens=48, prefill_chunk_tokens=20, block_size=16, device="cpu", cpu_exact=True,
    prefix_cache_n=0,
)  # fmt: skip
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "windows": ("Mistral", {"sliding_window": 19}),
    "longrope": ("Phi3", {"rope_parameters": LONG, "original_max_position_embeddings": ORIGINAL}),
}


def models(name: str) -> tuple[Any, CausalLM]:
    kind, changes = KINDS[name]
    CASES["here"] = (kind, {"vocab_size": VOCABULARY, "num_hidden_layers": 2} | changes)
    hf = hf_model("here")
    if name == "windows":
        return hf, our_model(hf)
    family = find_family(type(hf).__name__, "config.json")
    args: Any = replace(family.args.from_hf(hf.config.to_dict()), max_position_embeddings=4 * ORIGINAL)  # type: ignore[type-var]
    return hf, family.build(args, DictSource({k: v.detach() for k, v in hf.state_dict().items()}))


def drafter_of(model: CausalLM, num_blocks: int) -> Drafter:
    plan = KvPlan.of(model, CONFIG, 4 * ORIGINAL)
    args = model.args
    plan = replace(plan, groups=(LayerGroup(0, tuple(range(args.n_layers))),))
    shape = (CONFIG.block_size, args.n_layers, args.n_kv_heads, args.head_dim, torch.float32)
    kv = KvPool.create(PosixShmArena.create, num_blocks, *shape)
    return Drafter(model, kv, ledger(CONFIG, num_blocks, b"tiny"), plan, CONFIG, least_chance=0.0)


def is_likeliest(logits: torch.Tensor, token_id: int) -> bool:
    return bool(logits.max() - logits[token_id] <= 1e-4 * logits.abs().max())


@pytest.mark.parametrize("num_blocks", [60, 14])
@pytest.mark.parametrize("name", KINDS)
def test_each_drafted_token_is_what_transformers_finds_likeliest(name: str, num_blocks: int) -> None:
    """Texts that grow beyond windows and beyond the original length, some at once; accepted, rejected, evicted."""
    hf, model = models(name)
    drafter, rng = drafter_of(model, num_blocks), random.Random(4)
    texts = {i: rng.choices(range(3, VOCABULARY), k=length) for i, length in enumerate([30, 33, 8, 55, 25])}
    told = dict.fromkeys(texts, 0)
    num_drafted = 0
    for _ in range(8):
        some = rng.sample(sorted(texts), k=3)
        answers = drafter.propose([DraftCall(i, told[i], texts[i][told[i] :], 4) for i in some])
        for i, drafted in zip(some, answers, strict=True):
            assert drafted is not None
            told[i] = len(texts[i])
            num_drafted += len(drafted)
            for n, token_id in enumerate(drafted):
                logits = hf(torch.tensor([texts[i] + drafted[:n]])).logits[0, -1]
                assert is_likeliest(logits, token_id), (i, len(texts[i]), n)
            texts[i] = texts[i] + drafted[: rng.randint(0, 4)] + [rng.randrange(3, VOCABULARY)]
        for _ in range(rng.choice([0, 2, 12])):
            drafter.advance()
    assert num_drafted > 70
    assert (drafter.num_evictions > 0) == (num_blocks == 14)
    drafter.close()
