"""What a batch could make the native kernels read or write out of bounds is refused."""

import os
import signal
import threading

import pytest
import torch

from kernels.cpu import _native, layers, ops
from kernels.cpu.attention import AttentionPlan


def plan(
    tables: list[list[int]], starts: list[int], contexts: list[int], tokens: int, num_blocks: int = 4
) -> AttentionPlan:
    def ints(values: list[int] | list[list[int]]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32)

    return AttentionPlan(ints(tables), ints(starts), ints(contexts), tokens, (num_blocks, 4, 1, 8), 2)


def test_a_fitting_plan_is_cut_by_request_and_head() -> None:
    assert plan([[0, 1], [3, 0]], [0, 5, 6], [8, 1], 6).num_units == 2


@pytest.mark.parametrize(
    ("tables", "starts", "contexts", "tokens"),
    [
        ([[4]], [0, 1], [1], 1),
        ([[-1]], [0, 1], [1], 1),
        ([[0]], [0, 1], [5], 1),
        ([[0]], [0, 3], [2], 3),
        ([[0]], [0, 1], [1], 2),
        ([[0], [1]], [0, 2, 1], [2, 1], 1),
        ([[0]], [1, 1], [1], 1),
    ],
)
def test_tables_that_leave_the_pool_are_refused(
    tables: list[list[int]], starts: list[int], contexts: list[int], tokens: int
) -> None:
    with pytest.raises(IndexError, match="attention"):
        plan(tables, starts, contexts, tokens)


@pytest.mark.parametrize("slot", [-1, 16])
def test_slots_outside_the_pool_are_refused(slot: int) -> None:
    k, cache = torch.zeros(1, 1, 8), torch.zeros(4, 4, 1, 8)
    with pytest.raises(IndexError, match="slot"):
        layers.rope_kv(None, k, k, k_cache=cache, v_cache=cache, slots=torch.tensor([slot]))


@pytest.mark.parametrize("position", [-1, 10])
def test_positions_outside_the_table_are_refused(position: int) -> None:
    q = torch.zeros(1, 2, 8)
    with pytest.raises(IndexError, match="position"):
        layers.rope_kv(q, q, positions=torch.tensor([position]), table=torch.zeros(10, 8))


def test_a_matrix_of_another_width_is_refused() -> None:
    with pytest.raises(IndexError, match="width"):
        ops.matmul(8, torch.zeros(1, 32), torch.zeros(4, 68, dtype=torch.uint8))
    with pytest.raises(ValueError, match="instruction set"):
        _native.use_instruction_set("mmx")


def test_callers_in_several_threads_do_not_disturb_each_other() -> None:
    blocks = torch.randint(0, 100, (8192, 34 * 16), dtype=torch.uint8)
    inputs = [torch.randn(8, 512, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    expected = [ops.matmul(8, x, blocks) for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(30):
            if not torch.equal(ops.matmul(8, inputs[i], blocks).nan_to_num(), expected[i].nan_to_num()):
                wrong.append(i)

    _native.set_num_threads(2)
    try:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        _native.set_num_threads(1)
    assert not wrong


def test_the_pool_works_in_a_forked_child() -> None:
    blocks, x = torch.randint(0, 100, (8192, 34 * 16), dtype=torch.uint8), torch.randn(8, 512)
    _native.set_num_threads(2)
    try:
        expected = ops.matmul(8, x, blocks).numpy().tobytes()
        child = os.fork()
        if child == 0:
            # Nothing of torch's that may use OpenMP: its threads do not survive a fork.
            signal.alarm(30)
            os._exit(0 if ops.matmul(8, x, blocks).numpy().tobytes() == expected else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        _native.set_num_threads(1)
