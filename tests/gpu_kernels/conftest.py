"""Tests of Triton's kernels: compiled where there is a CUDA device, else in the interpreter, in a process of their own.

Triton decides as kernels are defined whether they are interpreted, so the variable has to be set before anything
imports them. Without it and without a device only test_in_the_interpreter.py is collected, which starts that process,
and test_compiles.py, which compiles kernels without running them.
"""

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

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


def _patch_the_language_once_a_launch() -> None:
    """Triton's interpreter replaces what triton.language holds as a launch begins, and again at every call of a device
    function in it, which changes nothing more and takes most of the time of a small launch."""
    from triton import language as tl
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[int] = set()

    def patch_once(function: Any) -> Any:
        modules = {id(value) for value in function.__globals__.values() if value is tl or value is tl.core}
        if modules and modules <= patched:
            return None
        patched.update(modules)
        return patch(function)

    def launch_anew(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return launch(self, *args, **kwargs)

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_anew


if IS_INTERPRETED:
    _patch_the_language_once_a_launch()
