"""A native program refuses, while it is built, what would let an operation leave its buffers."""

from collections.abc import Callable

import pytest

from kernels.cpu import _native

F32, BF16, Q8_32, Q8_256 = range(4)
Q4_0, Q4_K = 2, 12


@pytest.fixture
def program() -> _native.Program:
    return _native.Program(4, 16)


def floats(program: _native.Program, width: int) -> int:
    return program.buffer(False, width * 4)


def acts(program: _native.Program, kind: int, columns: int) -> int:
    return program.buffer(False, _native.act_row_bytes(kind, columns))


def test_a_sum_needs_both_its_operands(program: _native.Program) -> None:
    x = floats(program, 8)
    program.add(x, floats(program, 8), 8)
    for other in (-1, 99):
        with pytest.raises(ValueError, match=r"second operand|no such buffer"):
            program.add(x, other, 8)
    with pytest.raises(ValueError, match="not as wide"):
        program.add(x, floats(program, 4), 8)


@pytest.mark.parametrize(
    ("first", "count", "head_dim"),
    [(0, 2, 0), (0, 2, -4), (-1, 2, 4), (0, 0, 4), (3, 2, 4), (0, 2**61, 8), (2**61, 1, 8)],
)
def test_heads_that_are_none_or_outside_are_refused(
    program: _native.Program, first: int, count: int, head_dim: int
) -> None:
    x = floats(program, 16)
    program.head_norm(x, 16, 2, 2, 4, 0, 0.0, 1e-6)
    with pytest.raises(ValueError, match="heads outside of their rows"):
        program.head_norm(x, 16, first, count, head_dim, 0, 0.0, 1e-6)


@pytest.mark.parametrize("table", [-1, 1, 7])
def test_a_rotation_by_a_table_that_is_not_there_is_refused(program: _native.Program, table: int) -> None:
    qkv = floats(program, 3 * 8)
    assert program.table(0, 0) == 0
    program.rope_kv(qkv, 1, 1, 8, 8, 0, 0, 0, 0, 0)
    with pytest.raises(ValueError, match="a rotation needs a table"):
        program.rope_kv(qkv, 1, 1, 8, 8, table, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("type_id", "kind", "is_taken"),
    [
        (Q4_0, F32, True),
        (Q4_0, Q8_32, True),
        (Q4_0, Q8_256, False),
        (Q4_0, BF16, False),
        (Q4_K, Q8_256, True),
        (Q4_K, Q8_32, False),
        (0, F32, True),
        (0, BF16, False),
    ],
)
def test_a_product_takes_the_activations_that_its_matrix_is_made_for(
    program: _native.Program, type_id: int, kind: int, is_taken: bool
) -> None:
    matrix = _native.PackedMatrix(type_id, 16, 256)
    x, out = acts(program, kind, 256), floats(program, 16)
    add: Callable[[], None] = lambda: program.matmul([(matrix, kind, x, 0)], out)  # noqa: E731
    if is_taken:
        add()
        return
    with pytest.raises(ValueError, match="a form of activations that the matrix is not made for"):
        add()


@pytest.mark.parametrize("kind", [-1, 4, 1000])
def test_forms_of_activations_that_do_not_exist_are_refused(program: _native.Program, kind: int) -> None:
    x = floats(program, 32)
    with pytest.raises(ValueError, match="no such form of activations"):
        program.convert(x, 32, [(kind, acts(program, F32, 32))])
