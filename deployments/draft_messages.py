"""The wire form of the draft channel: one message is one packet, little-endian, without padding.

    target -> draft   PROPOSE count epoch limit, by call: sequence base count max_tokens; then the token ids of all
                      FEED    1     epoch 0,     sequence base count 0; then the token ids
                      FORGET  count epoch 0,     by sequence: sequence 0 0 0
    draft -> target   ANSWER  count epoch 0,     by call: sequence length count 0; then the token ids of all

The head is a byte, 16 bits, 32 bits and a float64, a row four int64, a token id an int32.

epoch numbers the calls of one channel; an answer has its call's. base: tokens of the sequence before those of the
message; length: those that the draft knows now, behind which its answer belongs. count NOT_KNOWN in an answer: the
draft does not know the sequence up to its base. limit: seconds that the draft may take.
"""

import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from serve_app.engine.speculation.draft_call import DraftCall, Drafted

PROPOSE, FEED, FORGET, ANSWER = range(1, 5)

MOST_IDS = 8192
"""Token ids of one message from a target; there are further ones before it where a sequence has more."""
MOST_BYTES = 1 << 17
"""Of one message, either way: what a socket takes by default is more."""
NOT_KNOWN = -1

_HEAD = struct.Struct("<BHId")
_ROW_BYTES = 32


class BadMessage(Exception):
    """Bytes that are not a message of this protocol."""


@dataclass(slots=True)
class Message:
    """Any of the messages. numbers: sequence, base, count and max_tokens of each row, one after the other, or what
    stands there."""

    kind: int
    epoch: int
    limit_s: float
    numbers: list[int]
    token_ids: list[int]


def pack_propose(epoch: int, limit_s: float, calls: Sequence[DraftCall]) -> bytes:
    """Calls whose sequences are numbers."""
    rows: list[Any] = []
    ids = array("i")
    for call in calls:
        rows += (call.sequence, call.base, len(call.token_ids), call.max_tokens)
        ids.extend(call.token_ids)
    return _HEAD.pack(PROPOSE, len(calls), epoch, limit_s) + array("q", rows).tobytes() + ids.tobytes()


def pack_feed(epoch: int, sequence: int, base: int, token_ids: Sequence[int]) -> bytes:
    """At most MOST_IDS tokens."""
    row = array("q", (sequence, base, len(token_ids), 0))
    return _HEAD.pack(FEED, 1, epoch, 0.0) + row.tobytes() + array("i", token_ids).tobytes()


def pack_forget(epoch: int, sequences: Sequence[int]) -> bytes:
    """Sequences that ended."""
    rows = array("q", [number for sequence in sequences for number in (sequence, 0, 0, 0)])
    return _HEAD.pack(FORGET, len(sequences), epoch, 0.0) + rows.tobytes()


def pack_answer(epoch: int, numbers: Sequence[int], answers: Sequence[Drafted]) -> bytes:
    """The answers to calls, in their order; numbers: of the message that they came with."""
    rows: list[int] = []
    ids = array("i")
    for drafted, sequence, base, count in zip(answers, numbers[::4], numbers[1::4], numbers[2::4], strict=True):
        rows += (sequence, base + count, NOT_KNOWN if drafted is None else len(drafted), 0)
        if drafted:
            ids.extend(drafted)
    return _HEAD.pack(ANSWER, len(answers), epoch, 0.0) + array("q", rows).tobytes() + ids.tobytes()


def unpack(message: memoryview) -> Message:
    """Raises BadMessage."""
    numbers, ids = array("q"), array("i")
    try:
        kind, count, epoch, limit_s = _HEAD.unpack_from(message)
        end = _HEAD.size + count * _ROW_BYTES
        numbers.frombytes(message[_HEAD.size : end])
        ids.frombytes(message[end:])
    except (struct.error, ValueError) as error:
        raise BadMessage(str(error)) from error
    rows = numbers.tolist()
    if len(rows) != 4 * count or len(ids) != sum([n for n in rows[2::4] if n > 0]):
        raise BadMessage(f"{len(rows)} numbers for {count} rows, {len(ids)} token ids")
    return Message(kind, epoch, limit_s, rows, ids.tolist())


def calls_of(message: Message, owner: int) -> list[DraftCall]:
    """Of a PROPOSE; their sequences are called (owner, number). Raises BadMessage."""
    calls, start = [], 0
    numbers, ids = message.numbers, message.token_ids
    for sequence, base, count, most in zip(numbers[::4], numbers[1::4], numbers[2::4], numbers[3::4], strict=True):
        if min(sequence, base, count) < 0 or most < 1:
            raise BadMessage(f"a call of {sequence, base, count, most}")
        calls.append(DraftCall((owner, sequence), base, ids[start : start + count], most))
        start += count
    return calls


def answers_of(message: Message, calls: Sequence[DraftCall]) -> list[Drafted]:
    """Of an ANSWER to these calls; one that belongs to another text is as good as none. Raises BadMessage."""
    numbers, ids = message.numbers, message.token_ids
    if message.kind != ANSWER or len(numbers) != 4 * len(calls):
        raise BadMessage(f"{len(numbers) // 4} answers to {len(calls)} calls")
    answers: list[Drafted] = []
    start = 0
    for call, sequence, length, count in zip(calls, numbers[::4], numbers[1::4], numbers[2::4], strict=True):
        if count < 0:
            answers.append(None)
            continue
        fits = sequence == call.sequence and length == call.base + len(call.token_ids)
        answers.append(ids[start : start + min(count, call.max_tokens)] if fits else [])
        start += count
    return answers
