"""Sampling's operations on the device: the host waits for none of them, and they draw what the CPU draws."""

import numpy as np
import pytest
import torch

from kernels.reference.sampling import draw_tokens, uniform
from serve_app.engine.device_rows import DeviceDry, DevicePenalties
from serve_app.engine.last_tokens import LastTokens
from serve_app.engine.logits_ops import TorchLogits
from serve_app.options import DryParams, SamplingParams

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
    parameters = tuple(p[1:].numpy() for p in PARAMETERS)
    proposed = np.arange(4), np.arange(12).reshape(4, 3) % 5, np.full((4, 3), 1 / 3, np.float32)
    numbers = np.arange(4).astype(np.uint64), np.arange(4), parameters, proposed
    accepted = TorchLogits(torch.device("cpu")).accept_or_draw(logits[1:].cpu(), *numbers)
    who, tokens = np.array([1, 3]), np.array([[0, 7], [2, 60]])
    params = SamplingParams(presence_penalty=0.1, repetition_penalty=1.1, dry=DryParams(multiplier=1.0))
    penalties, dry, drawn = DevicePenalties(ops, 4, VOCAB), DeviceDry(ops, 4, VOCAB), LastTokens(4, device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ids = draw_tokens(logits, *PARAMETERS, u)
        verified = ops.accept_or_draw(logits[1:], *numbers)
        ops.add(logits, who[:, None], tokens, np.ones((2, 2), np.float32))
        for row in who.tolist():
            penalties.set_row(row, params, [1, 2, 2], [3])
            dry.set_row(row, params.dry, [1, 2, 2, 3], [5])
        for memory in (penalties, dry):
            memory.add(who, ids[:2])
            memory.change(logits, who, who)
        drawn.keep(who, ids[:2])
        drawn.resolve(ids)
        fetch = ops.fetch([ids, ops.joined([(np.arange(4), verified)])])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert fetch.wait()[0].tolist() == ids.tolist() == expected.tolist()
    assert fetch.wait()[1].tolist() == accepted.tolist()
