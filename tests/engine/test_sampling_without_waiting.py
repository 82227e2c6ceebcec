"""What a step samples with reads no value of the device: a tensor without data has none to be read."""

import numpy as np
import pytest
import torch

from kernels.reference.sampling import draw_tokens, uniform
from serve_app.engine.device_rows import DeviceDry, DevicePenalties
from serve_app.engine.last_tokens import LastTokens
from serve_app.engine.logits_ops import TorchLogits
from serve_app.options import DryParams, SamplingParams

VOCAB = 61
META = torch.device("meta")
PARAMETERS = (
    torch.tensor([0.0, 1.0, 0.7, 0.7, 0.7]),
    torch.tensor([0, 0, 5, 0, 0]),
    torch.tensor([1.0, 1.0, 1.0, 0.9, 1.0], dtype=torch.float64),
    torch.tensor([0.0, 0.0, 0.0, 0.0, 0.1], dtype=torch.float64),
)


def test_a_tensor_without_data_refuses_to_be_read() -> None:
    with pytest.raises((NotImplementedError, RuntimeError)):
        torch.empty(1, device=META).cpu()


def test_drawing_reads_nothing() -> None:
    u = uniform(torch.arange(5), torch.arange(5))
    ids = draw_tokens(torch.empty(5, VOCAB, device=META), *PARAMETERS, u)
    assert (ids.device, ids.dtype, ids.shape) == (META, torch.int64, (5,))


def test_accepting_reads_nothing() -> None:
    ops, rows = TorchLogits(META), 4
    parameters = tuple(p[1:].numpy() for p in PARAMETERS)
    proposed = np.zeros(rows, np.int64), np.zeros((rows, 3), np.int64), np.zeros((rows, 3), np.float32)
    logits = torch.empty(rows, VOCAB, device=META)
    ids = ops.accept_or_draw(logits, np.zeros(rows, np.uint64), np.arange(rows), parameters, proposed)
    joined = ops.joined(
        [(np.arange(1, 5), ids), (np.zeros(1, np.int64), torch.empty(1, dtype=torch.int64, device=META))]
    )
    assert (joined.device, joined.dtype, joined.shape) == (META, torch.int64, (5,))


def test_what_rows_remember_is_changed_and_used_without_reading() -> None:
    ops, logits = TorchLogits(META), torch.empty(5, VOCAB, device=META)
    who, rows = np.array([1, 3]), np.array([2, 0])
    params = SamplingParams(presence_penalty=0.1, repetition_penalty=1.1, dry=DryParams(multiplier=1.0))
    penalties, dry = DevicePenalties(ops, 4, VOCAB), DeviceDry(ops, 4, VOCAB)
    for row in rows.tolist():
        penalties.set_row(row, params, [1, 2, 2], [3])
        dry.set_row(row, params.dry, [1, 2, 2, 3], [5])
    for memory in (penalties, dry):
        memory.add(rows, torch.empty(2, dtype=torch.int64, device=META))
        memory.change(logits, who, rows)
        memory.copy_row(2, 1)


def test_tokens_that_only_the_device_knows_are_read_there() -> None:
    drawn = LastTokens(4, META)
    drawn.keep(np.array([1, 3]), torch.empty(2, dtype=torch.int64, device=META))
    assert drawn.resolve(torch.empty(7, dtype=torch.int64, device=META)).shape == (7,)


def test_changing_logits_reads_nothing() -> None:
    ops, logits = TorchLogits(META), torch.empty(5, VOCAB, device=META)
    who, tokens = np.array([1, 3]), np.array([[0, 7], [2, 60]])
    amounts = np.ones((2, 2), np.float32)
    ops.add(logits, who[:, None], tokens, amounts)
    ops.forbid(logits, who, np.zeros((2, -(-VOCAB // 32)), np.int32))
    assert ops.copy(logits, who).shape == (2, VOCAB)
