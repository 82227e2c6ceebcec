"""What is measured: one cell is one kind of work of one size."""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["prefill", "decode", "share", "batch", "serve"]

BATCH_PROMPT_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Cell:
    """prefill: the time of prompt tokens. decode: of new tokens behind a prompt, for each of the streams.

    share: as decode, but every step takes turns with reading as much memory as fast as the machine can: where its
    bandwidth changes by the second, only neighbours can be compared.
    A batch is a decode of several streams with short prompts; its rate counts the tokens of all of them. serve: the new
    tokens of whole requests, from their arrival to their last token.
    """

    kind: Kind
    prompt: int
    new: int = 0
    streams: int = 1

    @property
    def label(self) -> str:
        """As a table shows it."""
        if self.kind == "prefill":
            return f"prefill {self.prompt}"
        if self.kind == "decode":
            return f"decode at {self.prompt}"
        if self.kind == "share":
            return f"decode at {self.prompt}, reading in turn"
        return f"{self.kind} {self.streams}"

    @property
    def num_tokens(self) -> int:
        """Tokens whose time is taken."""
        return self.prompt if self.kind == "prefill" else self.new * self.streams


def make_cells(prefills: list[int], depths: list[int], batches: list[int], new: int) -> list[Cell]:
    """All cells of a run; batch 1 is the decode at depth 0 and adds no cell."""
    cells = [Cell("prefill", n) for n in prefills]
    cells += [Cell(kind, depth, new) for depth in depths for kind in ("decode", "share")]
    return cells + [Cell("batch", BATCH_PROMPT_TOKENS, new, n) for n in batches if n > 1]


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement of a cell: tokens, seconds of wall clock, and of the processor (None: not known).

    read_rate: of a share cell, the bytes a second read between the steps.
    """

    tokens: int
    seconds: float
    cpu_s: float | None
    read_rate: float | None = None

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds
