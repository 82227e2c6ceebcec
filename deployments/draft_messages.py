"""The wire form of the draft channel: one message is one packet, little-endian, without padding.

    target -> draft   PROPOSE count epoch limit, by call: sequence base count max_tokens; then the token ids of all
                      FEED    1     epoch 0,     sequence base count 0; then the token ids
                      FORGET  count epoch 0,     by sequence: sequence 0 0 0
    draft -> target   ANSWER  count epoch 0,     by call: sequence length count 0; then the token ids of all

epoch numbers the calls of one channel; an answer has its call's. base: tokens of the sequence before those of the
message; length: those that the draft knows now, behind which its answer belongs. count NOT_KNOWN in an answer: the
draft does not know the sequence up to its base. limit: seconds that the draft may take.
"""

import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from serve_app.engine.speculation.draft_call import DraftCall, Drafted

PROPOSE, FEED, FORGET, ANSWER = range(1, 5)

MOST_IDS = 8192
"""Token ids of one message from a target; there are further ones before it where a sequence has more."""
MOST_BYTES = 1 << 17
"""Of one message, either way: what a socket takes by default is more."""
NOT_KNOWN = 0xFFFFFFFF

_HEAD = struct.Struct("<BHId")
_CALL = struct.Struct("<QIII")
_ID_BYTES = 4

Buffer: TypeAlias = bytes | bytearray | memoryview


class BadMessage(Exception):
    """Bytes that are not a message of this protocol."""


@dataclass(frozen=True, slots=True)
class Message:
    """Any of the messages. rows: sequence, base, number of ids and max_tokens of each call, or what stands there."""

    kind: int
    epoch: int
    limit_s: float
    rows: list[tuple[int, int, int, int]]
    token_ids: list[int]


def pack_propose(epoch: int, limit_s: float, calls: Sequence[DraftCall]) -> bytes:
    """Calls whose sequences are numbers."""
    parts = [_HEAD.pack(PROPOSE, len(calls), epoch, limit_s)]
    ids = array("i")
    for call in calls:
        assert isinstance(call.sequence, int)
        parts.append(_CALL.pack(call.sequence, call.base, len(call.token_ids), call.max_tokens))
        ids.extend(call.token_ids)
    parts.append(ids.tobytes())
    return b"".join(parts)


def pack_feed(epoch: int, sequence: int, base: int, token_ids: Sequence[int]) -> bytes:
    """At most MOST_IDS tokens."""
    head = _HEAD.pack(FEED, 1, epoch, 0.0) + _CALL.pack(sequence, base, len(token_ids), 0)
    return head + array("i", token_ids).tobytes()


def pack_forget(epoch: int, sequences: Sequence[int]) -> bytes:
    """Sequences that ended."""
    return _HEAD.pack(FORGET, len(sequences), epoch, 0.0) + b"".join(_CALL.pack(i, 0, 0, 0) for i in sequences)


def pack_answer(epoch: int, calls: Sequence[DraftCall], answers: Sequence[Drafted]) -> bytes:
    """The answers to calls, in their order."""
    parts = [_HEAD.pack(ANSWER, len(calls), epoch, 0.0)]
    ids = array("i")
    for call, drafted in zip(calls, answers, strict=True):
        assert isinstance(call.sequence, int)
        count = NOT_KNOWN if drafted is None else len(drafted)
        parts.append(_CALL.pack(call.sequence, call.base + len(call.token_ids), count, 0))
        ids.extend(drafted or ())
    parts.append(ids.tobytes())
    return b"".join(parts)


def unpack(message: Buffer) -> Message:
    """Raises BadMessage."""
    try:
        kind, count, epoch, limit_s = _HEAD.unpack_from(message)
        end = _HEAD.size + count * _CALL.size
        rows = list(_CALL.iter_unpack(message[_HEAD.size : end]))
        ids = array("i")
        ids.frombytes(message[end:])
    except (struct.error, ValueError) as error:
        raise BadMessage(str(error)) from error
    if len(rows) != count or len(ids) != sum(row[2] for row in rows if row[2] != NOT_KNOWN):
        raise BadMessage(f"{len(rows)} rows of {count}, {len(ids)} token ids")
    return Message(kind, epoch, limit_s, rows, ids.tolist())


def calls_of(message: Message) -> list[DraftCall]:
    """Of a PROPOSE."""
    calls, start = [], 0
    for sequence, base, count, max_tokens in message.rows:
        calls.append(DraftCall(sequence, base, message.token_ids[start : start + count], max_tokens))
        start += count
    return calls


def answers_of(message: Message, calls: Sequence[DraftCall]) -> list[Drafted]:
    """Of an ANSWER to these calls; one that belongs to another text is as good as none. Raises BadMessage."""
    if message.kind != ANSWER or len(message.rows) != len(calls):
        raise BadMessage(f"{len(message.rows)} answers to {len(calls)} calls")
    answers: list[Drafted] = []
    start = 0
    for (sequence, length, count, _), call in zip(message.rows, calls, strict=True):
        if count == NOT_KNOWN:
            answers.append(None)
            continue
        fits = sequence == call.sequence and length == call.base + len(call.token_ids)
        answers.append(message.token_ids[start : start + count][: call.max_tokens] if fits else [])
        start += count
    return answers
