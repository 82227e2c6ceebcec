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


def test_on_a_gpu_the_pool_fills_its_memory_up_to_nine_tenths(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the CPU in the place of a device of 100 MB: 40 are in use, and a rotary table of 512 tokens will be."""
    monkeypatch.setattr("serve_app.engine.build.gpu_memory", lambda device: (60 * 10**6, 100 * 10**6))
    with LLM(str(MODEL), dtype="f32", config=EngineConfig(block_size=16)) as llm:
        kv = llm.engine.parts.kv
        assert kv.num_blocks == (50 * 10**6 - 512 * 8 * 4) // kv.geometry.bytes_per_block
        assert kv.num_blocks < 50 * 10**6 // kv.geometry.bytes_per_block
        plain = llm.generate(["Once upon a time"], SamplingParams(temperature=0.0, max_tokens=6))[0].token_ids
    monkeypatch.undo()
    with LLM(str(MODEL), dtype="f32", config=EngineConfig(block_size=16)) as llm:
        assert llm.generate(["Once upon a time"], SamplingParams(temperature=0.0, max_tokens=6))[0].token_ids == plain


def test_the_log_says_which_attention_runs_and_why_not_the_others(caplog: pytest.LogCaptureFixture) -> None:
    config = EngineConfig(block_size=16, attention_backend="torch")
    with caplog.at_level(logging.INFO), LLM(str(MODEL), config=config):
        assert "attention: torch (plain torch runs everywhere)" in caplog.text
    caplog.clear()
    config = EngineConfig(block_size=16, pa_cache_type="f8e4m3")
    with caplog.at_level(logging.INFO), LLM(str(MODEL), config=config):
        assert "attention: torch (plain torch runs everywhere); not cpu: the KV cache is float8_e4m3fn" in caplog.text
        assert "; not triton: the model is on cpu" in caplog.text
