"""The wire form of the draft channel: one message is one packet, little-endian, without padding.

    target -> draft   PROPOSE count epoch limit, by call: sequence base count max_tokens; then the token ids of all
                      SAMPLE  the same; then by call: temperature top_k top_p min_p, all 0 where nothing is sampled
                      FEED    1     epoch 0,     sequence base count 0; then the token ids
                      FORGET  count epoch 0,     by sequence: sequence 0 0 0
    draft -> target   ANSWER  count epoch work,  by call: sequence length count width; then the token ids of all; then
                                                 by call: candidates [count, width], chances [count, width]

The head is a byte, 16 bits, 32 bits and a float64, a row four int64, a token id or candidate an int32, a chance a
float32, a sampling parameter a float64.

epoch numbers the calls of one channel; an answer has its call's. base: tokens of the sequence before those of the
message; length: those that the draft knows now, behind which its answer belongs. count NOT_KNOWN in an answer: the
draft does not know the sequence up to its base. limit: seconds that the draft may take; work: those that it has taken.
width: of sampled tokens the number of candidates, see SampledTokens; else 0. Where a message would become too long it
is 0 as well: such tokens are verified as any others, and rarely accepted.
"""

import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from serve_app.engine.speculation.draft_call import Draft, DraftCall, Drafted, SampledTokens, SamplingChain

PROPOSE, FEED, FORGET, ANSWER, SAMPLE = range(1, 6)

MOST_IDS = 8192
"""Token ids of one message from a target; there are further ones before it where a sequence has more."""
MOST_BYTES = 1 << 17
"""Of one message, either way: what a socket takes by default is more."""
NOT_KNOWN = -1

_HEAD = struct.Struct("<BHId")
_ROW_BYTES = 32
_ID_BYTES = 4
# Of a call the four sampling parameters, of a candidate id and chance.
_CHAIN_BYTES = 32
_CANDIDATE_BYTES = 8


class BadMessage(Exception):
    """Bytes that are not a message of this protocol."""


@dataclass(slots=True)
class Message:
    """Any of the messages. numbers: sequence, base, count and max_tokens of each row, one after the other, or what
    stands there. seconds: the limit of a call, the work of an answer. rest: what stands behind the token ids."""

    kind: int
    epoch: int
    seconds: float
    numbers: list[int]
    token_ids: list[int]
    rest: bytes = b""


def pack_propose(epoch: int, limit_s: float, calls: Sequence[DraftCall]) -> bytes:
    """Calls whose sequences are numbers."""
    rows: list[Any] = []
    ids = array("i")
    for call in calls:
        rows += (call.sequence, call.base, len(call.token_ids), call.max_tokens)
        ids.extend(call.token_ids)
    kind, chains = PROPOSE, array("d")
    if any(call.chain for call in calls):
        kind = SAMPLE
        for call in calls:
            chain = call.chain
            chains.extend((chain.temperature, chain.top_k, chain.top_p, chain.min_p) if chain else (0, 0, 0, 0))
    head = _HEAD.pack(kind, len(calls), epoch, limit_s)
    return head + array("q", rows).tobytes() + ids.tobytes() + chains.tobytes()


def pack_feed(epoch: int, sequence: int, base: int, token_ids: Sequence[int]) -> bytes:
    """At most MOST_IDS tokens."""
    row = array("q", (sequence, base, len(token_ids), 0))
    return _HEAD.pack(FEED, 1, epoch, 0.0) + row.tobytes() + array("i", token_ids).tobytes()


def pack_forget(epoch: int, sequences: Sequence[int]) -> bytes:
    """Sequences that ended."""
    rows = array("q", [number for sequence in sequences for number in (sequence, 0, 0, 0)])
    return _HEAD.pack(FORGET, len(sequences), epoch, 0.0) + rows.tobytes()


def pack_answer(epoch: int, work_s: float, numbers: Sequence[int], answers: Sequence[Drafted]) -> bytes:
    """The answers to calls, in their order; numbers: of the message that they came with."""
    rows: list[int] = []
    ids = array("i")
    for drafted, sequence, base, count in zip(answers, numbers[::4], numbers[1::4], numbers[2::4], strict=True):
        rows += (sequence, base + count, NOT_KNOWN if drafted is None else len(drafted), 0)
        if drafted:
            ids.extend(drafted)
    rest: list[bytes] = []
    room = MOST_BYTES - _HEAD.size - 8 * len(rows) - _ID_BYTES * len(ids)
    for i, drafted in enumerate(answers):
        if isinstance(drafted, SampledTokens) and _CANDIDATE_BYTES * drafted.candidates.size <= room:
            room -= _CANDIDATE_BYTES * drafted.candidates.size
            rows[4 * i + 3] = drafted.candidates.shape[1]
            rest += (drafted.candidates.tobytes(), drafted.chances.tobytes())
    head = _HEAD.pack(ANSWER, len(answers), epoch, work_s)
    return b"".join((head, array("q", rows).tobytes(), ids.tobytes(), *rest))


def unpack(message: memoryview) -> Message:
    """Raises BadMessage."""
    numbers, ids = array("q"), array("i")
    try:
        kind, count, epoch, seconds = _HEAD.unpack_from(message)
        end = _HEAD.size + count * _ROW_BYTES
        numbers.frombytes(message[_HEAD.size : end])
        rows = numbers.tolist()
        ids_end = end + _ID_BYTES * sum([n for n in rows[2::4] if n > 0])
        ids.frombytes(message[end:ids_end])
    except (struct.error, ValueError) as error:
        raise BadMessage(str(error)) from error
    rest_bytes = len(message) - ids_end
    if len(rows) != 4 * count or rest_bytes != _rest_bytes(kind, rows):
        raise BadMessage(f"{len(rows)} numbers for {count} rows, {len(ids)} token ids, {rest_bytes} bytes more")
    return Message(kind, epoch, seconds, rows, ids.tolist(), bytes(message[ids_end:]) if rest_bytes else b"")


def _rest_bytes(kind: int, rows: Sequence[int]) -> int:
    """What belongs behind the token ids."""
    if kind == SAMPLE:
        return _CHAIN_BYTES * (len(rows) // 4)
    if kind != ANSWER or not any(rows[3::4]):
        return 0
    if min(rows[3::4]) < 0:
        raise BadMessage("fewer than no candidates")
    return sum([_CANDIDATE_BYTES * max(0, n) * width for n, width in zip(rows[2::4], rows[3::4], strict=True)])


def calls_of(message: Message, owner: int) -> list[DraftCall]:
    """Of a PROPOSE or SAMPLE; their sequences are called (owner, number). Raises BadMessage."""
    calls, start = [], 0
    numbers, ids = message.numbers, message.token_ids
    chains = _chains(message)
    rows = zip(numbers[::4], numbers[1::4], numbers[2::4], numbers[3::4], chains, strict=True)
    for sequence, base, count, most, chain in rows:
        if min(sequence, base, count) < 0 or most < 1:
            raise BadMessage(f"a call of {sequence, base, count, most}")
        calls.append(DraftCall((owner, sequence), base, ids[start : start + count], most, chain))
        start += count
    return calls


def _chains(message: Message) -> list[SamplingChain | None]:
    if message.kind != SAMPLE:
        return [None] * (len(message.numbers) // 4)
    chains: list[SamplingChain | None] = []
    for temperature, top_k, top_p, min_p in struct.iter_unpack("<4d", message.rest):
        chains.append(SamplingChain(temperature, int(top_k), top_p, min_p) if temperature > 0 else None)
    return chains


def answers_of(message: Message, calls: Sequence[DraftCall]) -> list[Drafted]:
    """Of an ANSWER to these calls; one that belongs to another text is as good as none. Raises BadMessage."""
    numbers, ids = message.numbers, message.token_ids
    if message.kind != ANSWER or len(numbers) != 4 * len(calls):
        raise BadMessage(f"{len(numbers) // 4} answers to {len(calls)} calls")
    answers: list[Drafted] = []
    start = rest_start = 0
    rows = zip(calls, numbers[::4], numbers[1::4], numbers[2::4], numbers[3::4], strict=True)
    for call, sequence, length, count, width in rows:
        if count < 0:
            answers.append(None)
            continue
        most = min(count, call.max_tokens)
        drafted: Draft = ids[start : start + most]
        if width:
            drafted = _sampled(ids[start : start + count], message.rest, rest_start, width)[:most]
            rest_start += _CANDIDATE_BYTES * count * width
        fits = sequence == call.sequence and length == call.base + len(call.token_ids)
        answers.append(drafted if fits else [])
        start += count
    return answers


def _sampled(token_ids: list[int], rest: bytes, start: int, width: int) -> SampledTokens:
    shape = len(token_ids), width
    candidates = np.frombuffer(rest, np.int32, shape[0] * width, start).reshape(shape)
    chances = np.frombuffer(rest, np.float32, shape[0] * width, start + candidates.nbytes).reshape(shape)
    return SampledTokens(token_ids, candidates, chances)
