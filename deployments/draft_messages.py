"""The wire form of the draft channel: one message is one packet, little-endian, without padding.

    target -> draft   PROPOSE count epoch limit sent, by call: sequence base count max_tokens; then the token ids of all
                      SAMPLE  the same; then by call: temperature top_k top_p min_p, all 0 where nothing is sampled
                      FEED    1     epoch 0 0,   sequence base count 0; then the token ids
                      FORGET  count epoch 0 0,   by sequence: sequence 0 0 0
    draft -> target   ANSWER  count epoch work 0, by call: sequence length count width; then the token ids of all; then
                                                  by call: candidates [count, width], chances [count, width]

The head is a byte, 16 bits, 32 bits and two float64, a row four int64, a token id or candidate an int32, a chance a
float32, a sampling parameter a float64.

epoch numbers the calls of one channel; an answer has its call's. base: tokens of the sequence before those of the
message; length: those that the draft knows now, behind which its answer belongs. count NOT_KNOWN in an answer: the
draft does not know the sequence up to its base. limit: seconds that the draft may take; work: those that it has taken,
also for what it had begun when the call was sent: CLOCK_MONOTONIC, which is one clock for all processes of a node.
width: of sampled tokens the number of candidates, see SampledTokens; else 0. Where a message would become too long it
is 0 as well: such tokens are verified as any others, and rarely accepted.
"""

import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from serve_app.engine.speculation.draft_call import Draft, DraftCall, Drafted, SampledTokens, SamplingChain
from serve_app.engine.speculation.proposer import DraftWish

PROPOSE, FEED, FORGET, ANSWER, SAMPLE = range(1, 6)

MOST_IDS = 8192
"""Token ids of one message from a target; there are further ones before it where a sequence has more."""
MOST_BYTES = 1 << 17
"""Of one message, either way: what a socket takes by default is more."""
NOT_KNOWN = -1

_HEAD = struct.Struct("<BHIdd")
_ROW = struct.Struct("<4q")
_ID_BYTES = 4
# Of a call its sampling parameters, of a candidate id and chance.
_CHAIN = struct.Struct("<4d")
_CANDIDATE_BYTES = 8


class BadMessage(Exception):
    """Bytes that are not a message of this protocol."""


Row = tuple[int, int, int, int]
"""sequence, base, count and max_tokens, or what stands there."""


# Each step waits for what follows, whose code the models' weights have driven out of the caches by then: the fewer
# operations there are, and kinds of them, the less has to come from memory.


@dataclass(slots=True)
class Message:
    """Any of the messages. seconds: the limit of a call, the work of an answer. sent_s: of a call, when it was sent
    (time.monotonic()). rest: what stands behind the token ids."""

    kind: int
    epoch: int
    seconds: float
    sent_s: float
    rows: list[Row]
    token_ids: list[int]
    rest: bytes


def pack_propose(
    epoch: int,
    limit_s: float,
    sent_s: float,
    numbers: Sequence[int],
    token_ids: Sequence[int],
    chains: Sequence[SamplingChain | None],
) -> bytes:
    """Calls: numbers are those of their rows, one after the other, token_ids those of all, chains one for each. sent_s:
    time.monotonic()."""
    if any(chains):
        kind, rest = SAMPLE, array("d")
        for chain in chains:
            rest.extend((chain.temperature, chain.top_k, chain.top_p, chain.min_p) if chain else (0, 0, 0, 0))
        chain_bytes = rest.tobytes()
    else:
        kind, chain_bytes = PROPOSE, b""
    head = _HEAD.pack(kind, len(chains), epoch, limit_s, sent_s)
    return head + array("q", numbers).tobytes() + array("i", token_ids).tobytes() + chain_bytes


def pack_feed(epoch: int, sequence: int, base: int, token_ids: Sequence[int]) -> bytes:
    """At most MOST_IDS tokens."""
    row = array("q", (sequence, base, len(token_ids), 0))
    return _HEAD.pack(FEED, 1, epoch, 0.0, 0.0) + row.tobytes() + array("i", token_ids).tobytes()


def pack_forget(epoch: int, sequences: Sequence[int]) -> bytes:
    """Sequences that ended."""
    numbers = array("q", [number for sequence in sequences for number in (sequence, 0, 0, 0)])
    return _HEAD.pack(FORGET, len(sequences), epoch, 0.0, 0.0) + numbers.tobytes()


def pack_answer(epoch: int, work_s: float, rows: Sequence[Row], answers: Sequence[Drafted]) -> bytes:
    """The answers to calls, in their order; rows: of the message that they came with."""
    numbers: list[int] = []
    ids: list[int] = []
    is_sampled = False
    for (sequence, base, count, _), drafted in zip(rows, answers, strict=True):
        length = NOT_KNOWN
        if drafted is not None:
            length = len(drafted)
            ids += drafted
            is_sampled |= type(drafted) is SampledTokens
        numbers += (sequence, base + count, length, 0)
    rest = _take_candidates(answers, numbers, len(ids)) if is_sampled else b""
    head = _HEAD.pack(ANSWER, len(answers), epoch, work_s, 0.0)
    return head + array("q", numbers).tobytes() + array("i", ids).tobytes() + rest


def _take_candidates(answers: Sequence[Drafted], numbers: list[int], num_ids: int) -> bytes:
    """Of as many answers as a message has room for; their widths are put into numbers."""
    rest: list[bytes] = []
    room = MOST_BYTES - _HEAD.size - 8 * len(numbers) - _ID_BYTES * num_ids
    for i, drafted in enumerate(answers):
        if isinstance(drafted, SampledTokens) and _CANDIDATE_BYTES * drafted.candidates.size <= room:
            room -= _CANDIDATE_BYTES * drafted.candidates.size
            numbers[4 * i + 3] = drafted.candidates.shape[1]
            rest += (drafted.candidates.tobytes(), drafted.chances.tobytes())
    return b"".join(rest)


def unpack(message: memoryview) -> Message:
    """Raises BadMessage."""
    ids = array("i")
    try:
        kind, count, epoch, seconds, sent_s = _HEAD.unpack_from(message)
        end = _HEAD.size + _ROW.size * count
        rows: list[Row] = list(_ROW.iter_unpack(message[_HEAD.size : end]))
        ids_end = end + _ID_BYTES * sum([row[2] for row in rows if row[2] > 0])
        ids.frombytes(message[end:ids_end])
    except (struct.error, ValueError) as error:
        raise BadMessage(str(error)) from error
    rest_bytes = len(message) - ids_end
    expected = 0
    if kind == SAMPLE:
        expected = _CHAIN.size * count
    elif kind == ANSWER and any(widths := [row[3] for row in rows]):
        if min(widths) < 0:
            raise BadMessage("fewer than no candidates")
        expected = sum([_CANDIDATE_BYTES * max(0, row[2]) * row[3] for row in rows])
    if len(rows) != count or rest_bytes != expected:
        raise BadMessage(f"{len(rows)} rows of {count}, {len(ids)} token ids, {rest_bytes} bytes more")
    rest = bytes(message[ids_end:]) if rest_bytes else b""
    return Message(kind, epoch, seconds, sent_s, rows, ids.tolist(), rest)


def calls_of(message: Message, owner: int) -> list[DraftCall]:
    """Of a PROPOSE or SAMPLE; their sequences are called (owner, number). Raises BadMessage."""
    calls, start = [], 0
    ids = message.token_ids
    for sequence, base, count, most in message.rows:
        if sequence < 0 or base < 0 or count < 0 or most < 1:
            raise BadMessage(f"a call of {sequence, base, count, most}")
        calls.append(DraftCall((owner, sequence), base, ids[start : start + count], most))
        start += count
    if message.kind == SAMPLE:
        for call, (temperature, top_k, top_p, min_p) in zip(calls, _CHAIN.iter_unpack(message.rest), strict=True):
            if temperature > 0:
                call.chain = SamplingChain(temperature, int(top_k), top_p, min_p)
    return calls


def answers_of(message: Message, wishes: Sequence[DraftWish]) -> list[Drafted]:
    """Of an ANSWER to calls of these texts; one that belongs to another text is as good as none. Raises BadMessage."""
    ids, rows = message.token_ids, message.rows
    if message.kind != ANSWER or len(rows) != len(wishes):
        raise BadMessage(f"{len(rows)} answers to {len(wishes)} calls")
    answers: list[Drafted] = []
    start = rest_start = 0
    for wish, (sequence, length, count, width) in zip(wishes, rows, strict=True):
        if count < 0:
            answers.append(None)
            continue
        drafted: Draft = ids[start : start + min(count, wish.max_tokens)]
        if width:
            sampled = _sampled(ids[start : start + count], message.rest, rest_start, width)
            rest_start += _CANDIDATE_BYTES * count * width
            drafted = sampled[: wish.max_tokens]
        answers.append(drafted if sequence == wish.sequence and length == len(wish.token_ids) else [])
        start += count
    return answers


def _sampled(token_ids: list[int], rest: bytes, start: int, width: int) -> SampledTokens:
    shape = len(token_ids), width
    candidates = np.frombuffer(rest, np.int32, shape[0] * width, start).reshape(shape)
    chances = np.frombuffer(rest, np.float32, shape[0] * width, start + candidates.nbytes).reshape(shape)
    return SampledTokens(token_ids, candidates, chances)
