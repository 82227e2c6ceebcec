"""Tests of Triton's kernels: compiled where there is a CUDA device, else in the interpreter, in a process of their own.

Triton decides as kernels are defined whether they are interpreted, so the variable has to be set before anything
imports them. Without it and without a device only test_in_the_interpreter.py is collected, which starts that process,
and test_compiles.py, which compiles kernels without running them.
"""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NOT_INTERPRETED = ("test_in_the_interpreter.py", "test_compiles.py", "test_encode_compiles.py")

collect_ignore_glob: list[str] = []
if IS_INTERPRETED:
    collect_ignore_glob = [*NOT_INTERPRETED]
elif not torch.cuda.is_available():
    collect_ignore_glob = [
        path.name for path in Path(__file__).parent.glob("test_*.py") if path.name not in NOT_INTERPRETED
    ]

# Test modules share these, which are no packages to import by name.
for _path in Path(__file__).parent.glob("*_cases.py"):
    _spec = importlib.util.spec_from_file_location(_path.stem, _path)
    assert _spec is not None
    assert _spec.loader is not None
    _module = importlib.util.module_from_spec(_spec)
    sys.modules[_path.stem] = _module
    _spec.loader.exec_module(_module)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not IS_INTERPRETED and item.path.parent == Path(__file__).parent and item.path.name not in NOT_INTERPRETED:
            item.add_marker("gpu")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run."""
    return torch.device("cpu" if IS_INTERPRETED else "cuda")
