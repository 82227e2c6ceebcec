"""A GGUF's metadata out of a Llama-like model's folder: config.json, tokenizer.json, tokenizer_config.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from serve_app.errors import LaunchError
from serve_app.loaders.gguf_writer import encoded
from serve_app.loaders.weight_files import read_json

_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_LLAMA3_DIGITS = r"\p{N}{1,3}"


def metadata_of_folder(folder: Path, config: Mapping[str, Any], name: str) -> dict[str, bytes]:
    """Key → value's bytes. LaunchError, with the reason, for a model or a tokenizer that this cannot describe."""
    architecture = (config.get("architectures") or [None])[0]
    if architecture not in _ARCHITECTURES:
        raise LaunchError(f"{folder}: {architecture} cannot be written as .gguf; {', '.join(_ARCHITECTURES)} can.")
    rope = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or rope
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "llama3"):  # llama3's become a tensor of their own
        raise LaunchError(f"{folder}: rotary frequencies scaled by the rule {kind!r} cannot be written as .gguf yet.")
    heads = int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim") or config["hidden_size"] // heads)
    values: dict[str, Any] = {
        "general.architecture": "llama",
        "general.name": name,
        "llama.context_length": int(config["max_position_embeddings"]),
        "llama.embedding_length": int(config["hidden_size"]),
        "llama.block_count": int(config["num_hidden_layers"]),
        "llama.feed_forward_length": int(config["intermediate_size"]),
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": int(config.get("num_key_value_heads") or heads),
        "llama.attention.key_length": head_dim,
        "llama.attention.value_length": head_dim,
        "llama.rope.dimension_count": head_dim,
        "llama.rope.freq_base": float(config.get("rope_theta") or rope.get("rope_theta") or 10000.0),
        "llama.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "llama.vocab_size": int(config["vocab_size"]),
    }
    values |= _tokenizer(folder, int(config["vocab_size"]))
    for role in ("bos", "eos"):
        token = config.get(f"{role}_token_id")
        token = token[0] if isinstance(token, list) else token
        if isinstance(token, int):
            values[f"tokenizer.ggml.{role}_token_id"] = token
    return {key: encoded(value) for key, value in values.items()}


def _tokenizer(folder: Path, vocab_size: int) -> dict[str, Any]:
    described = read_json(folder / "tokenizer.json")
    model, added = described["model"], described.get("added_tokens") or []
    if model.get("type") != "BPE":
        raise LaunchError(f"{folder}: a tokenizer of kind {model.get('type')} cannot be written as .gguf.")
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    ids: dict[str, int] = dict(model["vocab"])
    ids |= {token["content"]: token["id"] for token in added}
    texts = [f"[PAD{i}]" for i in range(max(vocab_size, *(i + 1 for i in ids.values())))]
    types = [_USER_DEFINED] * len(texts)
    for text, index in ids.items():
        texts[index], types[index] = text, _NORMAL
    for token in added:
        types[token["id"]] = _CONTROL if token.get("special") else _USER_DEFINED
    values: dict[str, Any] = {"tokenizer.ggml.tokens": texts, "tokenizer.ggml.token_type": types}
    if model.get("byte_fallback"):
        rank = {merge.replace(" ", ""): i for i, merge in reversed(list(enumerate(merges)))}
        values["tokenizer.ggml.model"] = "llama"
        values["tokenizer.ggml.add_space_prefix"] = _adds_space(described)
        # The pair with the best score is merged first: the order of the merges, as scores.
        values["tokenizer.ggml.scores"] = [-float(rank.get(text, len(merges))) for text in texts]
        for index, text in enumerate(texts):
            if text == model.get("unk_token"):
                types[index] = _UNKNOWN
                values["tokenizer.ggml.unknown_token_id"] = index
            elif len(text) == 6 and text.startswith("<0x"):
                types[index] = _BYTE
    else:
        values |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": merges}
        values["tokenizer.ggml.pre"] = _pre_tokenizer(folder, described.get("pre_tokenizer") or {})
    return values | _behaviour(folder)


def _adds_space(described: Mapping[str, Any]) -> bool:
    """Whether a text is encoded with a space before it."""
    parts = [described.get("normalizer") or {}, described.get("pre_tokenizer") or {}]
    parts += parts[0].get("normalizers") or []
    is_metaspace = any(p.get("type") == "Metaspace" and p.get("prepend_scheme", "always") != "never" for p in parts)
    return is_metaspace or any(p.get("type") == "Prepend" for p in parts)


def _pre_tokenizer(folder: Path, described: Mapping[str, Any]) -> str:
    """GGUF's name of a way to cut texts, for the two that are told by their description alone."""
    if described.get("type") == "ByteLevel":
        return "gpt-2"
    parts = described.get("pretokenizers") or []
    patterns = [part["pattern"].get("Regex", "") for part in parts if part.get("type") == "Split"]
    if len(patterns) == 1 and _LLAMA3_DIGITS in patterns[0]:
        return "llama-bpe"
    raise LaunchError(
        f"{folder}: the way its tokenizer cuts texts into words has no name in a GGUF that is known here."
    )


def _behaviour(folder: Path) -> dict[str, Any]:
    """What tokenizer_config.json says of BOS, EOS and the chat template."""
    path = folder / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    values: dict[str, Any] = {}
    for key in ("add_bos_token", "add_eos_token"):
        if isinstance(settings.get(key), bool):
            values[f"tokenizer.ggml.{key}"] = settings[key]
    template = settings.get("chat_template")
    separate = folder / "chat_template.jinja"
    if separate.is_file():
        template = separate.read_text(encoding="utf-8")
    if isinstance(template, str):
        values["tokenizer.chat_template"] = template
    return values
