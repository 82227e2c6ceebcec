from collections.abc import Iterator

import pytest

from kernels.cpu import _native


@pytest.fixture(params=_native.instruction_sets())
def each_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test once in every instruction set that this CPU and build have."""
    before = _native.instruction_set()
    _native.use_instruction_set(request.param)
    yield request.param
    _native.use_instruction_set(before)


@pytest.fixture
def one_thread_after() -> Iterator[None]:
    """For tests that change the number of threads."""
    yield
    _native.set_num_threads(1)
