"""The hash chain of full blocks: what the prefix cache finds a block again by."""

import hashlib
from array import array
from collections.abc import Sequence

DIGEST_BYTES = 16


class BlockHasher:
    """Hashes full blocks of tokens, each over its parent's hash, so that one hash stands for the whole prefix.

    Keyed BLAKE2b: without the key (16 to 64 random bytes of one process or one shared owner) nobody can construct
    token sequences that collide. fingerprint stands for all that changes K and V for the same tokens: weights, dtype,
    rope configuration. The salt of root() separates tenants: blocks are only found under the salt they were
    published with.
    """

    def __init__(self, key: bytes, fingerprint: bytes) -> None:
        assert 16 <= len(key) <= hashlib.blake2b.MAX_KEY_SIZE, len(key)
        # Hashing the key costs as much as a block of 32 tokens: it is done once, and the state copied.
        self._root = hashlib.blake2b(_sized(fingerprint), digest_size=DIGEST_BYTES, key=key, person=b"kv-root")
        self._next = hashlib.blake2b(digest_size=DIGEST_BYTES, key=key, person=b"kv-block")

    def root(self, salt: bytes, extras: bytes = b"") -> bytes:
        """The parent of a request's first block. extras: what the K and V of the whole request depend on besides its
        tokens, such as its set of rotary angles."""
        state = self._root.copy()
        state.update(_sized(salt) + extras)
        return state.digest()

    def next(self, parent: bytes, token_ids: Sequence[int], extras: bytes = b"") -> bytes:
        """The hash of a full block: its parent's, its token ids, and what else its K and V depend on.

        extras: adapter, digests of images inside the block. Of two blocks that differ only in where the token ids end
        and the extras begin, the hashes differ too.
        """
        ids = array("I", token_ids)
        state = self._next.copy()
        state.update(parent + len(ids).to_bytes(4, "little") + ids.tobytes() + extras)
        return state.digest()

    def chain(self, salt: bytes, token_ids: Sequence[int], block_size: int) -> list[bytes]:
        """The hashes of all full blocks of token_ids, first to last; tokens beyond the last full block do not count.

        For admission pass prompt_ids[:-1]: the last prompt token is always computed, so that there are logits.
        """
        ids = array("I", token_ids)
        size = block_size.to_bytes(4, "little")
        parent = self.root(salt)
        hashes = []
        for end in range(block_size, len(ids) + 1, block_size):
            state = self._next.copy()
            state.update(parent + size + ids[end - block_size : end].tobytes())
            parent = state.digest()
            hashes.append(parent)
        return hashes


def _sized(part: bytes) -> bytes:
    return len(part).to_bytes(4, "little") + part
