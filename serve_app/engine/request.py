"""One choice of one client request, as the engine works on it."""

from collections.abc import Sequence
from enum import Enum, auto

from serve_app.messages import GenerateRequest, TokenLogprob
from serve_app.options import SamplingParams
from serve_app.text.detokenizer import Detokenizer


class RequestState(Enum):
    """Where a request stands. FORK_PENDING: waits for choice 0 of the same client request to compute the prompt."""

    WAITING = auto()
    FORK_PENDING = auto()
    RUNNING = auto()
    PREEMPTED = auto()
    FINISHED = auto()


class Request:
    """Ids, counters and blocks of one choice.

    token_ids are the prompt's and the output's. num_computed of them have their K and V in the cache, in `blocks`;
    block_hashes holds the hash chain as far as it has been needed; row is the request's place in the persistent
    per-request arrays of batch builder and sampler, -1 while it does not run.
    """

    __slots__ = (
        "arrival_s",
        "block_hashes",
        "blocks",
        "cache_salt",
        "choice",
        "detokenizer",
        "is_paused",
        "max_total_tokens",
        "num_cached",
        "num_computed",
        "num_output",
        "num_prompt",
        "num_published",
        "params",
        "prompt_logprobs",
        "request_id",
        "row",
        "seed",
        "siblings",
        "state",
        "stop_ids",
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
        self.params: SamplingParams = source.sampling
        self.cache_salt = source.cache_salt
        self.token_ids: list[int] = list(source.prompt_ids)
        self.num_prompt = len(self.token_ids)
        self.num_output = 0
        self.num_computed = 0
        self.num_cached = 0
        self.num_published = 0
        self.blocks: list[int] = []
        self.block_hashes: list[bytes] = []
        self.row = -1
        self.state = RequestState.WAITING
        self.is_paused = False
        self.seed = seed
        self.stop_ids = stop_ids
        self.max_total_tokens = max_total_tokens
        self.detokenizer = detokenizer
        self.arrival_s = arrival_s
        self.prompt_logprobs: list[TokenLogprob] | None = [] if self.params.prompt_logprobs else None
        # Choices that take over this one's prompt blocks when its prompt is computed.
        self.siblings: list[Request] = []

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens known so far."""
        return len(self.token_ids)

    @property
    def num_pending(self) -> int:
        """Known tokens whose K and V are still to be computed; the last one's logits give the next token."""
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
