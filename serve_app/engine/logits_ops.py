"""What the sampler does to logits: to arrays of the host, where native steps leave them, or to tensors of a device."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels import dispatch
from kernels.reference.sampling import accept_or_draw, without_waiting

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Logits = Floats | Tensor
"""float32 [S, vocab]."""
Ids = Ints | Tensor
"""int64 [S], where the logits are."""
Parameters = tuple[Floats, Ints, NDArray[np.float64], NDArray[np.float64]]
"""Temperature, top_k, top_p and min_p of each row."""


Proposed = tuple[Ints, Ints, Floats]
"""Of each row a token [S] that was sampled from candidates [S, K] with these chances [S, K]."""

# The random number that accepts a token is of this much later a position, which nothing is drawn at.
_ACCEPTING = 1 << 48


class LogitsOps(Protocol):
    """Changes logits in place. What is drawn stays where the logits are; all arguments but logits and ids are arrays
    of the host, and none waits for the device.

    who: indexes into the rows of logits. tokens and amounts are [len(who), n], or all three [n].
    """

    def own(self, logits: Any) -> Any:
        """Logits of the CPU in the form that these operations take: an array or a tensor over the same numbers."""
        ...

    def copy(self, logits: Any, who: Ints) -> Any:
        """The rows who, apart from what happens to logits later."""
        ...

    def add(self, logits: Any, who: Ints, tokens: Ints, amounts: Floats) -> None:
        """Adds amounts; what is named twice gets both."""
        ...

    def forbid(self, logits: Any, who: Ints, words: NDArray[np.int32]) -> None:
        """Leaves only tokens whose bit is set: words [s, vocab / 32], token i is bit i % 32 of word i // 32."""
        ...

    def likeliest(self, logits: Any) -> Any:
        """The first of the largest in each row."""
        ...

    def draw(self, logits: Any, seeds: NDArray[np.uint64], positions: Ints, parameters: Parameters) -> Any:
        """See kernels.reference.sampling."""
        ...

    def accept_or_draw(
        self, logits: Any, seeds: NDArray[np.uint64], positions: Ints, parameters: Parameters, proposed: Proposed
    ) -> Any:
        """See kernels.reference.sampling; temperatures are above 0."""
        ...

    def joined(self, parts: Sequence[tuple[Ints, Any]]) -> Any:
        """The ids [S] of rows that were drawn apart: of the rows who each."""
        ...

    def logprobs(self, raw: Any, ids: Any, k: int) -> tuple[Any, Any, Any]:
        """Of the tokens ids [s], and the k likeliest: [s], ids [s, k], [s, k], best first."""
        ...

    def pick(self, ids: Any, who: Ints) -> Any:
        """Those of the rows who."""
        ...

    def fetch(self, results: Sequence[Any]) -> "Fetch":
        """Begins to bring results to the host."""
        ...


class Fetch(Protocol):
    """Results on their way to the host."""

    def wait(self) -> list[NDArray[Any]]:
        """The results, when they have come; the same ones each time."""
        ...


class Fetched:
    """See Fetch: they are there."""

    def __init__(self, results: Sequence[NDArray[Any]]) -> None:
        self._results = list(results)

    def wait(self) -> list[NDArray[Any]]:
        """See Fetch."""
        return self._results


class CudaFetch:
    """See Fetch: copies into pinned memory, and an event behind the last of them."""

    def __init__(self, results: Sequence[Tensor]) -> None:
        self._copies = [torch.empty(r.shape, dtype=r.dtype, pin_memory=True) for r in results]
        for copy, result in zip(self._copies, results, strict=True):
            copy.copy_(result, non_blocking=True)
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record()

    def wait(self) -> list[NDArray[Any]]:
        """See Fetch."""
        self._event.synchronize()
        return [copy.numpy() for copy in self._copies]


class HostLogits:
    """See LogitsOps: arrays, without a torch operator, drawn from by the native kernels."""

    def __init__(self) -> None:
        from kernels.cpu import sampling

        self._sampling = sampling

    def own(self, logits: Logits) -> Floats:
        """See LogitsOps."""
        return logits.numpy() if isinstance(logits, Tensor) else logits

    def copy(self, logits: Floats, who: Ints) -> Floats:
        """See LogitsOps."""
        return logits[who]

    def add(self, logits: Floats, who: Ints, tokens: Ints, amounts: Floats) -> None:
        """See LogitsOps."""
        self._sampling.add(logits, who.reshape(-1), np.ascontiguousarray(tokens), np.ascontiguousarray(amounts))

    def penalise(self, logits: Floats, who: Ints, tokens: Ints, amounts: Floats, factor: Floats) -> None:
        """Subtracts amounts [s, n], then divides what is positive by factor [s, 1] and multiplies the rest by it."""
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

    def accept_or_draw(
        self, logits: Floats, seeds: NDArray[np.uint64], positions: Ints, parameters: Parameters, proposed: Proposed
    ) -> Ints:
        """See LogitsOps."""
        u, accept_u = (self._sampling.uniform(seeds, at) for at in (positions, positions + _ACCEPTING))
        return self._sampling.accept_or_draw(logits, *parameters, u, accept_u, *proposed)

    def joined(self, parts: Sequence[tuple[Ints, Ints]]) -> Ints:
        """See LogitsOps."""
        ids = np.empty(sum(len(who) for who, _ in parts), np.int64)
        for who, part in parts:
            ids[who] = part
        return ids

    def logprobs(self, raw: Floats, ids: Ints, k: int) -> tuple[Floats, Ints, Floats]:
        """See LogitsOps."""
        return self._sampling.logprobs(raw, ids, k)

    def pick(self, ids: Ints, who: Ints) -> Ints:
        """See LogitsOps."""
        return ids[who]

    def fetch(self, results: Sequence[NDArray[Any]]) -> Fetch:
        """See LogitsOps."""
        return Fetched(results)


class TorchLogits:
    """See LogitsOps: tensors on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._uniform = dispatch.choose("uniform").function
        self._draw_tokens = dispatch.choose("draw_tokens", device).function

    def tensor(self, array: NDArray[Any]) -> Tensor:
        """An array of the host on the device; the host may change it at once."""
        return without_waiting(torch.from_numpy(array), self.device)

    def own(self, logits: Logits) -> Tensor:
        """See LogitsOps."""
        return torch.as_tensor(logits)

    def copy(self, logits: Tensor, who: Ints) -> Tensor:
        """See LogitsOps."""
        return logits.index_select(0, self.tensor(who))

    def add(self, logits: Tensor, who: Ints, tokens: Ints, amounts: Floats) -> None:
        """See LogitsOps."""
        logits.index_put_((self.tensor(who), self.tensor(tokens)), self.tensor(amounts), accumulate=True)

    def forbid(self, logits: Tensor, who: Ints, words: NDArray[np.int32]) -> None:
        """See LogitsOps."""
        index = self.tensor(who)
        bits = torch.arange(32, dtype=torch.int32, device=self.device)
        allowed = (self.tensor(words).unsqueeze(-1) >> bits & 1).bool().flatten(1)[:, : logits.shape[1]]
        logits.index_copy_(0, index, logits.index_select(0, index).masked_fill_(~allowed, float("-inf")))

    def likeliest(self, logits: Tensor) -> Tensor:
        """See LogitsOps."""
        return logits.argmax(dim=-1)

    def draw(self, logits: Tensor, seeds: NDArray[np.uint64], positions: Ints, parameters: Parameters) -> Tensor:
        """See LogitsOps."""
        ids: Tensor = self._draw_tokens(logits, *map(torch.from_numpy, parameters), self._random(seeds, positions))
        return ids

    def accept_or_draw(
        self, logits: Tensor, seeds: NDArray[np.uint64], positions: Ints, parameters: Parameters, proposed: Proposed
    ) -> Tensor:
        """See LogitsOps."""
        u, accept_u = (self._random(seeds, at) for at in (positions, positions + _ACCEPTING))
        temperature, top_k, top_p, min_p = map(torch.from_numpy, parameters)
        tokens, candidates, chances = (self.tensor(array) for array in proposed)
        return accept_or_draw(logits, temperature, top_k, top_p, min_p, u, accept_u, tokens, candidates, chances)

    def joined(self, parts: Sequence[tuple[Ints, Tensor]]) -> Tensor:
        """See LogitsOps."""
        ids = torch.empty(sum(len(who) for who, _ in parts), dtype=torch.int64, device=self.device)
        for who, part in parts:
            ids.index_copy_(0, self.tensor(who), part)
        return ids

    def _random(self, seeds: NDArray[np.uint64], positions: Ints) -> Tensor:
        u: Tensor = self._uniform(torch.from_numpy(seeds.view(np.int64)), torch.from_numpy(positions))
        return u

    def logprobs(self, raw: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """See LogitsOps."""
        scale = raw.logsumexp(dim=-1, keepdim=True)
        chosen = raw.gather(1, ids.unsqueeze(1)) - scale
        values, indices = raw.topk(k, dim=-1)
        return chosen.squeeze(1), indices, values - scale

    def pick(self, ids: Tensor, who: Ints) -> Tensor:
        """See LogitsOps."""
        return ids if len(who) == len(ids) else ids.index_select(0, self.tensor(who))

    def fetch(self, results: Sequence[Tensor]) -> Fetch:
        """See LogitsOps."""
        if self.device.type == "cuda":
            return CudaFetch(results)
        return Fetched([result.numpy() for result in results])
