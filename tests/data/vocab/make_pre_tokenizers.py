"""Writes pre_tokenizers.json: how llama.cpp encodes texts with GPT-2's vocabulary, cut into words in each model's way.

Needs llama-cpp-python, whose library is llama.cpp's; run from the project's root:
python tests/data/vocab/make_pre_tokenizers.py
"""

import ctypes
import json
import tempfile
from pathlib import Path

import gguf
import llama_cpp

FOLDER = Path(__file__).parent
NAMES = (
    "llama-bpe", "llama-v3", "llama3", "falcon3", "pixtral", "tekken", "gpt-4o", "llama4", "dbrx", "smaug-bpe",
    "qwen2", "deepseek-r1-qwen", "megrez", "stablelm2", "gpt-2", "phi-2", "mpt", "olmo", "starcoder", "refact",
    "smollm", "codeshell", "default",
)  # fmt: skip
MORE_TEXTS = (
    "camelCase HTTPServer's I'LL they'Ve ÉCOLE école Ǆ ǅ",
    "def f(x):\n\treturn x[1:2] // 3  # 1234567 0x1F\n\n\n",
    "https://example.org/a/b?c=d&e=1,234.56\r\n\r\n//\n",
    "日本語の文章、とても123良い。 Ελληνικά кириллица עברית हिन्दी",
    "½ ² Ⅷ ①② 😀👍🏽 \u00a0\u2003 x",
    "  leading and trailing   ",
)


def texts() -> list[str]:
    """The published ones and ours."""
    published = (FOLDER / "ggml-vocab-gpt-2.gguf.inp").read_text(encoding="utf-8")
    return [*published.split("\n__ggml_vocab_test__\n"), *MORE_TEXTS]


def write_vocabulary(path: Path, pre: str) -> None:
    """GPT-2's vocabulary, to be cut in another way."""
    fields = gguf.GGUFReader(FOLDER / "ggml-vocab-gpt-2.gguf").fields
    writer = gguf.GGUFWriter(path, "gpt2")
    for key in ("context_length", "embedding_length", "feed_forward_length", "block_count"):
        writer.add_uint32(f"gpt2.{key}", fields[f"gpt2.{key}"].contents())
    writer.add_head_count(fields["gpt2.attention.head_count"].contents())
    writer.add_layer_norm_eps(fields["gpt2.attention.layer_norm_epsilon"].contents())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(fields["tokenizer.ggml.tokens"].contents())
    writer.add_token_types(fields["tokenizer.ggml.token_type"].contents())
    writer.add_token_merges(fields["tokenizer.ggml.merges"].contents())
    writer.add_bos_token_id(50256)
    writer.add_eos_token_id(50256)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def encoded(path: Path) -> list[list[int]]:
    """The ids of all texts, no special ones."""
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    assert model, path
    vocab = llama_cpp.llama_model_get_vocab(model)
    found = []
    for text in texts():
        raw = text.encode()
        ids = (ctypes.c_int32 * (len(raw) + 8))()
        count = llama_cpp.llama_tokenize(vocab, raw, len(raw), ids, len(ids), False, False)
        assert count >= 0
        found.append(list(ids[:count]))
    llama_cpp.llama_model_free(model)
    return found


def main() -> None:
    """Names with the same ids are written together."""
    by_ids: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in NAMES:
            path = Path(folder) / "vocab.gguf"
            write_vocabulary(path, name)
            by_ids.setdefault(json.dumps(encoded(path)), []).append(name)
    groups = ",\n".join(f'{{"names": {json.dumps(names)},\n"ids": {ids}}}' for ids, names in by_ids.items())
    (FOLDER / "pre_tokenizers.json").write_text(
        f'{{"more_texts": {json.dumps(MORE_TEXTS)},\n"groups": [\n{groups}\n]}}\n'
    )


if __name__ == "__main__":
    main()
