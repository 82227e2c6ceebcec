"""Everything works without the native module, and says why it is not used."""

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from tiny_llama import Piece, TinyPool, full_logits, hf_llama, make_batch, our_llama

import kernels
from kernels import dispatch
from kernels.cpu import _native
from kernels.gpu import support
from kernels.gpu.support import TritonSupport
from kernels.reference import sampling
from serve_app.attention.choose import choose_backend, list_backends, usual_needs
from serve_app.attention.torch_backend import TorchAttention
from serve_app.engine.model_runner import ModelRunner
from serve_app.engine.sampler import Sampler
from serve_app.errors import LaunchError
from serve_app.options import SamplingParams


@pytest.fixture
def no_native(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    dispatch.native.cache_clear()
    monkeypatch.setenv("SIROCCO_NATIVE", "0")
    yield
    monkeypatch.undo()
    dispatch.native.cache_clear()


def generate(num_tokens: int) -> list[int]:
    model = our_llama(hf_llama())
    pool = TinyPool(model.args, 8, 16)
    sampler = Sampler(97, 1)
    sampler.set_row(0, SamplingParams(temperature=0.8, top_k=20), 5, [3, 1, 4])
    runner = ModelRunner(model, sampler, pool, "cpu")
    ids = [3, 1, 4]
    start = 0
    for _ in range(num_tokens):
        result = runner.execute(make_batch(pool, [Piece(ids, start, len(ids), [5, 2])], rows=[0])).wait()
        start = len(ids)
        ids += result.token_ids.tolist()
    return ids


def test_native_is_the_choice_here() -> None:
    choice = dispatch.choose("uniform")
    assert choice.name.startswith("native")
    assert choose_backend(usual_needs("cpu", torch.float32)) is None


def test_the_same_text_without_native_code(no_native: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert dispatch.native().ops is None
    assert isinstance(choose_backend(usual_needs("cpu", torch.float32)), TorchAttention)
    assert dispatch.native_dequantize(8) is None
    assert dispatch.native_matmul(8) is None
    assert dispatch.choose("uniform").function is sampling.uniform
    assert "SIROCCO_NATIVE" in dispatch.choose("uniform").reason
    plain_text, plain_logits = generate(20), full_logits(our_llama(hf_llama()), list(range(60)))
    monkeypatch.undo()
    dispatch.native.cache_clear()
    assert generate(20) == plain_text
    torch.testing.assert_close(full_logits(our_llama(hf_llama()), list(range(60))), plain_logits, rtol=1e-4, atol=1e-4)


def test_a_named_backend_that_cannot_run_is_refused(no_native: None) -> None:
    with pytest.raises(LaunchError, match="SIROCCO_NATIVE"):
        choose_backend(usual_needs("cpu", torch.float32), "cpu")
    with pytest.raises(LaunchError, match=r"there are auto, cpu, .*torch"):
        choose_backend(usual_needs("cpu", torch.float32), "flash")
    usable = [r.name for r in list_backends(usual_needs("cpu", torch.float32)) if r.is_usable]
    assert usable == ["torch"]
    with pytest.raises(LaunchError, match="q8"):
        choose_backend(usual_needs("cpu", torch.float32, torch.uint8))


def test_a_module_of_another_version_or_none_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    dispatch.native.cache_clear()
    monkeypatch.setattr(kernels, "ABI", kernels.ABI + 1)
    assert "another version" in dispatch.native().reason
    monkeypatch.undo()
    dispatch.native.cache_clear()
    monkeypatch.setitem(sys.modules, "kernels.cpu._native", None)
    assert "not built" in dispatch.native().reason
    monkeypatch.undo()
    dispatch.native.cache_clear()


def test_other_devices_and_dtypes_take_torch() -> None:
    assert dispatch.choose("uniform", "meta").name == "torch"
    assert dispatch.choose("uniform", "cpu", torch.float64).name == "torch"
    assert isinstance(choose_backend(usual_needs("meta", torch.float32)), TorchAttention)
    with pytest.raises(KeyError):
        dispatch.choose("no such op")


def native_in_a_process(isa: str) -> str:
    """What a fresh process says of SIROCCO_CPU_ISA=isa: its reason, or the last line of its error."""
    code = "from kernels import dispatch; print(dispatch.native().reason)"
    result = subprocess.run([sys.executable, "-c", code], env={"SIROCCO_CPU_ISA": isa}, capture_output=True, text=True)
    return (result.stdout or result.stderr).strip().splitlines()[-1]


def test_the_instruction_set_can_be_named_in_the_environment() -> None:
    assert native_in_a_process("generic") == "native generic"


def test_one_that_cannot_run_is_named_with_those_that_can() -> None:
    usable = ", ".join(_native.instruction_sets())
    expected = f"ValueError: SIROCCO_CPU_ISA=mmx: the kernels can run as {usable} on this CPU"
    assert native_in_a_process("mmx") == expected


def test_triton_computes_on_a_cpu_only_where_it_is_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SIROCCO_TRITON", raising=False)
    assert dispatch.triton_computes("cpu") == (False, "the model is on cpu")
    monkeypatch.setenv("SIROCCO_TRITON", "1")
    monkeypatch.setattr(dispatch, "triton_support", lambda device: TritonSupport(False, False, "the model is on cpu"))
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1 from the start"):
        dispatch.triton_computes("cpu")
    monkeypatch.setattr(dispatch, "triton_support", lambda device: TritonSupport(True, True, "interpreted"))
    assert dispatch.triton_computes("cpu") == (True, "interpreted")
    monkeypatch.setattr(dispatch, "triton_support", support.triton_support)
    monkeypatch.setenv("SIROCCO_TRITON", "0")
    assert dispatch.triton_computes("cuda") == (False, "turned off by SIROCCO_TRITON=0")


def test_triton_takes_the_place_of_the_native_module(monkeypatch: pytest.MonkeyPatch, no_native: None) -> None:
    monkeypatch.delenv("SIROCCO_NATIVE")
    monkeypatch.setenv("SIROCCO_TRITON", "1")
    assert dispatch.native() == dispatch.NativeModule(None, "SIROCCO_TRITON=1: Triton's kernels compute")
