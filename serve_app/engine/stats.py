"""What an engine tells of itself."""

from dataclasses import dataclass, field


@dataclass(slots=True)
class SpeculationCounts:
    """What came of proposed tokens since the engine started; times in seconds.

    drafted, accepted: tokens, by proposer. accepted_by_position: tokens, by place in the proposal, from 0.
    steps: proposals verified, one request in one step each; tokens: what came out of them. draft_waits: how often steps
    waited for a proposer, draft_seconds together; verify_steps: forwards that verified, verify_seconds together. gamma:
    how often a request was to get so many tokens in a step, 0 included, where there was a proposer to ask.
    """

    drafted: dict[str, int] = field(default_factory=dict)
    accepted: dict[str, int] = field(default_factory=dict)
    accepted_by_position: list[int] = field(default_factory=list)
    steps: int = 0
    tokens: int = 0
    draft_seconds: float = 0.0
    draft_waits: int = 0
    verify_seconds: float = 0.0
    verify_steps: int = 0
    timeouts: int = 0
    gamma: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DraftStats:
    """Counters since a draft model was loaded, and its state now. evictions: sequences whose blocks others took."""

    forwards: int
    evictions: int
    blocks_total: int
    blocks_free: int


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters since the engine started, and its state now. Counts of tokens and blocks; times in seconds.

    speculation: None where nothing is proposed.
    """

    max_seqs: int
    num_running: int
    num_waiting: int
    num_paused: int
    blocks_total: int
    blocks_free: int
    steps: int
    preemptions: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    prefix_lookups: int
    prefix_hits: int
    evictions: int
    estimated_wait_s: float
    is_failed: bool = False
    speculation: SpeculationCounts | None = None
