"""The wire form of the token path: engine -> ingress, one message per step for all requests of that ingress.

A target replica connects one DEALER socket to each ingress replica that it works for; the ingress binds a ROUTER. Both
directions carry MessagePack arrays, never pickles:

    target -> ingress   [TOKENS, epoch, sequence, rows]      [HEARTBEAT, epoch, sequence]
    ingress -> target   [CREDIT, epoch, [[request id, consumed], ...]]   [CANCEL, epoch, [request id, ...]]
                        [HEARTBEAT, epoch]

epoch names one life of the ingress replica and is random: a message with another one is for a dead predecessor, or from
a stranger, and is dropped. sequence counts the messages of one socket, TokenDelta.index the tokens of one choice: a gap
in either means lost tokens, and the streams concerned end with an error. Without a message (heartbeats included) for
`SILENCE_TICKS` ticks the other side counts as lost. A request may have `CREDIT_WINDOW` deltas on their way that its
client has not consumed; then the target pauses it in the engine. Cancelling the target's open call is what ends a
request whose client has left; CANCEL says the same on this way, for calls whose cancellation gets lost in Serve.
"""

from collections.abc import Iterable, Sequence
from dataclasses import astuple
from typing import Any

import msgspec

from serve_app.messages import Finish, TokenDelta, TokenLogprob, Usage

TOKENS = 1
HEARTBEAT = 2
CREDIT = 3
CANCEL = 4

TICK_S = 0.25
SILENCE_TICKS = 20
CREDIT_WINDOW = 256

# [request id, choice, index, token ids, text], then what few deltas have: finish, logprobs, prompt logprobs.
Row = Sequence[Any]


_encoder = msgspec.msgpack.Encoder()


class BadMessage(Exception):
    """Bytes that are not a message of this protocol."""


def pack_tokens(epoch: int, sequence: int, deltas: Iterable[TokenDelta]) -> bytes:
    """One step's deltas as bytes. A finish with an error stays behind: the target's open call raises it instead."""
    rows = [
        (d.request_id, d.choice, d.index, d.token_ids, d.text)
        if d.finish is None and d.logprobs is None and d.prompt_logprobs is None
        else _full_row(d)
        for d in deltas
    ]
    return _encoder.encode((TOKENS, epoch, sequence, rows))


def pack(*fields: Any) -> bytes:
    """A heartbeat or a credit message."""
    return _encoder.encode(fields)


def unpack(message: bytes) -> tuple[int, int, list[Any]]:
    """(kind, epoch, the other fields). Raises BadMessage."""
    try:
        kind, epoch, *rest = msgspec.msgpack.decode(message)
    except (ValueError, TypeError, msgspec.DecodeError) as error:
        raise BadMessage(str(error)) from error
    if not (type(kind) is int and type(epoch) is int):
        raise BadMessage("kind and epoch are numbers")
    return kind, epoch, rest


def unpack_delta(row: Row) -> TokenDelta:
    """Raises BadMessage."""
    try:
        if len(row) == 5:
            return TokenDelta(*row)
        request_id, choice, index, token_ids, text, finish, logprobs, prompt_logprobs = row
        return TokenDelta(
            request_id,
            choice,
            index,
            token_ids,
            text,
            _unpack_logprobs(logprobs),
            _unpack_finish(finish),
            _unpack_logprobs(prompt_logprobs),
        )
    except (ValueError, TypeError) as error:
        raise BadMessage(f"not a delta: {error}") from error


def _full_row(delta: TokenDelta) -> Row:
    finish = delta.finish if delta.finish is None or delta.finish.error is None else None
    return (
        delta.request_id,
        delta.choice,
        delta.index,
        delta.token_ids,
        delta.text,
        None if finish is None else _pack_finish(finish),
        _pack_logprobs(delta.logprobs),
        _pack_logprobs(delta.prompt_logprobs),
    )


def _pack_finish(finish: Finish) -> Row:
    return finish.reason, astuple(finish.usage), finish.stop_reason


def _unpack_finish(row: Row | None) -> Finish | None:
    if row is None:
        return None
    reason, usage, stop_reason = row
    return Finish(reason, Usage(*usage), stop_reason)


def _pack_logprobs(logprobs: list[TokenLogprob] | None) -> list[Row] | None:
    if logprobs is None:
        return None
    return [(p.token_id, p.logprob, p.top, p.token_text, p.top_texts) for p in logprobs]


def _unpack_logprobs(rows: list[Row] | None) -> list[TokenLogprob] | None:
    if rows is None:
        return None
    return [
        TokenLogprob(token_id, logprob, [(int(i), float(p)) for i, p in top], text, texts)
        for token_id, logprob, top, text, texts in rows
    ]
