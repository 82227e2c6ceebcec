"""What a step samples with reads no value of the device: a tensor without data has none to be read."""

import numpy as np
import pytest
import torch

from kernels.reference.sampling import draw_tokens, uniform
from serve_app.engine.logits_ops import TorchLogits

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


def test_changing_logits_reads_nothing() -> None:
    ops, logits = TorchLogits(META), torch.empty(5, VOCAB, device=META)
    who, tokens = np.array([1, 3]), np.array([[0, 7], [2, 60]])
    amounts = np.ones((2, 2), np.float32)
    ops.add(logits, who[:, None], tokens, amounts)
    ops.penalise(logits, who, tokens, amounts, np.full((2, 1), 1.5, np.float32))
    ops.forbid(logits, who, np.zeros((2, -(-VOCAB // 32)), np.int32))
    assert ops.copy(logits, who).shape == (2, VOCAB)
