"""What the sampler does to logits: to arrays of the host, where native steps leave them, or to tensors of a device."""

from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels import dispatch
from kernels.reference.sampling import without_waiting

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Logits = Floats | Tensor
"""float32 [S, vocab]."""
Parameters = tuple[Floats, Ints, NDArray[np.float64], NDArray[np.float64]]
"""Temperature, top_k, top_p and min_p of each row."""


class LogitsOps(Protocol):
    """Changes logits in place; all arguments but them, and all results, are on the host.

    who: indexes into the rows of logits. tokens and amounts are [len(who), n], or all three [n].
    """

    def copy(self, logits: Any, who: Ints) -> Any:
        """The rows who, apart from what happens to logits later."""
        ...

    def add(self, logits: Any, who: Ints, tokens: Ints, amounts: Floats) -> None:
        """Adds amounts; what is named twice gets both."""
        ...

    def penalise(self, logits: Any, who: Ints, tokens: Ints, amounts: Floats, factor: Floats) -> None:
        """Subtracts amounts [s, n], then divides what is positive by factor [s, 1] and multiplies the rest by it."""
        ...

    def forbid(self, logits: Any, who: Ints, words: NDArray[np.int32]) -> None:
        """Leaves only tokens whose bit is set: words [s, vocab / 32], token i is bit i % 32 of word i // 32."""
        ...

    def likeliest(self, logits: Any) -> Ints:
        """The first of the largest in each row."""
        ...

    def draw(self, logits: Any, seeds: NDArray[np.uint64], positions: Ints, parameters: Parameters) -> Ints:
        """See kernels.reference.sampling."""
        ...

    def logprobs(self, raw: Any, ids: Ints, k: int) -> tuple[Floats, Ints, Floats]:
        """Of the tokens ids [s], and the k likeliest: [s], ids [s, k], [s, k], best first."""
        ...


class HostLogits:
    """See LogitsOps: arrays, without a torch operator, drawn from by the native kernels."""

    def __init__(self) -> None:
        from kernels.cpu import sampling

        self._sampling = sampling

    def copy(self, logits: Floats, who: Ints) -> Floats:
        """See LogitsOps."""
        return logits[who]

    def add(self, logits: Floats, who: Ints, tokens: Ints, amounts: Floats) -> None:
        """See LogitsOps."""
        self._sampling.add(logits, who.reshape(-1), np.ascontiguousarray(tokens), np.ascontiguousarray(amounts))

    def penalise(self, logits: Floats, who: Ints, tokens: Ints, amounts: Floats, factor: Floats) -> None:
        """See LogitsOps."""
        lists = np.ascontiguousarray(tokens), np.ascontiguousarray(amounts)
        self._sampling.penalise(logits, who, *lists, np.ascontiguousarray(factor).reshape(-1))

    def forbid(self, logits: Floats, who: Ints, words: NDArray[np.int32]) -> None:
        """See LogitsOps."""
        self._sampling.forbid(logits, who, words)

    def likeliest(self, logits: Floats) -> Ints:
        """See LogitsOps."""
        return self._sampling.likeliest(logits)

    def draw(self, logits: Floats, seeds: NDArray[np.uint64], positions: Ints, parameters: Parameters) -> Ints:
        """See LogitsOps."""
        return self._sampling.draw_tokens(logits, *parameters, self._sampling.uniform(seeds, positions))

    def logprobs(self, raw: Floats, ids: Ints, k: int) -> tuple[Floats, Ints, Floats]:
        """See LogitsOps."""
        return self._sampling.logprobs(raw, ids, k)


class TorchLogits:
    """See LogitsOps: tensors on one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._uniform = dispatch.choose("uniform").function
        self._draw_tokens = dispatch.choose("draw_tokens", device).function

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        return without_waiting(torch.from_numpy(array), self._device)

    def copy(self, logits: Tensor, who: Ints) -> Tensor:
        """See LogitsOps."""
        return logits.index_select(0, self._tensor(who))

    def add(self, logits: Tensor, who: Ints, tokens: Ints, amounts: Floats) -> None:
        """See LogitsOps."""
        logits.index_put_((self._tensor(who), self._tensor(tokens)), self._tensor(amounts), accumulate=True)

    def penalise(self, logits: Tensor, who: Ints, tokens: Ints, amounts: Floats, factor: Floats) -> None:
        """See LogitsOps."""
        at = (self._tensor(who[:, None]), self._tensor(tokens))
        some = logits[at] - self._tensor(amounts)
        by = self._tensor(factor)
        logits.index_put_(at, torch.where(some > 0, some / by, some * by))

    def forbid(self, logits: Tensor, who: Ints, words: NDArray[np.int32]) -> None:
        """See LogitsOps."""
        index = self._tensor(who)
        bits = torch.arange(32, dtype=torch.int32, device=self._device)
        allowed = (self._tensor(words).unsqueeze(-1) >> bits & 1).bool().flatten(1)[:, : logits.shape[1]]
        logits.index_copy_(0, index, logits.index_select(0, index).masked_fill_(~allowed, float("-inf")))

    def likeliest(self, logits: Tensor) -> Ints:
        """See LogitsOps."""
        ids: Ints = logits.argmax(dim=-1).cpu().numpy()
        return ids

    def draw(self, logits: Tensor, seeds: NDArray[np.uint64], positions: Ints, parameters: Parameters) -> Ints:
        """See LogitsOps."""
        u = self._uniform(torch.from_numpy(seeds.view(np.int64)), torch.from_numpy(positions))
        ids: Ints = self._draw_tokens(logits, *(torch.from_numpy(p) for p in parameters), u).cpu().numpy()
        return ids

    def logprobs(self, raw: Tensor, ids: Ints, k: int) -> tuple[Floats, Ints, Floats]:
        """See LogitsOps."""
        scale = raw.logsumexp(dim=-1, keepdim=True)
        chosen = raw.gather(1, self._tensor(ids).unsqueeze(1)) - scale
        values, indices = raw.topk(k, dim=-1)
        return chosen.squeeze(1).cpu().numpy(), indices.cpu().numpy(), (values - scale).cpu().numpy()
