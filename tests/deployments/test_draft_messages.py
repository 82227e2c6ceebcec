"""What a target and a draft tell each other."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from deployments.draft_messages import (
    MOST_BYTES,
    Answer,
    Answers,
    BadMessage,
    Call,
    Calls,
    Feed,
    Forget,
    OfferMailbox,
    Ring,
    answers_to,
    call_of,
    draft_calls,
    drafts_of,
    pack,
    read_by_draft,
    read_by_target,
)
from serve_app.engine.speculation.draft_call import DraftCall, Drafted, SampledTokens, SamplingChain
from serve_app.engine.speculation.draft_sampler import CANDIDATES
from serve_app.engine.speculation.proposer import DraftWish
from tests.deployments.draft_process import sampled

CHAIN = SamplingChain(0.7, 5, 0.9, 0.01)


def wishes(chain: SamplingChain | None = None) -> list[DraftWish]:
    return [DraftWish(2**40, [9] * 7 + [1, 2], 1, 4, chain), DraftWish(1, [5], 1, 4), DraftWish(3, [6], 1, 2, chain)]


def calls(chain: SamplingChain | None = None) -> list[Call]:
    """Those of wishes(), of whose first one 7 tokens were told, and of the last one all."""
    return [call_of(wish, base) for wish, base in zip(wishes(chain), (7, 0, 1), strict=True)]


def exchanged(answers: Answers) -> Answers:
    """As they come to the target."""
    packed = pack(answers)
    assert len(packed) <= MOST_BYTES
    found = read_by_target(packed)
    assert isinstance(found, Answers)
    return found


@pytest.mark.parametrize("chain", [None, CHAIN])
def test_calls_come_as_they_were(chain: SamplingChain | None) -> None:
    message = read_by_draft(memoryview(pack(Calls(5, 0.25, 77.5, calls(chain)))))
    assert isinstance(message, Calls)
    assert (message.epoch, message.limit_s, message.sent_s) == (5, 0.25, 77.5)
    assert draft_calls(message.calls, 9) == [
        DraftCall((9, 2**40), 7, [1, 2], 4, chain),
        DraftCall((9, 1), 0, [5], 4),
        DraftCall((9, 3), 1, [], 2, chain),
    ]


@pytest.mark.parametrize("message", [Feed(2, 3, [4]), Forget([1, 2]), OfferMailbox(), Ring()])
def test_other_messages(message: Feed | Forget | OfferMailbox | Ring) -> None:
    assert read_by_draft(pack(message)) == message
    if not isinstance(message, Ring):
        with pytest.raises(BadMessage):
            read_by_target(pack(message))


def test_messages_that_are_none() -> None:
    good = [Call(2, 3, [4, 5], 6, None)]
    for whole in (pack(Calls(1, 0.5, 0.5, good)), pack(Feed(1, 2, [3]))):
        read_by_draft(whole)
        for size in range(len(whole)):
            with pytest.raises(BadMessage):
                read_by_draft(whole[:size])
        with pytest.raises(BadMessage):
            read_by_draft(whole + b"\0")
        with pytest.raises(BadMessage):
            read_by_target(whole)
    # What is wrong stands in messages that are right otherwise.
    assert read_by_draft(pack([1, 1, 0.5, 0.5, [[2, 3, [4, 5], 6, None]]])) == Calls(1, 0.5, 0.5, good)
    assert read_by_target(pack([6, 1, 0.5, [[2, 3, [4]]]])) == Answers(1, 0.5, [Answer(2, 3, [4])])
    for bad in (
        [-1, 3, [4], 6, None],
        [2, -3, [4], 6, None],
        [2, 3, [4], 0, None],
        [2, 3, ["a"], 6, None],
        [2, 3, [4, -1], 6, None],
        [2, 3, [2**31], 6, None],
        [2, 3, [4], 6, [0.5, 1]],
        [2, 3, [4], 6],
    ):
        with pytest.raises(BadMessage):
            read_by_draft(pack([1, 1, 0.5, 0.5, [[2, 3, [4, 5], 6, None], bad]]))
    with pytest.raises(BadMessage):
        read_by_target(pack([6, 1, 0.5, [[2, 3, [0.5]]]]))


def test_sampled_tokens_come_with_what_from() -> None:
    proposed = sampled([8, 9], 3)
    answers = exchanged(answers_to(calls(CHAIN), 5, 0.5, [proposed, [7], None]))
    assert (answers.epoch, answers.work_s) == (5, 0.5)
    first, second, third = drafts_of(answers, wishes(CHAIN))
    assert isinstance(first, SampledTokens)
    assert list(first) == [8, 9]
    assert (first.candidates == [[8, 9, 10], [9, 10, 11]]).all()
    assert (first.chances == proposed.chances).all()
    assert (second, third) == ([7], None)
    # A longer answer than was asked for, and one to another text.
    one, two, three = wishes(CHAIN)
    first, second, third = drafts_of(answers, [replace(one, max_tokens=1), replace(two, token_ids=[5, 6]), three])
    assert isinstance(first, SampledTokens)
    assert (list(first), first.candidates.tolist(), second, third) == ([8], [[8, 9, 10]], [], None)


@pytest.mark.parametrize(
    "answer",
    [
        Answer(1, 1, [8, 9], b"123", b"123"),
        Answer(1, 1, [8, 9], bytes(12), bytes(12)),
        Answer(1, 1, [8, 9], bytes(16), bytes(8)),
        Answer(1, 1, [], bytes(16), bytes(16)),
    ],
)
def test_candidates_that_do_not_fit(answer: Answer) -> None:
    [wish] = [DraftWish(1, [5], 1, 4)]
    with pytest.raises(BadMessage):
        drafts_of(exchanged(Answers(1, 0.0, [answer])), [wish])
    with pytest.raises(BadMessage):
        drafts_of(Answers(1, 0.0, []), [wish])


@pytest.mark.parametrize(("num_calls", "num_tokens", "num_whole"), [(32, 8, 32), (64, 16, 30)])
def test_candidates_that_fit_no_message_stay_behind(num_calls: int, num_tokens: int, num_whole: int) -> None:
    asked = [DraftWish(i, [1], 1, num_tokens, SamplingChain()) for i in range(num_calls)]
    drafts: Sequence[Drafted] = [sampled(list(range(i + 1, i + 1 + num_tokens)), CANDIDATES) for i in range(num_calls)]
    found = drafts_of(exchanged(answers_to([call_of(wish, 0) for wish in asked], 1, 0.0, drafts)), asked)
    assert [list(drafted or ()) for drafted in found] == [list(drafted or ()) for drafted in drafts]
    kinds = [isinstance(drafted, SampledTokens) for drafted in found]
    assert kinds == [True] * num_whole + [False] * (num_calls - num_whole)
