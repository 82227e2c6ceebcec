"""What an engine tells of itself."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters since the engine started, and its state now. Counts of tokens and blocks; times in seconds."""

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
