"""What an engine says of its kernels while it is built."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from kernels import dispatch
from serve_app.commands import doctor
from serve_app.engine.llm import LLM
from serve_app.errors import LaunchError
from serve_app.options import EngineConfig, SamplingParams

MODEL = Path(__file__).parents[1] / "data" / "models" / "stories260K" / "stories260K-F32.gguf"


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Variables that are read again when the native module is next asked for."""
    dispatch.native.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    dispatch.native.cache_clear()


def kernel_lines(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """What the log says of kernels once an engine has been built and has worked."""
    with caplog.at_level(logging.INFO), LLM(str(MODEL), config=EngineConfig(block_size=16)) as llm:
        llm.generate(["Once", "The cat"], SamplingParams(max_tokens=3))
    return [record for record in caplog.records if "kernel" in record.getMessage()]


def test_one_line_names_the_instruction_set(environment: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    (line,) = kernel_lines(caplog)
    assert line.getMessage() == f"CPU kernels: {dispatch.native().reason}"
    assert line.levelno == logging.INFO


def test_without_native_code_one_warning_says_why(
    environment: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    environment.setenv("SIROCCO_NATIVE", "0")
    (line,) = kernel_lines(caplog)
    assert "plain torch" in line.getMessage()
    assert "SIROCCO_NATIVE=0" in line.getMessage()
    assert line.levelno == logging.WARNING
    findings = [f for f in doctor.examine()["kernels"] if f.name == "native_kernels"]
    assert [(f.value, f.note) for f in findings] == [(False, dispatch.native().reason)]


def test_an_instruction_set_that_this_cpu_lacks_ends_the_start(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("SIROCCO_CPU_ISA", "amx")
    with pytest.raises(LaunchError, match=r"^SIROCCO_CPU_ISA=amx: the kernels can run as .*generic on this CPU$"):
        LLM(str(MODEL))
    assert any("SIROCCO_CPU_ISA=amx" in str(f.note) for f in doctor.examine()["attention"])
