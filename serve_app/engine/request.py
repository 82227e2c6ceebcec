"""One choice of one client request, as the engine works on it."""

from collections.abc import Sequence
from enum import Enum, auto
from itertools import count

from serve_app.engine.speculation.draft_call import Draft
from serve_app.layers.angle_sets import AngleSet
from serve_app.messages import GenerateRequest, TokenLogprob
from serve_app.options import SamplingParams
from serve_app.text.detokenizer import Detokenizer

UNKNOWN = -1
"""Stands for a token that row 0 will have drawn, -2 for one of row 1, and so on."""


class RequestState(Enum):
    """Where a request stands. FORK_PENDING: waits for choice 0 of the same client request to compute the prompt."""

    WAITING = auto()
    FORK_PENDING = auto()
    RUNNING = auto()
    PREEMPTED = auto()
    FINISHED = auto()


_SEQUENCES = count(1)


class Request:
    """Ids, counters and blocks of one choice.

    token_ids are the prompt's and the output's; UNKNOWN - row takes the place of one that a step under way will draw,
    and num_output counts those that are known. num_computed of all have their K and V in the cache when the steps under
    way are done; last_step: the number of the last that it is in. The cache's blocks are in `tables`:
    for each group of layers those of all tokens in order, the first num_given_up of which are NO_BLOCK. prompt_number:
    with it the ledger knows that blocks given up one by one are of the same prompt, 0 = none were yet. angles: the
    rotary set that K and V are computed with. block_hashes holds the hash chain as far as it has been needed; row is
    the request's place in the persistent per-request arrays of batch builder and sampler, -1 while it does not run.
    sequence: a number that no other request of this process has. draft: tokens proposed to follow in the coming step;
    num_accepted and num_rejected: of all that were verified.
    """

    __slots__ = (
        "angles",
        "arrival_s",
        "block_hashes",
        "cache_salt",
        "choice",
        "detokenizer",
        "draft",
        "is_paused",
        "last_step",
        "max_total_tokens",
        "num_accepted",
        "num_cached",
        "num_computed",
        "num_given_up",
        "num_output",
        "num_prompt",
        "num_published",
        "num_rejected",
        "params",
        "prompt_logprobs",
        "prompt_number",
        "request_id",
        "row",
        "seed",
        "sequence",
        "siblings",
        "state",
        "stop_ids",
        "tables",
        "token_ids",
    )

    def __init__(
        self,
        source: GenerateRequest,
        choice: int,
        *,
        seed: int,
        stop_ids: frozenset[int],
        max_total_tokens: int,
        detokenizer: Detokenizer,
        arrival_s: float,
    ) -> None:
        self.request_id = source.request_id
        self.choice = choice
        self.sequence = next(_SEQUENCES)
        self.params: SamplingParams = source.sampling
        self.cache_salt = source.cache_salt
        self.token_ids: list[int] = list(source.prompt_ids)
        self.num_prompt = len(self.token_ids)
        self.num_output = 0
        self.num_computed = 0
        self.num_cached = 0
        self.num_published = 0
        self.tables: list[list[int]] = []
        self.num_given_up: list[int] = []
        self.prompt_number = 0
        self.angles = AngleSet()
        self.block_hashes: list[bytes] = []
        self.row = -1
        self.state = RequestState.WAITING
        self.is_paused = False
        self.last_step = 0
        self.seed = seed
        self.stop_ids = stop_ids
        self.max_total_tokens = max_total_tokens
        self.detokenizer = detokenizer
        self.arrival_s = arrival_s
        self.prompt_logprobs: list[TokenLogprob] | None = [] if self.params.prompt_logprobs else None
        # Choices that take over this one's prompt blocks when its prompt is computed.
        self.siblings: list[Request] = []
        self.draft: Draft = []
        self.num_accepted = self.num_rejected = 0

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens, with one that is being drawn."""
        return len(self.token_ids)

    @property
    def num_known(self) -> int:
        """Prompt and output tokens without one that is being drawn."""
        return self.num_prompt + self.num_output

    @property
    def num_pending(self) -> int:
        """Tokens whose K and V are still to be computed; the last one's logits give the next token."""
        return len(self.token_ids) - self.num_computed

    @property
    def output_ids(self) -> Sequence[int]:
        """The output tokens."""
        return self.token_ids[self.num_prompt :]

    @property
    def has_begun(self) -> bool:
        """Whether its client request has run: it does so now, was preempted, or is a further choice."""
        return self.state in (RequestState.RUNNING, RequestState.PREEMPTED) or self.choice > 0

    @property
    def is_finished(self) -> bool:
        """Whether it has ended, for whatever reason."""
        return self.state is RequestState.FINISHED
