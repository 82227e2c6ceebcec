"""Sampling's operations on the device: the host waits for none of them, and they draw what the CPU draws."""

import numpy as np
import pytest
import torch

from kernels.reference.sampling import draw_tokens, uniform
from serve_app.engine.logits_ops import TorchLogits

VOCAB = 61
PARAMETERS = (
    torch.tensor([0.0, 1.0, 0.7, 0.7, 0.7]),
    torch.tensor([0, 0, 5, 0, 0]),
    torch.tensor([1.0, 1.0, 1.0, 0.9, 1.0], dtype=torch.float64),
    torch.tensor([0.0, 0.0, 0.0, 0.0, 0.1], dtype=torch.float64),
)


@pytest.mark.gpu
def test_cuda_is_not_waited_for() -> None:
    device = torch.device("cuda")
    ops, logits = TorchLogits(device), torch.randn(5, VOCAB, device=device)
    u = uniform(torch.arange(5), torch.arange(5))
    expected = draw_tokens(logits.cpu(), *PARAMETERS, u)
    who, tokens = np.array([1, 3]), np.array([[0, 7], [2, 60]])
    torch.cuda.set_sync_debug_mode("error")
    try:
        ids = draw_tokens(logits, *PARAMETERS, u)
        ops.add(logits, who[:, None], tokens, np.ones((2, 2), np.float32))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert ids.tolist() == expected.tolist()
