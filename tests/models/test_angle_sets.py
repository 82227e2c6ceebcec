"""Ropes whose angles follow a request's length: against transformers below, at and beyond the original length."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from family_cases import CASES, LONG, SMALL, hf_model
from mixtures import hf_mixture, saved
from tiny_llama import DictSource, Piece, TinyPool, full_logits, step_logits

from serve_app.models.base import CausalLM
from serve_app.models.registry import find_family

ORIGINAL = 32
LENGTHS = (20, 32, 33, 70)
LONGROPE = LONG | {"original_max_position_embeddings": ORIGINAL, "factor": 16.0}
MOE_ROPE = LONGROPE | {"short_mscale": 1.1, "long_mscale": 1.3}
ROPES: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3": ("Phi3", {"rope_parameters": LONG, "original_max_position_embeddings": ORIGINAL}),
    "mistral": ("Mistral", {"rope_parameters": LONGROPE, "sliding_window": 9}),
    "phimoe": ("Phimoe", {"rope_parameters": MOE_ROPE, "max_position_embeddings": 512}),
    "dynamic": (
        "Llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
            "max_position_embeddings": ORIGINAL,
        },
    ),
}


def ids_of(length: int) -> list[int]:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(3, SMALL["vocab_size"], (length,), generator=generator).tolist()


def models(name: str, folder: Path) -> tuple[Any, CausalLM]:
    kind, changes = ROPES[name]
    if kind == "Phimoe":
        hf = hf_mixture("phimoe", **changes)
        tensors = saved(hf, folder)
    else:
        CASES["angle sets"] = ROPES[name]
        hf = hf_model("angle sets")
        tensors = {k: v.detach() for k, v in hf.state_dict().items()}
    family = find_family(type(hf).__name__, "config.json")
    # As loaders.load serves it.
    args: Any = replace(family.args.from_hf(hf.config.to_dict()), max_position_embeddings=4 * ORIGINAL)  # type: ignore[type-var]
    return hf, family.build(args, DictSource(tensors))


@pytest.mark.parametrize("name", ROPES)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    hf, model = models(name, tmp_path)
    # Ascending: transformers keeps the longest length that it has seen.
    for length in LENGTHS:
        ids = ids_of(length)
        if name == "phimoe" and length > ORIGINAL:
            # This version of transformers takes the short factors at every length: it is given the long ones as such.
            hf.config.rope_parameters["short_factor"] = LONG["long_factor"]
        theirs = hf(torch.tensor([ids])).logits[0]
        for backend in ("cpu", "torch"):
            ours = full_logits(model, ids, backend)
            assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max(), (length, backend)


@pytest.mark.parametrize("name", ROPES)
def test_short_and_long_requests_in_one_step(name: str, tmp_path: Path) -> None:
    _, model = models(name, tmp_path)
    for backend in ("cpu", "torch"):
        pool = TinyPool(model.args, 5 * len(LENGTHS), 16)
        pieces = [Piece(ids_of(n), 0, n, range(5 * i, 5 * i + 5)) for i, n in enumerate(LENGTHS)]
        together = step_logits(model, pool, [replace(p, stop=p.stop - 1) for p in pieces], backend)
        last = step_logits(model, pool, [replace(p, start=p.stop - 1) for p in pieces], backend)
        for piece, first_rows, last_row in zip(pieces, together, last, strict=True):
            whole = full_logits(model, piece.ids, backend)
            assert (torch.cat([first_rows, last_row]) - whole).abs().max() <= 1e-5 * whole.abs().max()
