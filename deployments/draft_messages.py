"""What a target and a draft tell each other: MessagePack, one message a packet. Calls and their answers go through a
mailbox instead where both ends look there.

Each step waits for what is done here, whose code the models' weights have driven out of the caches by then: a message
is made and read by one call of compiled code, which also checks its types, and there is little beside it.
"""

from collections.abc import Sequence
from typing import Annotated

import msgspec
import numpy as np

from serve_app.engine.speculation.draft_call import DraftCall, Drafted, SampledTokens, SamplingChain
from serve_app.engine.speculation.proposer import DraftWish
from serve_app.engine.speculation.waiting import MAILBOX_BYTES

MOST_IDS = 8192
"""Token ids of one message from a target; there are further ones before it where a sequence has more."""
MOST_BYTES = MAILBOX_BYTES
"""Of one message, either way: what a socket takes by default is more."""
# At most so many of an answer beside its candidates, for itself (as of the message around it) and for each token.
_ANSWER_BYTES, _ID_BYTES = 40, 5


class BadMessage(Exception):
    """Bytes that are not a message of this protocol."""


Count = Annotated[int, msgspec.Meta(ge=0)]
TokenId = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]


class Call(msgspec.Struct, array_like=True, gc=False):
    """One wish. base: tokens of the sequence before those of the message; chain: of SamplingChain, None where nothing
    is sampled."""

    sequence: Count
    base: Count
    token_ids: list[TokenId]
    max_tokens: Annotated[int, msgspec.Meta(ge=1)]
    chain: tuple[float, int, float, float] | None


class Calls(msgspec.Struct, array_like=True, gc=False, tag=1):
    """Of one step. epoch numbers the calls of one channel; limit_s: what the draft may take; sent_s: when this was
    sent, by CLOCK_MONOTONIC, which is one clock for all processes of a node."""

    epoch: int
    limit_s: float
    sent_s: float
    calls: list[Call]


class Feed(msgspec.Struct, array_like=True, gc=False, tag=2):
    """Tokens of a sequence behind its first `base`; at most MOST_IDS."""

    sequence: Count
    base: Count
    token_ids: list[TokenId]


class Forget(msgspec.Struct, array_like=True, gc=False, tag=3):
    """Sequences that ended."""

    sequences: list[int]


class OfferMailbox(msgspec.Struct, array_like=True, gc=False, tag=4):
    """Comes with a descriptor of memory, see Waiting.open_mailbox."""


class Ring(msgspec.Struct, array_like=True, gc=False, tag=5):
    """Something lies in the mailbox of one who sleeps."""


class Answer(msgspec.Struct, array_like=True, gc=False):
    """length: tokens that the draft knows now, behind which these belong. candidates, chances: of sampled tokens, see
    SampledTokens. Where a message would become too long there are none: such tokens are verified as any others, and
    rarely accepted."""

    sequence: int
    length: int
    token_ids: list[int]
    candidates: bytes = b""
    chances: bytes = b""


class Answers(msgspec.Struct, array_like=True, gc=False, tag=6):
    """To all calls of an epoch, in their order; None: the draft does not know the sequence up to its base. work_s: what
    the draft has taken, also for what it had begun when the calls were sent."""

    epoch: int
    work_s: float
    answers: list[Answer | None]


ToDraft = Calls | Feed | Forget | OfferMailbox | Ring
ToTarget = Answers | Ring

_to_draft: msgspec.msgpack.Decoder[ToDraft] = msgspec.msgpack.Decoder(ToDraft)
_to_target: msgspec.msgpack.Decoder[ToTarget] = msgspec.msgpack.Decoder(ToTarget)

pack = msgspec.msgpack.Encoder().encode
"""The bytes of a message."""


def read_by_draft(message: bytes | memoryview) -> ToDraft:
    """Raises BadMessage."""
    try:
        return _to_draft.decode(message)
    except msgspec.DecodeError as error:
        raise BadMessage(str(error)) from error


def read_by_target(message: bytes | memoryview) -> ToTarget:
    """Raises BadMessage."""
    try:
        return _to_target.decode(message)
    except msgspec.DecodeError as error:
        raise BadMessage(str(error)) from error


def call_of(wish: DraftWish, base: int) -> Call:
    """base: how much of the wish's text was told before."""
    chain = wish.chain
    parameters = None if chain is None else (chain.temperature, chain.top_k, chain.top_p, chain.min_p)
    return Call(wish.sequence, base, wish.token_ids[base:], wish.max_tokens, parameters)


def draft_calls(calls: Sequence[Call], owner: int) -> list[DraftCall]:
    """Their sequences are called (owner, number)."""
    return [
        DraftCall(
            (owner, call.sequence),
            call.base,
            call.token_ids,
            call.max_tokens,
            None if call.chain is None else SamplingChain(*call.chain),
        )
        for call in calls
    ]


def answers_to(calls: Sequence[Call], epoch: int, work_s: float, drafts: Sequence[Drafted]) -> Answers:
    """With the candidates of as many as a message has room for."""
    answers: list[Answer | None] = []
    sampled: list[tuple[Answer, SampledTokens]] = []
    for call, drafted in zip(calls, drafts, strict=True):
        if drafted is None:
            answers.append(None)
            continue
        length = call.base + len(call.token_ids)
        if isinstance(drafted, SampledTokens):
            answer = Answer(call.sequence, length, drafted.token_ids)
            sampled.append((answer, drafted))
        else:
            answer = Answer(call.sequence, length, drafted)
        answers.append(answer)
    if sampled:
        ids = sum(len(drafted or ()) for drafted in drafts)
        _add_candidates(sampled, MOST_BYTES - _ANSWER_BYTES * (len(drafts) + 1) - _ID_BYTES * ids)
    return Answers(epoch, work_s, answers)


def _add_candidates(sampled: Sequence[tuple[Answer, SampledTokens]], room: int) -> None:
    for answer, drafted in sampled:
        size = drafted.candidates.nbytes + drafted.chances.nbytes
        if size <= room:
            room -= size
            answer.candidates, answer.chances = drafted.candidates.tobytes(), drafted.chances.tobytes()


def drafts_of(answers: Answers, wishes: Sequence[DraftWish]) -> list[Drafted]:
    """For calls of these texts; what belongs to another text is as good as nothing. Raises BadMessage."""
    if len(answers.answers) != len(wishes):
        raise BadMessage(f"{len(answers.answers)} answers to {len(wishes)} calls")
    drafts: list[Drafted] = []
    for wish, answer in zip(wishes, answers.answers, strict=True):
        if answer is None:
            drafts.append(None)
        elif answer.sequence != wish.sequence or answer.length != len(wish.token_ids):
            drafts.append([])
        elif answer.candidates:
            drafts.append(_sampled(answer)[: wish.max_tokens])
        else:
            drafts.append(answer.token_ids[: wish.max_tokens])
    return drafts


def _sampled(answer: Answer) -> SampledTokens:
    try:
        shape = len(answer.token_ids), -1
        candidates = np.frombuffer(answer.candidates, np.int32).reshape(shape)
        chances = np.frombuffer(answer.chances, np.float32).reshape(candidates.shape)
    except ValueError as error:
        raise BadMessage(str(error)) from error
    return SampledTokens(answer.token_ids, candidates, chances)
