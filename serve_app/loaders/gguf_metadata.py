"""A GGUF's metadata out of a Llama-like model's folder: config.json, tokenizer.json, tokenizer_config.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from serve_app.errors import LaunchError
from serve_app.loaders.gguf_writer import encoded
from serve_app.loaders.model_files import ModelFiles
from serve_app.loaders.opening import find_args
from serve_app.loaders.weight_files import read_json
from serve_app.models.decoder_args import DecoderArgs

_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
# How Llama 3's tokenizer.json cuts texts (text.pre_tokenizers builds the same, for GGUF's name of it).
_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6


def args_of_folder(files: ModelFiles) -> DecoderArgs:
    """The model's arguments. LaunchError, with the reason, for one that a GGUF's llama cannot be."""
    architecture = files.architecture
    if architecture not in _ARCHITECTURES:
        raise LaunchError(
            f"{files.folder}: {architecture} cannot be written as .gguf; {', '.join(_ARCHITECTURES)} can."
        )
    _, args = find_args(files)
    assert isinstance(args, DecoderArgs)
    kind = args.rope.scaling.kind
    if kind not in ("default", "llama3"):  # llama3's become a tensor of their own
        raise LaunchError(
            f"{files.folder}: rotary frequencies scaled by the rule {kind!r} cannot be written as .gguf yet."
        )
    window = max(args.windows, default=0)
    if 0 < window < args.max_position_embeddings:
        raise LaunchError(
            f"{files.folder}: its sliding window of {window} tokens cannot be written as .gguf, whose llama has none."
        )
    return args


def metadata_of_folder(files: ModelFiles, args: DecoderArgs) -> dict[str, bytes]:
    """Key → value's bytes. LaunchError, with the reason, for a tokenizer that this cannot describe."""
    config = files.config or {}
    values: dict[str, Any] = {
        "general.architecture": "llama",
        "general.name": files.model_name,
        "llama.context_length": args.max_position_embeddings,
        "llama.embedding_length": args.hidden_size,
        "llama.block_count": args.n_layers,
        "llama.feed_forward_length": args.intermediate_size,
        "llama.attention.head_count": args.n_heads,
        "llama.attention.head_count_kv": args.n_kv_heads,
        "llama.attention.key_length": args.head_dim,
        "llama.attention.value_length": args.head_dim,
        "llama.rope.dimension_count": args.rotary_dim,
        "llama.rope.freq_base": args.rope.theta,
        "llama.attention.layer_norm_rms_epsilon": args.norm_eps,
        "llama.vocab_size": args.vocab_size,
    }
    values |= _tokenizer(files.folder, args.vocab_size)
    for role in ("bos", "eos"):
        token = config.get(f"{role}_token_id")
        token = token[0] if isinstance(token, list) and token else token
        if isinstance(token, int) and 0 <= token < args.vocab_size:
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
    types = [_UNUSED] * len(texts)
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
        values["tokenizer.ggml.pre"] = _pre_tokenizer(folder, model, described.get("pre_tokenizer") or {})
    return values | _behaviour(folder)


def _adds_space(described: Mapping[str, Any]) -> bool:
    """Whether a text is encoded with a space before it."""
    parts = [described.get("normalizer") or {}, described.get("pre_tokenizer") or {}]
    parts += parts[0].get("normalizers") or []
    is_metaspace = any(p.get("type") == "Metaspace" and p.get("prepend_scheme", "always") != "never" for p in parts)
    return is_metaspace or any(p.get("type") == "Prepend" for p in parts)


def _pre_tokenizer(folder: Path, model: Mapping[str, Any], described: Mapping[str, Any]) -> str:
    """GGUF's name of a way to cut texts, for those that are told by their description alone."""
    if described.get("type") == "ByteLevel":
        return "gpt-2"
    parts = described.get("pretokenizers") or []
    patterns = [part["pattern"].get("Regex", "") for part in parts if part.get("type") == "Split"]
    if patterns == [_LLAMA3_PATTERN]:
        return "llama-bpe" if model.get("ignore_merges") else "dbrx"
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
    if isinstance(template, list):  # several by name
        template = {entry.get("name"): entry.get("template") for entry in template}.get("default")
    if isinstance(template, str):
        values["tokenizer.chat_template"] = template
    return values
