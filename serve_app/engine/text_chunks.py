"""Cuts a text into chunks of tokens, by the rules of llama.cpp's programs, so that figures can be compared."""

from serve_app.text.tokenizer import Tokenizer


def text_chunks(tokenizer: Tokenizer, text: str, length: int, most: int | None = None) -> list[list[int]]:
    """Token ids of the text's chunks of `length`, the first `most` of them.

    BOS stands in front of the text where the model wants it; an incomplete chunk at the end is left out; and the first
    token of each chunk is replaced by BOS, where the model wants it. ValueError where the text has no whole chunk.
    """
    ids = tokenizer.encode(text)
    chunks = [list(ids[i : i + length]) for i in range(0, len(ids) - length + 1, length)][:most]
    if not chunks:
        raise ValueError(f"the text is shorter than one chunk of {length} tokens")
    if tokenizer.add_bos and tokenizer.bos_id is not None:
        for chunk in chunks:
            chunk[0] = tokenizer.bos_id
    return chunks
