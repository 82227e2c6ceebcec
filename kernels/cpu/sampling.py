"""Native sampling on arrays of the host: changes of logits, the draw of tokens, log-probabilities.

logits are float32 [S, vocab] with contiguous rows; what names rows or tokens is int64 and checked natively: IndexError.
See kernels.reference.sampling for what the draw computes. A row's result and cost do not depend on the other rows.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernels.cpu import _native

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]


def _require(holds: bool) -> None:
    assert holds, "an array handed to a native kernel has the wrong shape, dtype or strides"


def _logits(logits: Floats) -> tuple[int, int, int, int]:
    rows, vocab_size = logits.shape
    _require(logits.dtype == np.float32 and (vocab_size <= 1 or logits.strides[1] == 4) and logits.strides[0] % 4 == 0)
    return logits.ctypes.data, logits.strides[0] // 4, rows, vocab_size


def _array(array: NDArray[Any], dtype: type, shape: tuple[int, ...]) -> int:
    _require(array.dtype == dtype and array.shape == shape and array.flags.c_contiguous)
    return array.ctypes.data


def uniform(seeds: NDArray[np.uint64], positions: Ints) -> Doubles:
    """seeds and positions [S] → float64 [S] in [0, 1), Philox4x32-10."""
    out = np.empty(len(seeds))
    shape = seeds.shape
    _native.uniform(_array(seeds, np.uint64, shape), _array(positions, np.int64, shape), out.ctypes.data, len(out))
    return out


def likeliest(logits: Floats) -> Ints:
    """The first of the largest in each row; NaN is none, and a row without a number gives 0."""
    out = np.empty(len(logits), np.int64)
    _native.likeliest(*_logits(logits), out.ctypes.data)
    return out


def draw_tokens(logits: Floats, temperature: Floats, top_k: Ints, top_p: Doubles, min_p: Doubles, u: Doubles) -> Ints:
    """logits [S, vocab], the others [S] → ids [S]. Temperature 0 takes the likeliest token, the first among equals."""
    out = np.empty(len(logits), np.int64)
    shape = out.shape
    _native.draw_tokens(
        *_logits(logits),
        _array(temperature, np.float32, shape),
        _array(top_k, np.int64, shape),
        _array(top_p, np.float64, shape),
        _array(min_p, np.float64, shape),
        _array(u, np.float64, shape),
        out.ctypes.data,
    )
    return out


def accept_or_draw(
    logits: Floats,
    temperature: Floats,
    top_k: Ints,
    top_p: Doubles,
    min_p: Doubles,
    u: Doubles,
    accept_u: Doubles,
    tokens: Ints,
    candidates: Ints,
    chances: Floats,
) -> Ints:
    """See kernels.reference.sampling.accept_or_draw: all arrays of the host, the same shapes and dtypes.

    p stands as logits whose softmax it is: only where q has candidates they are changed, and then drawn from.
    """
    every = np.arange(len(logits))
    with np.errstate(invalid="ignore", divide="ignore"):
        weights = (logits - logits[every, likeliest(logits)][:, None]) / temperature[:, None]
        for row in np.flatnonzero((top_k > 0) | (top_p < 1) | (min_p > 0)):
            ids = _kept(weights[row], int(top_k[row]), float(top_p[row]), float(min_p[row]))
            kept = weights[row, ids]
            weights[row] = -np.inf
            weights[row, ids] = kept
        chosen, best, logprob = logprobs(weights, tokens, 1)
        scale = weights[every, best[:, 0]] - logprob[:, 0]
        p = np.exp(weights[every[:, None], candidates] - scale[:, None])
        # What stands there again has the same of both.
        q = ((candidates[:, :, None] == candidates[:, None, :]) * chances[:, None, :]).sum(axis=2)
        q_of = np.where(candidates == tokens[:, None], chances, 0).sum(axis=1)
        is_accepted = (q_of > 0) & (accept_u * q_of < np.exp(chosen))
        rest = np.log(np.maximum(p - q, 0)) + scale[:, None]
    # What is left is as much as q has beyond p; where that is rounding alone, p is as good.
    has_rest = np.maximum(chances - p, 0).sum(axis=1) > _LEAST_REST
    who = np.flatnonzero(~is_accepted & has_rest)
    weights[who[:, None], candidates[who]] = rest[who]
    drawn = tokens.copy()
    if len(who := np.flatnonzero(~is_accepted)):
        one, off = np.ones(len(who)), np.zeros(len(who))
        drawn[who] = draw_tokens(weights[who], one.astype(np.float32), off.astype(np.int64), one, off, u[who])
    return drawn


# See kernels.reference.sampling, which needs torch.
_LEAST_REST = 1e-6
# What filters leave is looked for among so large weights first, logarithms of shares of the largest; e**-104 is 0.
_BOUNDS = (-4.0, -6.0, -8.0, -10.0, -12.0, -16.0, -24.0, -104.0)


def _kept(weights: Floats, top_k: int, top_p: float, min_p: float) -> Ints:
    """The ids that top-k, top-p and min-p leave of the softmax of weights [vocab], the largest of which is 0."""
    total = np.exp(weights).sum(dtype=np.float64)
    for bound in _BOUNDS:
        ids = np.flatnonzero(weights >= bound)
        shares = np.exp(weights[ids])
        if top_k > 0:
            has_all = len(ids) >= top_k
        elif top_p < 1:
            has_all = shares.sum(dtype=np.float64) >= top_p * total
        else:
            has_all = bound < np.log(min_p)
        if has_all:
            break
    best = np.argsort(-shares, kind="stable")[: top_k if top_k > 0 else None]
    ids, shares = ids[best], shares[best]
    cumulated = shares.cumsum(dtype=np.float64)
    count = len(ids)
    if top_p < 1:
        count = int((cumulated - shares < top_p * (cumulated[-1:] if top_k > 0 else total)).sum())
    # The largest is 1.
    return ids[: max(1, min(count, int((shares >= min_p).sum())))]


def logprobs(logits: Floats, ids: Ints, k: int) -> tuple[Floats, Ints, Floats]:
    """Log-probabilities of the tokens ids [S], and of the k likeliest: [S], ids [S, k], [S, k], best first.

    Where NaNs leave fewer than k tokens, -1 and NaN stand for the rest.
    """
    rows = len(logits)
    chosen, top_ids, top = np.empty(rows, np.float32), np.empty((rows, k), np.int64), np.empty((rows, k), np.float32)
    _native.logprobs(
        *_logits(logits), _array(ids, np.int64, (rows,)), k, chosen.ctypes.data, top_ids.ctypes.data, top.ctypes.data
    )
    return chosen, top_ids, top


def add(logits: Floats, who: Ints, tokens: Ints, amounts: Floats) -> None:
    """Adds amounts in place to rows who [s]; tokens and amounts [s, n], or [s]. A token named twice gets both."""
    shape = tokens.shape
    _require(shape[0] == len(who) and len(shape) in (1, 2))
    _native.add_to_logits(
        *_logits(logits),
        _array(who, np.int64, (len(who),)),
        len(who),
        _array(tokens, np.int64, shape),
        _array(amounts, np.float32, shape),
        shape[1] if len(shape) == 2 else 1,
    )


def penalise(logits: Floats, who: Ints, tokens: Ints, amounts: Floats, factors: Floats) -> None:
    """Subtracts amounts [s, n] from tokens [s, n] of rows who [s], then divides what is positive by factors [s] and
    multiplies the rest by it, in place. A token named again with the same amount is penalised once."""
    shape = (len(who), tokens.shape[1])
    scratch = np.empty(shape, np.float32)
    _native.penalise(
        *_logits(logits),
        _array(who, np.int64, shape[:1]),
        len(who),
        _array(tokens, np.int64, shape),
        _array(amounts, np.float32, shape),
        _array(factors, np.float32, shape[:1]),
        scratch.ctypes.data,
        shape[1],
    )


def forbid(logits: Floats, who: Ints, words: NDArray[np.int32]) -> None:
    """Sets to -inf in rows who [s] what has no bit: words [s, w], token i is bit i % 32 of word i // 32."""
    _native.forbid(
        *_logits(logits),
        _array(who, np.int64, (len(who),)),
        len(who),
        _array(words, np.int32, (len(who), words.shape[1])),
        words.shape[1],
    )
