"""Writes Llamas in GGML's containers from before GGUF, as their converters did."""

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np

MAGICS = {"ggml": 0x67676D6C, "ggmf": 0x67676D66, "ggjt": 0x67676A74}
OWN_NAMES = {
    "token_embd": "tok_embeddings",
    "output_norm": "norm",
    "output": "output",
    "attn_norm": "attention_norm",
    "attn_q": "attention.wq",
    "attn_k": "attention.wk",
    "attn_v": "attention.wv",
    "attn_output": "attention.wo",
    "ffn_norm": "ffn_norm",
    "ffn_gate": "feed_forward.w1",
    "ffn_down": "feed_forward.w2",
    "ffn_up": "feed_forward.w3",
}

Token = tuple[bytes, float]


def own_name(gguf_name: str) -> str:
    """A tensor's name there, for GGUF's."""
    *layer, part, kind = gguf_name.split(".")
    return ".".join(["layers" if word == "blk" else word for word in layer] + [OWN_NAMES[part], kind])


def write_ggml(
    path: Path,
    sizes: Sequence[int],
    tokens: Sequence[Token],
    tensors: Mapping[str, tuple[tuple[int, ...], int, bytes]],
    magic: str = "ggjt",
    version: int = 3,
) -> Path:
    """sizes: vocabulary, width, multiple, heads, layers, rotated elements, file type. tensors: name → shape, outermost
    first, type and bytes."""
    with path.open("wb") as file:
        file.write(struct.pack("<I", MAGICS[magic]))
        if magic != "ggml":
            file.write(struct.pack("<I", version))
        file.write(struct.pack("<7I", *sizes))
        for text, score in tokens:
            file.write(struct.pack("<I", len(text)) + text)
            if magic != "ggml":
                file.write(struct.pack("<f", score))
        for name, (shape, type_id, data) in tensors.items():
            file.write(struct.pack("<3I", len(shape), len(name), type_id))
            file.write(struct.pack(f"<{len(shape)}I", *reversed(shape)) + name.encode())
            if magic == "ggjt":
                file.write(bytes(-file.tell() % 32))
            file.write(data)
    return path


def from_gguf(source: Path, path: Path, magic: str = "ggjt", version: int = 3) -> Path:
    """A GGUF's Llama in an old container."""
    reader = gguf.GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {
        own_name(t.name): (tuple(int(n) for n in reversed(t.shape)), int(t.tensor_type), t.data.tobytes())
        for t in reader.tensors
    }
    if "output.weight" not in tensors:  # there were no tied heads
        tensors["output.weight"] = tensors["tok_embeddings.weight"]
    tokens = [
        (written_out(text, kind), score)
        for text, kind, score in zip(
            fields["tokenizer.ggml.tokens"],
            fields["tokenizer.ggml.token_type"],
            fields["tokenizer.ggml.scores"],
            strict=True,
        )
    ]
    width, heads = fields["llama.embedding_length"], fields["llama.attention.head_count"]
    sizes = [len(tokens), width, 32, heads, fields["llama.block_count"], width // heads, 0]
    return write_ggml(path, sizes, tokens, tensors, magic, version)


def written_out(text: str, kind: int) -> bytes:
    """A token as the converters of that time wrote it."""
    if kind == gguf.TokenType.UNKNOWN:
        return " \u2047 ".encode()
    if kind == gguf.TokenType.CONTROL:
        return b""
    if kind == gguf.TokenType.BYTE:
        return bytes([int(text[3:5], 16)])
    return text.replace("\u2581", " ").encode()


def random_llama(
    path: Path, magic: str = "ggjt", version: int = 3, type_name: str = "F32", n_kv_heads: int = 4
) -> Path:
    """A Llama of one layer, width 256, 4 heads and 8 ids, its matrices of the named type."""
    rng = np.random.default_rng(0)
    width, inner, vocab, head_dim = 256, 512, 8, 64
    kind = gguf.GGMLQuantizationType[type_name]
    shapes = {
        "tok_embeddings.weight": (vocab, width),
        "norm.weight": (width,),
        "output.weight": (vocab, width),
        "layers.0.attention_norm.weight": (width,),
        "layers.0.attention.wq.weight": (width, width),
        "layers.0.attention.wk.weight": (n_kv_heads * head_dim, width),
        "layers.0.attention.wv.weight": (n_kv_heads * head_dim, width),
        "layers.0.attention.wo.weight": (width, width),
        "layers.0.ffn_norm.weight": (width,),
        "layers.0.feed_forward.w1.weight": (inner, width),
        "layers.0.feed_forward.w2.weight": (width, inner),
        "layers.0.feed_forward.w3.weight": (inner, width),
    }
    tensors = {}
    for name, shape in shapes.items():
        if len(shape) == 1:
            tensors[name] = (shape, 0, np.ones(shape, np.float32).tobytes())
            continue
        block, size = gguf.GGML_QUANT_SIZES[kind]
        data = (
            rng.standard_normal(shape, np.float32).astype(np.float32 if type_name == "F32" else np.float16).tobytes()
            if type_name in ("F32", "F16")
            else bytes(shape[0] * shape[1] // block * size)
        )
        tensors[name] = (shape, int(kind), data)
    return write_ggml(path, [vocab, width, 256, 4, 1, head_dim, 0], [(b"x%d" % i, 0.0) for i in range(vocab)], tensors,
                      magic, version)  # fmt: skip
