"""Steps of decodes alone are built in a shorter way: the arrays must be those of the long one."""

from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from serve_app.engine.batch_builder import BatchBuilder
from serve_app.engine.scheduler import Schedule


def decoding(row: int, num_tokens: int, blocks: list[int]) -> Any:
    """A request whose last token is to be computed."""
    ids = [(row * 100 + i) % 997 for i in range(num_tokens)]
    return SimpleNamespace(row=row, token_ids=ids, num_computed=num_tokens - 1, tables=[blocks])


@pytest.mark.parametrize("count", [1, 2, 5])
def test_decodes_alone(count: int) -> None:
    requests = [
        decoding(3, 16, [7]), decoding(0, 17, [2, 9]), decoding(6, 1, [4]), decoding(1, 50, [0, 11, 5, 13]),
        decoding(2, 33, [8, 1, 6]),
    ][:count]  # fmt: skip
    builder = BatchBuilder(8, 4, 16)
    for request in requests:
        builder.set_blocks(request)
    short = builder.build(Schedule(decode=requests))
    # A prefill of one token, up to the last known one, is the same work.
    long = builder.build(Schedule(prefill=[(request, 1) for request in requests]))
    for field in fields(short):
        one, other = getattr(short, field.name), getattr(long, field.name)
        assert np.array_equal(one, other), field.name
        if isinstance(one, np.ndarray):
            assert one.dtype == other.dtype
            assert one.flags.c_contiguous
            assert other.flags.c_contiguous
