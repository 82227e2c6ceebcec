import random

import pytest

from serve_app.kv_cache.block_hash import DIGEST_BYTES, BlockHasher

KEY = bytes(range(32))


def test_chain_equals_single_steps_and_skips_the_partial_block() -> None:
    hasher = BlockHasher(KEY, b"model")
    tokens = [random.Random(1).randrange(2**31) for _ in range(70)]
    chain = hasher.chain(b"salt", tokens, 32)
    first = hasher.next(hasher.root(b"salt"), tokens[:32])
    assert chain == [first, hasher.next(first, tokens[32:64])]
    assert all(len(block_hash) == DIGEST_BYTES for block_hash in chain)
    assert hasher.chain(b"salt", tokens[:31], 32) == []


@pytest.mark.parametrize(
    ("key", "fingerprint", "salt", "tokens", "extras"),
    [
        (KEY[::-1], b"model", b"", [1, 2], b""),
        (KEY, b"other", b"", [1, 2], b""),
        (KEY, b"model", b"tenant", [1, 2], b""),
        (KEY, b"mode", b"l", [1, 2], b""),
        (KEY, b"model", b"", [2, 1], b""),
        (KEY, b"model", b"", [1, 2], b"adapter"),
        # The same bytes, cut elsewhere.
        (KEY, b"model", b"", [1], (2).to_bytes(4, "little")),
    ],
)
def test_whatever_k_and_v_depend_on_changes_the_hash(
    key: bytes, fingerprint: bytes, salt: bytes, tokens: list[int], extras: bytes
) -> None:
    plain = BlockHasher(KEY, b"model")
    other = BlockHasher(key, fingerprint)
    assert other.next(other.root(salt), tokens, extras) != plain.next(plain.root(b""), [1, 2])


def test_a_prefix_is_part_of_every_later_hash() -> None:
    hasher = BlockHasher(KEY, b"model")
    one = hasher.chain(b"", [1] * 16 + [7] * 16, 16)
    two = hasher.chain(b"", [2] * 16 + [7] * 16, 16)
    assert len({*one, *two}) == 4


def test_a_short_key_is_refused() -> None:
    with pytest.raises(AssertionError):
        BlockHasher(b"short", b"")
