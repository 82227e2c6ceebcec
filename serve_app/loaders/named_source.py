"""Remembers which tensors of the files a model's matrices were made of."""

from collections.abc import Sequence

from torch import Tensor

from serve_app.loaders.name_map import gguf_name
from serve_app.models.base import WeightSource
from serve_app.quant.experts import Experts
from serve_app.quant.weight import Weight


class NamedSource:
    """The WeightSource behind it, with a list of what it gave."""

    def __init__(self, source: WeightSource, architecture: str) -> None:
        """architecture: GGUF's name of it, by which tensors have theirs."""
        self._source = source
        self._architecture = architecture
        self._found: dict[int, tuple[Weight | Experts, tuple[str, ...]]] = {}

    def names(self, matrix: Weight | Experts) -> tuple[str, ...]:
        """GGUF names of the tensors that make up a matrix, several where they were fused; none for a router, which
        families take as a tensor."""
        found = self._found.get(id(matrix))
        return () if found is None else found[1]

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """See WeightSource."""
        return self._source.tensor(name, shape)

    def weight(self, names: Sequence[str], out_features: Sequence[int], in_features: int) -> Weight:
        """See WeightSource."""
        weight = self._source.weight(names, out_features, in_features)
        # The matrix is kept, so that no other can come to lie at its address.
        self._found[id(weight)] = weight, tuple(gguf_name(name, self._architecture) for name in names)
        return weight

    def experts(self, name: str, num_experts: int, out_features: int, in_features: int) -> Experts:
        """See WeightSource."""
        experts = self._source.experts(name, num_experts, out_features, in_features)
        self._found[id(experts)] = experts, (gguf_name(name.replace("{}.", ""), self._architecture),)
        return experts

    def has(self, name: str) -> bool:
        """See WeightSource."""
        return self._source.has(name)
