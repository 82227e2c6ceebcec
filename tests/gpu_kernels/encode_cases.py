"""Rows for the tests of the encoders on a device: every kind of number that encoders treat apart."""

import numpy as np
import torch
from torch import Tensor


def wild_rows(columns: int, seed: int = 0) -> Tensor:
    """float32 [rows, columns]: usual, heavy-tailed, flat, zeros of both signs, sparse, subnormal, tiny, large, few
    levels, ties between codes, all of one sign, one value alone."""
    r = np.random.default_rng(seed)
    normal = r.standard_normal
    alone = np.zeros(columns)
    alone[5::64] = -0.3
    rows = [
        normal(columns) * 0.02,
        r.standard_t(2, columns),
        np.full(columns, -0.7),
        np.full(columns, 1e-40),
        np.where(r.random(columns) < 0.5, -0.0, 0.0),
        normal(columns) * (r.random(columns) < 0.05),
        normal(columns) * 1e-43,
        normal(columns) * 1e-38,
        normal(columns) * 1e-16,
        normal(columns) * 1e4,
        r.integers(-3, 4, columns),
        r.integers(-31, 33, columns) / 2,
        np.where(r.random(columns) < 0.5, -8.0, 7.5),
        -r.random(columns) - 100,
        r.random(columns) + 3,
        normal(columns) * np.exp(normal(columns) * 4) * 1e-3,
        alone,
    ]
    return torch.from_numpy(np.array(rows, np.float32))


def importance_of(columns: int, seed: int = 0) -> Tensor:
    """float32 [columns], not negative; every 37th counts nothing."""
    values = np.random.default_rng(seed).random(columns).astype(np.float32) ** 4
    values[::37] = 0
    return torch.from_numpy(values)
