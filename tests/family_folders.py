"""Folders of random small models of every family, with a tokenizer: what `sirocco quantize` is given."""

import json
from pathlib import Path
from typing import Any

import torch
from family_cases import CASES, hf_model
from mixtures import FAMILIES, hf_mixture
from tiny_llama import hf_llama
from tokenizers import Tokenizer, decoders, models, normalizers

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
LONG_MIXTURE = {
    "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64, "factor": 64.0,
    "short_factor": [1.0, 1.1, 1.2, 1.5, 2.0, 2.5], "long_factor": [1.0, 1.5, 3.0, 6.0, 9.0, 12.0],
    "short_mscale": 1.2, "long_mscale": 1.2,
}  # fmt: skip
LLAMAS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, llama3": {"rope_parameters": LLAMA3},
    "llama, biases": {"attention_bias": True, "mlp_bias": True},
    "llama, tied, wide heads": {"tie_word_embeddings": True, "head_dim": 16},
}
MIXTURES: dict[str, dict[str, Any]] = {
    **{family: {} for family in FAMILIES if family != "phimoe"},
    "phimoe": {"router_jitter_noise": 0.01},
    "phimoe, long": {"router_jitter_noise": 0.01, "rope_parameters": LONG_MIXTURE},
}
VOCAB_SIZE = 97


def write_tokenizer(folder: Path) -> None:
    """Sentencepiece-like, 97 ids: the printable characters of ASCII, and no merges."""
    texts = ["<unk>", "<s>", "</s>", "▁", *(chr(c) for c in range(0x21, 0x7E))]
    vocab = {text: i for i, text in enumerate(texts)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Replace("▁", " ")
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "chat_template": "{{ messages }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def folder_of(case: str, folder: Path) -> Path:
    """The case's model and the tokenizer, saved in the folder."""
    family = case.split(",")[0]
    if family == "llama" and case in LLAMAS:
        model = hf_llama(**LLAMAS[case])
    elif case in MIXTURES:
        model = hf_mixture(family, **MIXTURES[case])
    else:
        assert case in CASES
        model = hf_model(case)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def some_ids(count: int = 40) -> list[int]:
    """Ids that every one of the models has."""
    ids: list[int] = torch.randint(3, VOCAB_SIZE, (count,), generator=torch.Generator().manual_seed(2)).tolist()
    return ids
