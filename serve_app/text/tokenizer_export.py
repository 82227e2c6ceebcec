"""A GGUF's tokenizer as the files of a folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import decoders

from serve_app.text.gguf_vocab import vocabulary_from_gguf
from serve_app.text.vocabulary import SPACE_MARK


def write_tokenizer(folder: Path, metadata: Mapping[str, Any]) -> tuple[int | None, tuple[int, ...]]:
    """Writes tokenizer.json and tokenizer_config.json. The ids of BOS and of the ends of a text, the main one first.

    ModelFileError as in vocabulary_from_gguf.
    """
    vocabulary = vocabulary_from_gguf(metadata)
    backend = vocabulary.make_backend()
    if metadata["tokenizer.ggml.model"] == "llama":
        steps = [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
        backend.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if vocabulary.strips_space else []))
    else:
        backend.decoder = decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))
    ids = {"bos_token": vocabulary.bos_id, "eos_token": next(iter(vocabulary.eos_ids), None)}
    settings: dict[str, Any] = {role: vocabulary.texts[i] for role, i in ids.items() if i is not None}
    settings |= {"add_bos_token": bool(vocabulary.prefix), "add_eos_token": bool(vocabulary.suffix)}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    return vocabulary.bos_id, vocabulary.eos_ids
