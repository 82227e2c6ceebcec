import importlib.util
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Test modules of several folders share these, which are no packages of ours to import by name.
_SHARED = (
    "tiny_llama",
    "block_data",
    "torch_operators",
    "family_cases",
    "mixtures",
    "ggml_writer",
    "family_gguf",
    "family_folders",
    "asked_source",
)
for _name in _SHARED:
    _spec = importlib.util.spec_from_file_location(_name, Path(__file__).with_name(f"{_name}.py"))
    assert _spec is not None
    assert _spec.loader is not None
    _module = importlib.util.module_from_spec(_spec)
    sys.modules[_name] = _module
    _spec.loader.exec_module(_module)

# How long an example takes depends on what else the machine does. `make test` draws the same examples each time, so
# that what it says is about the change; `make nightly` searches, and finds what nobody thought of.
_QUIET = [HealthCheck.too_slow]
settings.register_profile("same", deadline=None, suppress_health_check=_QUIET, derandomize=True)
settings.register_profile("search", deadline=None, suppress_health_check=_QUIET, print_blob=True)
settings.load_profile("same")


@pytest.fixture(autouse=True)
def _levels_of_our_loggers() -> Iterator[None]:
    """The program sets them; no test shall see those of another."""
    loggers = [logging.getLogger(name) for name in ("serve_app", "deployments", "kernels")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
