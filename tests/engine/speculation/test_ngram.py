"""Prompt lookup against a search through the whole sequence."""

import random
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from serve_app.engine.speculation.ngram import NgramProposer
from serve_app.engine.speculation.proposer import DraftWish

FEW_TOKENS = st.lists(st.sampled_from([0, 1, 2, 2**31]), max_size=60)


def looked_up(tokens: Sequence[int], max_tokens: int, min_n: int, max_n: int) -> list[int]:
    """What the longest n-gram's latest occurrence was followed by, found by looking at every position."""
    tokens = list(tokens)
    for n in range(max_n, min_n - 1, -1):
        for end in range(len(tokens) - 1, n - 1, -1):
            if len(tokens) >= n and tokens[end - n : end] == tokens[len(tokens) - n :]:
                period = len(tokens) - end
                return [tokens[end + i % period] for i in range(max_tokens)]
    return []


@given(FEW_TOKENS, FEW_TOKENS, st.integers(1, 3), st.integers(0, 3), st.integers(1, 7), st.integers(1, 5))
def test_proposes_what_a_search_finds(
    prompt: list[int], output: list[int], min_n: int, longer: int, max_tokens: int, stride: int
) -> None:
    proposer = NgramProposer(min_n, min_n + longer)
    proposer.admit(7, prompt)
    tokens = list(prompt)
    for start in range(0, len(output), stride):
        tokens += output[start : start + stride]
        (proposed,) = proposer.propose([DraftWish(7, tokens, len(prompt), max_tokens)])
        assert proposed == looked_up(tokens, max_tokens, min_n, min_n + longer)


def test_sequences_share_nothing_and_a_wish_needs_no_admission() -> None:
    proposer = NgramProposer()
    proposer.admit(1, [1, 2, 3, 4, 5])
    wishes = [DraftWish(1, [1, 2, 3, 4, 5, 1, 2], 5, 3), DraftWish(2, [3, 1, 2], 3, 3), DraftWish(3, [6, 6, 6], 3, 2)]
    assert proposer.propose(wishes) == [[3, 4, 5], [], [6, 6]]


def test_forgets() -> None:
    proposer = NgramProposer()
    proposer.admit(1, [1, 2, 3, 1, 2])
    proposer.forget(1)
    proposer.forget(1)
    proposer.forget(2)
    assert proposer.propose([DraftWish(1, [4, 1, 2], 3, 3)]) == [[]]


class CountedReads(list[int]):
    """Counts the items that are read one by one or by slices."""

    reads = 0

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        found = super().__getitem__(index)
        self.reads += len(found) if isinstance(index, slice) else 1
        return found


def test_a_step_reads_no_more_of_a_long_sequence_than_of_a_short_one() -> None:
    generator = random.Random(1)
    proposer = NgramProposer()
    tokens = CountedReads(generator.choices(range(20), k=20_000))
    proposer.admit(1, tokens)
    for _ in range(50):
        tokens.append(generator.randrange(20))
        tokens.reads = 0
        proposer.propose([DraftWish(1, tokens, 20_000, 4)])
        assert tokens.reads <= 24
