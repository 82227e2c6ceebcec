"""Finds flash-attention's compiled operators in installed distributions, by their metadata, and loads them.

The package that they lie in is never imported: vllm's own import changes torch and the environment.
"""

from collections.abc import Iterator, Sequence
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import torch

DISTRIBUTIONS = ("vllm", "vllm-flash-attn", "vllm_flash_attn")


def find_library(stem: str, distributions: Sequence[str] = DISTRIBUTIONS) -> Path | None:
    """The shared library whose file name begins with stem, of the first distribution that has one."""
    for name in distributions:
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue
        for path in _libraries(found, stem):
            return path
    return None


def _libraries(found: Distribution, stem: str) -> Iterator[Path]:
    for file in found.files or ():
        if file.name.split(".")[0] == stem and file.suffix == ".so":
            path = Path(str(found.locate_file(file)))
            if path.is_file():
                yield path


def load_operator(library: Path, namespace: str, name: str) -> tuple[object, torch.FunctionSchema]:
    """The operator of a library, and its schema. OSError or RuntimeError where it does not load, AttributeError where
    there is no such operator."""
    ops: Any = torch.ops
    ops.load_library(str(library))
    operator = getattr(getattr(ops, namespace), name).default
    return operator, operator._schema
