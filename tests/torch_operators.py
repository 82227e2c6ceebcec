"""Which torch operators run."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

WAITING = {"_local_scalar_dense", "nonzero", "is_nonzero", "unique2", "masked_select", "equal", "item"}
"""Operators that read a tensor's contents on the host, or whose result's shape depends on them."""


class Operators(TorchDispatchMode):
    """Remembers the names of those that ran within it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))
