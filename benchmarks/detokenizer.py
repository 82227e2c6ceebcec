"""CPU time of the detokenizer per token: plain text, text with stop strings, and characters of several tokens.

Usage: python benchmarks/detokenizer.py [tokenizer folder, file or GGUF]
"""

import sys
import time
from pathlib import Path

from serve_app.text.detokenizer import Detokenizer, DetokenizerTable
from serve_app.text.tokenizer import open_tokenizer

ROOT = Path(__file__).parents[1]
TEXTS = {
    "English": "Once upon a time, there was a little girl named Lily. She loved to play outside in the park.\n" * 200,
    "Japanese and emoji": "むかしむかし、ある所に、おじいさんが住んでいました。🥞👩‍👩‍👧‍👦" * 200,
}
STOPS = {"no stop": (), "2 stop strings": ("\nUser:", "###"), "4 frequent ones": ("the end", "\n\n", "a b", "She is")}


def main() -> None:
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "tests/data/vocab/ggml-vocab-gpt-2.gguf"
    tokenizer = open_tokenizer(source)
    start = time.thread_time()
    table = DetokenizerTable(tokenizer)
    print(f"{source.name}: {tokenizer.vocab_size} tokens, table built in {(time.thread_time() - start) * 1e3:.0f} ms")
    for text_name, text in TEXTS.items():
        ids = tokenizer.encode(text)
        for stop_name, stops in STOPS.items():
            best = min(_seconds(table, stops, ids) for _ in range(5))
            print(f"{text_name:20} {stop_name:16} {best / len(ids) * 1e6:6.2f} µs a token")


def _seconds(table: DetokenizerTable, stops: tuple[str, ...], ids: list[int]) -> float:
    detokenizer = Detokenizer(table, stops, ids[:1])
    start = time.thread_time()
    for i in ids:
        detokenizer.push(i)
    return time.thread_time() - start


if __name__ == "__main__":
    main()
