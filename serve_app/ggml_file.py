"""Reads GGML's container from before GGUF (August 2023), as far as it holds a Llama, without trusting a byte of it.

What is read comes out as the GGUF that says the same: its keys, its tensors' names. Three kinds were in use, by their
magic numbers: ggml, ggmf version 1 (tokens with scores) and ggjt versions 1 to 3 (data aligned, to be mapped). Blocks
of quantised weights got their layout of today in May 2023, some with ggjt 2 and some with 3; older ones are refused.
Sources: llama.cpp up to commit dadbed9 (llama.cpp: llama_file_loader, llama_file_version), and its
convert_llama_ggml_to_gguf.py for the meaning of the vocabulary.
"""

import os
from pathlib import Path
from struct import Struct
from typing import Any, Final

import numpy as np

from kernels.formats import GGML_BY_ID, BlockFormat
from serve_app.errors import ModelFileError
from serve_app.gguf_file import MAGIC, OLD_MAGICS, GgufFile, GgufTensorInfo, Shard, close_map, map_file, shown

CONTEXT_LENGTH: Final = 4096
"""The file does not say it; mistral.rs's number, Llama 2's."""

NORM_EPS: Final = 1e-5
"""The file does not say it; mistral.rs's number, Llama 2's."""

_GGML, _GGMF, _GGJT = OLD_MAGICS
_VERSIONS: Final = {_GGML: (0,), _GGMF: (1,), _GGJT: (1, 2, 3)}
_ALIGNMENT: Final = 32
_HPARAMS: Final = Struct("<7I")
_TENSOR_HEAD: Final = Struct("<3I")
_U32, _F32 = Struct("<I"), Struct("<f")

# Type → the first version of ggjt that has its blocks as they are today.
_SINCE: Final = {"Q5_0": 2, "Q5_1": 2, "Q4_0": 3, "Q4_1": 3, "Q8_0": 3} | dict.fromkeys(
    ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"), 3
)
_GLOBAL: Final = {"tok_embeddings": "token_embd", "norm": "output_norm", "output": "output"}
_OF_LAYER: Final = {
    "attention_norm": "attn_norm",
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "ffn_norm": "ffn_norm",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
}

# Llama's sentencepiece vocabulary: <unk>, <s>, </s>, the 256 bytes, then the pieces. GGUF's token types.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_FIRST_BYTE: Final = 3
_SPECIAL: Final = {0: ("<unk>", _UNKNOWN), 1: ("<s>", _CONTROL), 2: ("</s>", _CONTROL)}
# What converters gave to tokens that were added to the vocabulary.
_ADDED_SCORE: Final = -1000.0


def open_ggml(path: str | os.PathLike[str], gqa: int | None = None) -> GgufFile:
    """The file as a GGUF. gqa: query heads to a KV head, None: as the key matrix's rows say.

    Raises ModelFileError: one sentence with the file and what of it is wrong or not supported.
    """
    path = Path(path)
    if path.with_name(f"{path.name}.1").exists():
        raise ModelFileError(f"{path}: goes on in {path.name}.1; models in several such parts are not supported")
    mapped = map_file(path)
    try:
        reader = _Reader(path, memoryview(mapped))
        metadata = reader.hparams() | reader.vocabulary()
        tensors = reader.tensors()
        metadata |= reader.shapes(tensors, gqa)
        return GgufFile([Shard(path, mapped, reader.version, metadata, tensors)])
    except BaseException:
        close_map(mapped)
        raise


class _Reader:
    """A cursor over the file."""

    def __init__(self, path: Path, data: memoryview) -> None:
        self._path = path
        self._data = data
        self._pos = 4
        self._magic = bytes(data[:4])
        if self._magic not in _VERSIONS:
            is_gguf = self._magic == MAGIC
            raise self._bad("is a file of the kind gguf" if is_gguf else "is no file of the kind ggml (wrong magic)")
        self.version = 0 if self._magic == _GGML else self._number("version")
        if self.version not in _VERSIONS[self._magic]:
            raise self._bad(f"is version {self.version} of its container; 1 to {_VERSIONS[self._magic][-1]} are known")
        self._has_scores = self._magic != _GGML
        self._layout = self.version if self._magic == _GGJT else 0

    def hparams(self) -> dict[str, Any]:
        """The seven numbers of a Llama.

        Two are not needed: the feed-forward width and the types of weights are told by the tensors.
        """
        self._n_vocab, n_embd, _, self._n_heads, self._n_layers, n_rot, _ = self._take(_HPARAMS, "hyper-parameters")
        if not 0 < self._n_heads <= n_embd or n_embd % self._n_heads:
            raise self._bad(f"has {self._n_heads} heads in a width of {n_embd}")
        self._head_dim = n_embd // self._n_heads
        return {
            "general.architecture": "llama",
            "llama.context_length": CONTEXT_LENGTH,
            "llama.vocab_size": self._n_vocab,
            "llama.embedding_length": n_embd,
            "llama.block_count": self._n_layers,
            "llama.attention.head_count": self._n_heads,
            "llama.attention.layer_norm_rms_epsilon": NORM_EPS,
            "llama.rope.dimension_count": n_rot,
        }

    def vocabulary(self) -> dict[str, Any]:
        """The keys of a GGUF's sentencepiece tokenizer; none for the oldest files, which have no scores."""
        entry_bytes = 8 if self._has_scores else 4
        if self._n_vocab * entry_bytes > len(self._data) - self._pos:
            raise self._bad(f"counts {self._n_vocab} tokens, more than it has bytes for")
        texts, types, scores = [], [], []
        for i in range(self._n_vocab):
            raw = self._bytes(self._number("vocabulary"), "vocabulary")
            score: float = self._take(_F32, "vocabulary")[0] if self._has_scores else 0.0
            text, kind = _token(i, raw, score)
            texts.append(text)
            types.append(kind)
            scores.append(score)
        if not self._has_scores:
            return {}
        return {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": texts,
            "tokenizer.ggml.token_type": np.array(types, np.int32),
            "tokenizer.ggml.scores": np.array(scores, np.float32),
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
        }

    def tensors(self) -> dict[str, GgufTensorInfo]:
        """All tensors up to the end of the file, under GGUF's names."""
        found: dict[str, GgufTensorInfo] = {}
        while self._pos < len(self._data):
            name, info = self._tensor()
            if name in found:
                raise self._bad(f"tensor {shown(name)} occurs twice")
            found[name] = info
        return found

    def shapes(self, tensors: dict[str, GgufTensorInfo], gqa: int | None) -> dict[str, Any]:
        """The sizes that are written nowhere but in the tensors' shapes."""
        for own, name in self._wanted().items():
            if name not in tensors:
                raise self._bad(f"tensor {own!r} is missing")
        keys = tensors["blk.0.attn_k.weight"].shape[0]
        n_kv_heads = keys // self._head_dim
        if keys % self._head_dim or n_kv_heads < 1 or self._n_heads % n_kv_heads:
            raise self._bad(f"tensor 'layers.0.attention.wk.weight' has {keys} rows for {self._n_heads} query heads")
        if gqa is not None and gqa * n_kv_heads != self._n_heads:
            raise self._bad(
                f"--gqa {gqa} does not fit its {self._n_heads} query heads and {n_kv_heads} key heads, "
                f"which are {self._n_heads // n_kv_heads} to one"
            )
        return {
            "llama.attention.head_count_kv": n_kv_heads,
            "llama.feed_forward_length": tensors["blk.0.ffn_gate.weight"].shape[0],
        }

    def _wanted(self) -> dict[str, str]:
        """The file's own name → GGUF's, of the tensors that shapes() needs and of a few that show a whole file."""
        last = self._n_layers - 1
        own = ["layers.0.attention.wk.weight", "layers.0.feed_forward.w1.weight", f"layers.{last}.ffn_norm.weight"]
        return {name: _gguf_name(name) for name in [*own, "tok_embeddings.weight", "norm.weight", "output.weight"]}

    def _tensor(self) -> tuple[str, GgufTensorInfo]:
        n_dims, name_bytes, type_id = self._take(_TENSOR_HEAD, "a tensor's head")
        if not 1 <= n_dims <= 2:
            raise self._bad(f"has a tensor of {n_dims} dimensions at byte {self._pos - _TENSOR_HEAD.size}")
        dims = [self._number("a tensor's shape") for _ in range(n_dims)]
        name = self._bytes(name_bytes, "a tensor's name").decode(errors="replace")
        form = self._form(type_id, f"tensor {shown(name)}")
        if 0 in dims or dims[0] % form.block_length:
            raise self._bad(f"tensor {shown(name)} has the impossible dimensions {dims} for type {form.name}")
        if self._magic == _GGJT:
            self._pos = -(-self._pos // _ALIGNMENT) * _ALIGNMENT
        n_bytes = form.row_bytes(dims[0]) * (dims[1] if n_dims == 2 else 1)
        begin = self._pos
        if n_bytes > len(self._data) - begin:
            raise self._bad(f"tensor {shown(name)} ends at byte {begin + n_bytes}, the file at {len(self._data)}")
        self._pos += n_bytes
        stored = _gguf_name(name)
        return stored, GgufTensorInfo(stored, tuple(reversed(dims)), type_id, n_bytes, 0, begin)

    def _form(self, type_id: int, what: str) -> BlockFormat:
        """The blocks of a type; refused where this file's are laid out in a way that has been given up."""
        form = GGML_BY_ID.get(type_id)
        if form is None or (form.is_block and form.name not in _SINCE):
            raise self._bad(f"{what} has the unknown type {type_id}")
        if form.is_block and self._layout < _SINCE[form.name]:
            raise self._bad(
                f"{what} has {form.name} blocks in a layout from before ggjt version {_SINCE[form.name]} (May 2023), "
                "which is not supported: quantise the model anew, or take its GGUF"
            )
        return form

    def _number(self, what: str) -> int:
        return int(self._take(_U32, what)[0])

    def _take(self, layout: Struct, what: str) -> tuple[Any, ...]:
        return layout.unpack(self._bytes(layout.size, what))

    def _bytes(self, count: int, what: str) -> bytes:
        if count > len(self._data) - self._pos:
            raise self._bad(f"ends in the middle of its {what}" if not what.startswith("a ") else f"ends in {what}")
        self._pos += count
        return bytes(self._data[self._pos - count : self._pos])

    def _bad(self, sentence: str) -> ModelFileError:
        return ModelFileError(f"{self._path}: {sentence}")


def _gguf_name(name: str) -> str:
    """GGUF's name of a tensor; one without a rule stays as it is."""
    stem, _, kind = name.rpartition(".")
    if stem in _GLOBAL:
        return f"{_GLOBAL[stem]}.{kind}"
    first, _, rest = stem.partition(".")
    layer, _, part = rest.partition(".")
    return f"blk.{layer}.{_OF_LAYER[part]}.{kind}" if first == "layers" and part in _OF_LAYER else name


def _token(i: int, raw: bytes, score: float) -> tuple[str, int]:
    """A token's text and type as GGUF has them.

    Converters wrote out what a piece looks like: spaces as spaces, a byte as that byte, nothing for control tokens.
    """
    if i in _SPECIAL:
        return _SPECIAL[i]
    if not raw:
        return f"[PAD{i}]", _CONTROL
    byte = i - _FIRST_BYTE
    if byte < 256 and raw == bytes([byte]):
        return f"<0x{byte:02X}>", _BYTE
    return raw.decode(errors="replace").replace(" ", "▁"), _USER_DEFINED if score == _ADDED_SCORE else _NORMAL
