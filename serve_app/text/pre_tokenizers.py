"""How byte-level BPE models cut a text into words before merging, by the name that GGUF gives it.

The patterns are those of each model's published tokenizer.json.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

_CONTRACTIONS: Final = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS: Final = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST: Final = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """One way of cutting. ignores_merges: a word that is a token as a whole is taken whole.

    adds_bos is what holds where the file does not say it.
    """

    build: Callable[[], pre_tokenizers.PreTokenizer]
    normalizer: Callable[[], normalizers.Normalizer] | None = None
    ignores_merges: bool = False
    adds_bos: bool = False


def _split(*patterns: str) -> Callable[[], pre_tokenizers.PreTokenizer]:
    """Cuts by each pattern in turn; what matches and what lies between are words."""

    def build() -> pre_tokenizers.PreTokenizer:
        cuts = [pre_tokenizers.Split(Regex(p), "isolated") for p in patterns]
        return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])

    return build


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _starcoder() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _falcon() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Punctuation("contiguous"),
            _gpt2(),
            pre_tokenizers.Digits(individual_digits=False),
            pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
        ]
    )


# Words whose capitals stand in front: "camelCase" is two.
_CASED: Final = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s"
)
_CASED_REST: Final = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_O200K: Final = PreTokenizer(
    _split(rf"{_CASED % (f'{_CONTRACTIONS}?', f'{_CONTRACTIONS}?')}|\p{{N}}{{1,3}}|{_CASED_REST}")
)
_CL100K: Final = _split(rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}")
_LLAMA3: Final = PreTokenizer(_CL100K, ignores_merges=True, adds_bos=True)
_QWEN2: Final = PreTokenizer(_split(rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"), normalizer=normalizers.NFC)
_GPT_2: Final = PreTokenizer(_gpt2)
_STARCODER: Final = PreTokenizer(_starcoder)

PRE_TOKENIZERS: Final[dict[str, PreTokenizer]] = {
    "llama-bpe": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama3": _LLAMA3,
    "falcon3": _LLAMA3,
    "pixtral": _LLAMA3,
    "tekken": PreTokenizer(_split(rf"{_CASED % ('', '')}|\p{{N}}|{_CASED_REST}"), ignores_merges=True, adds_bos=True),
    "gpt-4o": _O200K,
    "llama4": _O200K,
    "dbrx": PreTokenizer(_CL100K),
    "smaug-bpe": PreTokenizer(_CL100K),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "megrez": _QWEN2,
    "stablelm2": _QWEN2,
    "gpt-2": _GPT_2,
    "phi-2": _GPT_2,
    "mpt": _GPT_2,
    "olmo": _GPT_2,
    "starcoder": _STARCODER,
    "refact": _STARCODER,
    "smollm": _STARCODER,
    "codeshell": _STARCODER,
    "falcon": PreTokenizer(_falcon),
    # For files from before GGUF named the kind: ggml's rules for them.
    "default": PreTokenizer(_split(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
}


def pre_tokenizer_name(tokenizer: Tokenizer, preferred: str | None = None) -> str | None:
    """GGUF's name for the way a byte-level tokenizer cuts and normalises texts; None where it has none that is known.

    preferred: the name to take where several mean the same.
    """
    wanted = _description(tokenizer)
    for name in (preferred, *PRE_TOKENIZERS):
        if name is None:
            continue
        kind = PRE_TOKENIZERS[name]
        same = Tokenizer(models.BPE(ignore_merges=kind.ignores_merges))
        same.pre_tokenizer = kind.build()
        if kind.normalizer is not None:
            same.normalizer = kind.normalizer()
        if _description(same) == wanted:
            return name
    return None


def _description(tokenizer: Tokenizer) -> Any:
    """What decides over the words of a text, as plain values that can be compared."""
    content = json.loads(tokenizer.to_str())
    cutter = content["pre_tokenizer"] or {}
    cuts = [dict(part) for part in cutter.get("pretokenizers", [cutter])]
    for cut in cuts:
        cut.pop("trim_offsets", None)  # concerns where a word is said to begin, not which one it is
    normalizer = content["normalizer"] or {}
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    return cuts, steps, bool(content["model"].get("ignore_merges"))
