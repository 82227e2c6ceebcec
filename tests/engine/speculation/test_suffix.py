"""The suffix index against counts taken over whole texts."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.engine.speculation.proposer import DraftWish
from serve_app.engine.speculation.suffix import SuffixProposer

DEPTH = 4
MIN_PROBABILITY = 0.2


@dataclass
class KnownText:
    scope: bytes
    tokens: list[int] = field(default_factory=list)
    num_indexed: int = 0
    num_removed: int = 0
    is_frozen: bool = False

    def follows(self, context: Sequence[int]) -> list[int | None]:
        """What follows each occurrence of the context that is in the index; None where nothing does."""
        n = len(context)
        return [
            self.tokens[start + n] if start + n < self.num_indexed else None
            for start in range(self.num_removed, self.num_indexed - n + 1)
            if self.tokens[start : start + n] == list(context)
        ]


class CountingIndex:
    """What a SuffixProposer must know, kept as texts, and what it may say."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.running: dict[int, KnownText] = {}
        self.finished: list[KnownText] = []

    def num_tokens(self) -> int:
        return sum(text.num_indexed - text.num_removed for text in [*self.running.values(), *self.finished])

    def add(self, sequence: int, tokens: Sequence[int]) -> None:
        text = self.running[sequence]
        for token in tokens:
            if text.is_frozen:
                return
            if self.num_tokens() >= self.max_tokens:
                oldest = next((t for t in self.finished if t.num_removed < t.num_indexed), None)
                if oldest is None:
                    text.is_frozen = True
                    return
                oldest.num_removed += 1
            text.tokens.append(token)
            text.num_indexed += 1

    def follows(self, scope: bytes, context: Sequence[int]) -> list[int | None]:
        texts = [t for t in [*self.running.values(), *self.finished] if t.scope == scope]
        return [token for text in texts for token in text.follows(context)]

    def check(self, sequence: int, proposed: list[int], max_tokens: int) -> None:
        """Asserts that it is what counting gives, ties however decided."""
        text = self.running[sequence]
        if text.is_frozen:
            assert not proposed
            return
        said: list[int] = []
        probability = 1.0
        longest = range(min(DEPTH - 1, len(text.tokens)), 0, -1)
        length = next((n for n in longest if any_known(self.follows(text.scope, text.tokens[-n:]))), None)
        while length is not None and len(said) < max_tokens:
            context = [*text.tokens, *said][-length - len(said) :]
            follows = self.follows(text.scope, context)
            counts = Counter(token for token in follows if token is not None)
            if len(context) >= DEPTH or not counts:
                self.check_read(text, context, proposed, len(said), probability)
                return
            total = len(follows) if said else len(follows) - 1
            highest = max(counts.values())
            probability *= highest / (total + 1 / len(context))
            if probability < MIN_PROBABILITY:
                break
            assert len(proposed) > len(said)
            assert counts[proposed[len(said)]] == highest
            said.append(proposed[len(said)])
        assert proposed == said

    def check_read(
        self, reader: KnownText, context: list[int], proposed: list[int], num_said: int, probability: float
    ) -> None:
        """Where counts end, the rest of a proposal must follow the context somewhere, the proposal itself included."""
        rest = proposed[num_said:]
        for length in range(len(context), len(context) + len(rest)):
            probability *= 1 / (1 + 1 / length)
        assert not rest or probability >= MIN_PROBABILITY
        wanted = context + rest
        for text in [*self.running.values(), *self.finished]:
            known = text.tokens + (proposed if text is reader else [])
            if text.scope == reader.scope and any(
                known[start : start + len(wanted)] == wanted for start in range(len(text.tokens) - len(context) + 1)
            ):
                return
        raise AssertionError((context, rest))


def any_known(follows: list[int | None]) -> bool:
    return any(token is not None for token in follows)


TOKENS = st.lists(st.sampled_from([0, 1, 2, 2**31]), max_size=9)
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("admit"), TOKENS, st.sampled_from([b"", b"", b"tenant"])),
        st.tuples(st.just("step"), st.integers(0, 5), TOKENS, st.integers(1, 6)),
        st.tuples(st.just("step"), st.integers(0, 5), TOKENS, st.integers(1, 6)),
        st.tuples(st.just("forget"), st.integers(0, 5), TOKENS),
    ),
    max_size=25,
)


@settings(max_examples=400)
@given(OPERATIONS, st.sampled_from([12, 30, 10_000]))
def test_proposes_what_counting_gives(operations: list[tuple], max_tokens: int) -> None:
    proposer = SuffixProposer(max_tokens, DEPTH, MIN_PROBABILITY)
    model = CountingIndex(max_tokens)
    said: dict[int, list[int]] = {}
    for number, (what, *args) in enumerate(operations):
        if what == "admit":
            tokens, scope = args
            proposer.admit(number, tokens, scope)
            said[number] = list(tokens)
            model.running[number] = KnownText(scope)
            model.add(number, tokens)
            continue
        if not said:
            continue
        sequence = sorted(said)[args[0] % len(said)]
        said[sequence] += args[1]
        model.add(sequence, args[1])
        if what == "step":
            (proposed,) = proposer.propose([DraftWish(sequence, said[sequence], 0, args[2])])
            model.check(sequence, proposed, args[2])
        else:
            proposer.forget(sequence, said.pop(sequence))
            model.finished.append(model.running.pop(sequence))
        assert proposer.num_tokens == model.num_tokens() <= max_tokens
        assert proposer.num_nodes <= 2 + DEPTH * proposer.num_tokens


def test_continues_another_sequence_past_the_depth_and_its_own_repetition_without_end() -> None:
    text = list(range(100, 140))
    proposer = SuffixProposer(depth=4)
    proposer.admit(1, text)
    proposer.forget(1)
    # Four tokens match: so three times as many are likely enough.
    assert proposer.propose([DraftWish(2, [7, *text[:4]], 1, 32)]) == [text[4:13]]
    assert proposer.propose([DraftWish(3, [5, 6] * 9, 1, 8)]) == [[5, 6, 5, 6, 5, 6, 5, 6]]


def test_the_more_frequent_wins_then_the_later_and_doubt_ends_it() -> None:
    proposer = SuffixProposer(depth=8, min_probability=0.35)
    for number, tokens in enumerate([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 8, 9]]):
        proposer.admit(number, tokens)
        proposer.forget(number)
    # 3 follows in three of four cases, 4 in two of three: 0.75 and 0.5 before the discount.
    assert proposer.propose([DraftWish(9, [6, 1, 2], 3, 8)]) == [[3, 4]]
    proposer.admit(10, [1, 2, 8, 7])
    proposer.admit(11, [1, 2, 8, 7])
    assert proposer.propose([DraftWish(9, [6, 1, 2, 8], 3, 1)]) == [[7]]
    assert proposer.propose([DraftWish(12, [6, 1, 2], 3, 1)]) == [[8]]
    assert SuffixProposer(depth=8, min_probability=0.6).propose([DraftWish(9, [1, 2, 3, 1, 2], 3, 8)]) == [[3]]


def test_scopes_see_nothing_of_each_other() -> None:
    proposer = SuffixProposer()
    proposer.admit(1, [1, 2, 3, 4], b"a")
    proposer.admit(2, [1, 2, 3], b"b")
    proposer.admit(3, [1, 2, 3], b"a")
    wishes = [DraftWish(2, [1, 2, 3], 3, 4), DraftWish(3, [1, 2, 3], 3, 4), DraftWish(4, [1, 2, 3], 3, 4)]
    assert proposer.propose(wishes) == [[], [4], []]


def test_finished_texts_make_room_and_leave_nothing_behind() -> None:
    generator = random.Random(2)
    proposer = SuffixProposer(max_tokens=2000, depth=6)
    most = 0
    for number in range(300):
        tokens = generator.choices(range(30), k=generator.randrange(1, 120))
        proposer.admit(number, tokens, b"tenant %d" % (number % 3))
        if number >= 4:
            proposer.forget(number - 4)
        assert proposer.num_tokens <= 2000
        most = max(most, proposer.num_nodes)
    assert most <= 6 * 2000
    for number in range(300):
        proposer.forget(number)
    proposer.admit(1000, [5] * 2000)
    for _ in range(20):
        proposer.propose([])
    assert proposer.num_tokens == 2000
    # The root of its scope, and one node a depth: nothing of the 300 is left.
    assert proposer.num_nodes == 1 + 6


def test_running_texts_may_fill_the_index() -> None:
    proposer = SuffixProposer(max_tokens=10)
    proposer.admit(1, [1, 2, 3] * 3)
    assert proposer.propose([DraftWish(1, [1, 2, 3] * 3 + [1], 9, 2)]) == [[2, 3]]
    assert proposer.propose([DraftWish(1, [1, 2, 3] * 3 + [1, 2], 9, 2)]) == [[]]
    assert proposer.num_tokens == 10
    proposer.forget(1)
    assert proposer.propose([DraftWish(2, [4, 5, 4, 5, 4], 1, 2)]) == [[5, 4]]
    assert proposer.num_tokens == 10


@pytest.mark.parametrize("is_finished", [False, True])
def test_a_long_prompt_enters_over_several_calls(is_finished: bool) -> None:
    prompt = list(range(3000))
    proposer = SuffixProposer()
    proposer.admit(1, prompt)
    if is_finished:
        proposer.forget(1)
    before = proposer.num_tokens
    num_calls = 0
    while proposer.num_tokens < 3000:
        proposer.propose([])
        assert 0 < proposer.num_tokens - before <= 300
        before = proposer.num_tokens
        num_calls += 1
    assert num_calls > 5
    assert proposer.propose([DraftWish(2, prompt[2990:2995], 5, 3)]) == [prompt[2995:2998]]


def test_a_sequence_that_is_behind_gets_no_proposal_until_it_caught_up() -> None:
    prompt = [*range(2000), 5, 6, 7]
    proposer = SuffixProposer()
    proposer.admit(1, prompt)
    answers = [proposer.propose([DraftWish(1, prompt, 2003, 2)])[0] for _ in range(12)]
    assert answers[0] == []
    assert answers[-1] == [8, 9]


def test_close_forgets_all() -> None:
    proposer = SuffixProposer()
    proposer.admit(1, [1, 2, 3])
    proposer.close()
    assert proposer.num_tokens == proposer.num_nodes == 0
    assert proposer.propose([DraftWish(2, [1, 2], 2, 3)]) == [[]]
