"""The border between a replica's block pool and whoever owns the blocks: another process may stand behind it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Attachment:
    """A client's place at the owner: its number, and the key of all block hashes."""

    client: int
    hash_key: bytes


@dataclass(frozen=True, slots=True)
class OwnerStats:
    """num_cached of the num_free blocks still carry a hash; evictions and retirements count since the start."""

    num_total: int
    num_free: int
    num_cached: int
    num_clients: int
    num_released_prompts: int
    num_evictions: int
    num_retired_prompts: int


@dataclass(frozen=True, slots=True)
class Holdings:
    """Which blocks a client has leased and which it has pinned, as the owner sees it."""

    leased: frozenset[int]
    pinned: frozenset[int]


class CacheOwner(Protocol):
    """The single mutator of free queue, hash index and eviction.

    A block is free (in the queue, perhaps still with a hash), leased by one client that alone may write it, or
    published: readable by all clients of the same fingerprint, free again once nobody pins it. Its generation counts
    its lives: it grows whenever its content stops being what a hash said, so that a pin or a publication that was
    decided on older knowledge is refused instead of hitting another life of the block.
    """

    @property
    def num_total(self) -> int:
        """Blocks in the arena."""

    @property
    def num_free(self) -> int:
        """Blocks in the free queue, those with a hash included."""

    @property
    def num_evictions(self) -> int:
        """Blocks whose hash was dropped to lease them, since the start."""

    @property
    def is_short(self) -> bool:
        """True after a lease failed: clients give back what they lease in reserve."""

    def attach(self, fingerprint: bytes, max_released_prompts: int) -> Attachment:
        """Registers a client. Clients of one fingerprint see each other's published blocks.

        At most max_released_prompts released prompts of this fingerprint keep their hashes (the largest figure of
        its clients holds).
        """

    def detach(self, client: int) -> None:
        """Drops a client that ended or died: its pins and unpublished leases are freed, published blocks stay."""

    def lease(self, client: int, need: int, want: int) -> list[tuple[int, int]]:
        """need to want blocks as (block, generation), or [] when fewer than need are free.

        Taken from the head of the free queue; a block's old hash is dropped now: that is the eviction. How many more
        than need come is the owner's choice.
        """

    def give_back(self, client: int, blocks: Sequence[int]) -> None:
        """Returns leased blocks, unpublished, to the front of the queue."""

    def lookup(self, client: int, hashes: Sequence[bytes]) -> list[tuple[int, int]]:
        """The longest run of hashes, from the first on, that is published, as (block, generation). Pins nothing."""

    def lookup_tail(self, client: int, hashes: Sequence[bytes], length: int) -> tuple[int, list[tuple[int, int]]]:
        """The longest prefix of hashes whose last `length` ones, or all if it is shorter, are published: how many
        hashes it has, and the blocks of these last ones as (block, generation). Pins nothing."""

    def pin(self, client: int, found: Sequence[tuple[int, int]]) -> int:
        """Pins published blocks for a client, in order, up to the first that is stale; returns how many.

        A client pins a block once, however many of its requests read it.
        """

    def unpin(self, client: int, chain: Sequence[int], prompt: int = 0) -> None:
        """Takes a client's pins off the blocks of one released prompt, in chain order.

        Those nobody pins any more join the tail of the queue, the last of the chain first, and count as one released
        prompt, or as part of the one that the client gave back under the same number before (0: of none). Beyond the
        limit the oldest such prompt loses its hashes and its blocks go to the front.
        """

    def publish(self, client: int, block: int, generation: int, block_hash: bytes) -> bool:
        """Turns a leased block into a published one that the client pins.

        False, and the block stays leased, if the hash points to another block. A lease that is not the client's (any
        more) is refused likewise.
        """

    def is_free(self, block: int) -> bool:
        """True if the block is in the free queue."""

    def flush(self, client: int) -> None:
        """Drops every hash of the client's fingerprint. Pinned blocks stay with whom pins them."""

    def flush_count(self, client: int) -> int:
        """How often the client's fingerprint was flushed: other clients see by it that their blocks are outdated."""

    def holdings(self, client: int) -> Holdings:
        """For checks."""

    def stats(self) -> OwnerStats:
        """For metrics."""
