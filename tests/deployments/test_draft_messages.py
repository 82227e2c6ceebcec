"""The wire form of the draft channel."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from deployments.draft_messages import (
    MOST_BYTES,
    BadMessage,
    answers_of,
    calls_of,
    pack_answer,
    pack_feed,
    pack_propose,
    unpack,
)
from serve_app.engine.speculation.draft_call import DraftCall, Drafted, SampledTokens, SamplingChain
from serve_app.engine.speculation.draft_sampler import CANDIDATES
from serve_app.engine.speculation.proposer import DraftWish
from tests.deployments.draft_process import sampled


def packed_calls(calls: Sequence[DraftCall]) -> memoryview:
    """Those of epoch 5."""
    numbers = [n for call in calls for n in (call.sequence, call.base, len(call.token_ids), call.max_tokens)]
    token_ids = [token_id for call in calls for token_id in call.token_ids]
    return memoryview(pack_propose(5, 0.25, 77.5, numbers, token_ids, [call.chain for call in calls]))  # type: ignore[arg-type]


def wishes_of(calls: Sequence[DraftCall]) -> list[DraftWish]:
    """Which the calls would come from."""
    return [
        DraftWish(call.sequence, [0] * call.base + list(call.token_ids), 1, call.max_tokens)  # type: ignore[arg-type]
        for call in calls
    ]


def test_messages_that_are_none() -> None:
    whole = packed_calls([DraftCall(2**40, 7, [1, 2, 3], 4), DraftCall(1, 0, [], 1)])
    message = unpack(whole)
    assert (message.epoch, message.seconds, message.sent_s, message.token_ids) == (5, 0.25, 77.5, [1, 2, 3])
    assert message.rows == [(2**40, 7, 3, 4), (1, 0, 0, 1)]
    for size in range(len(whole)):
        with pytest.raises(BadMessage):
            unpack(whole[:size])
    with pytest.raises(BadMessage):
        unpack(memoryview(bytes(whole) + b"\0\0\0\0"))
    assert unpack(memoryview(pack_feed(1, 2, 3, [4]))).rows == [(2, 3, 1, 0)]


def test_messages_about_sampled_tokens() -> None:
    chain = SamplingChain(0.7, 5, 0.9, 0.01)
    calls = [DraftCall(3, 7, [1, 2], 4, chain), DraftCall(4, 0, [5], 4), DraftCall(5, 1, [], 2, chain)]
    whole = packed_calls(calls)
    assert calls_of(unpack(whole), 9) == [replace(call, sequence=(9, call.sequence)) for call in calls]
    # Where nothing is sampled, nothing is said of it.
    plain = packed_calls([replace(call, chain=None) for call in calls])
    assert len(whole) == len(plain) + 3 * 32
    proposed = sampled([8, 9], 3)
    answers: list[Drafted] = [proposed, [7], None]
    packed = memoryview(pack_answer(5, 0.0, unpack(whole).rows, answers))
    first, second, third = answers_of(unpack(packed), wishes_of(calls))
    assert isinstance(first, SampledTokens)
    assert list(first) == [8, 9]
    assert (first.candidates == [[8, 9, 10], [9, 10, 11]]).all()
    assert (first.chances == proposed.chances).all()
    assert (second, third) == ([7], None)
    assert len(packed) == len(pack_answer(5, 0.0, unpack(whole).rows, [[8, 9], [7], None])) + 2 * 3 * 8
    for message in (whole, packed):
        for size in range(len(message)):
            with pytest.raises(BadMessage):
                unpack(message[:size])
        with pytest.raises(BadMessage):
            unpack(memoryview(bytes(message) + b"\0\0\0\0"))
    # A longer answer than was asked for, and one to another text.
    short = [replace(calls[0], max_tokens=1), replace(calls[1], token_ids=[5, 6]), calls[2]]
    first, second, third = answers_of(unpack(packed), wishes_of(short))
    assert isinstance(first, SampledTokens)
    assert (list(first), first.candidates.tolist(), second, third) == ([8], [[8, 9, 10]], [], None)


@pytest.mark.parametrize(("num_calls", "num_tokens", "num_whole"), [(32, 8, 32), (64, 16, 30)])
def test_candidates_that_fit_no_message_stay_behind(num_calls: int, num_tokens: int, num_whole: int) -> None:
    calls = [DraftCall(i, 0, [1], num_tokens, SamplingChain()) for i in range(num_calls)]
    rows = unpack(packed_calls(calls)).rows
    answers = [sampled(list(range(i + 1, i + 1 + num_tokens)), CANDIDATES) for i in range(num_calls)]
    packed = pack_answer(1, 0.0, rows, answers)
    assert len(packed) <= MOST_BYTES
    found = answers_of(unpack(memoryview(packed)), wishes_of(calls))
    assert [list(drafted or ()) for drafted in found] == [list(drafted) for drafted in answers]
    kinds = [isinstance(drafted, SampledTokens) for drafted in found]
    assert kinds == [True] * num_whole + [False] * (num_calls - num_whole)
