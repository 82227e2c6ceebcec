"""Which backend is taken, and what is said of those that are not."""

import logging
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from kernels.gpu import support
from kernels.gpu.support import TritonSupport
from serve_app.attention import (
    choose,
    flash3_backend,
    flashinfer_backend,
    self_test,
    triton_backend,
    vllm_flash_backend,
    vllm_flash_module,
)
from serve_app.attention.backend import AttentionNeeds, AttentionShape
from serve_app.attention.choose import Candidate, choose_backend, list_backends, usual_needs
from serve_app.attention.device_batch import DeviceBatch
from serve_app.attention.gpu_limits import Limits
from serve_app.attention.report import BackendReport
from serve_app.attention.torch_backend import TorchAttention, TorchPlan
from serve_app.errors import LaunchError
from serve_app.layers.step_choice import step_type
from serve_app.layers.torch_step import TorchStep

E4M3 = torch.float8_e4m3fn
PLAIN = AttentionShape(0, 8, 2, 128, 128**-0.5)


def gpu(
    architecture: tuple[int, int] = (9, 0),
    dtype: torch.dtype = torch.bfloat16,
    kv_dtype: torch.dtype | None = None,
    shape: AttentionShape = PLAIN,
    block_size: int = 32,
    wants_graphs: bool = False,
) -> AttentionNeeds:
    return AttentionNeeds(
        torch.device("cuda"), architecture, dtype, kv_dtype or dtype, block_size, (shape,), wants_graphs
    )


FLASH_2, FLASH_3 = vllm_flash_backend.FLASH_2.limits, vllm_flash_backend.FLASH_3.limits
FLASHINFER = flashinfer_backend.LIMITS


@pytest.mark.parametrize(
    ("limits", "needs", "reason"),
    [
        (FLASH_3, gpu(), None),
        (FLASH_3, gpu((8, 0)), "compute capability 9.0 to below 10.0, not 8.0"),
        (FLASH_3, gpu((10, 0)), "not 10.0"),
        (FLASH_3, gpu(dtype=torch.float32), "does not compute in float32"),
        (FLASH_3, gpu(kv_dtype=E4M3), "e4m3"),
        (FLASH_3, gpu(kv_dtype=torch.float16), "the KV cache is float16, the queries are bfloat16"),
        (FLASH_3, gpu(block_size=48), None),
        (FLASH_2, gpu((8, 6)), None),
        (FLASH_2, gpu((7, 5)), "not 7.5"),
        (FLASH_2, gpu(shape=replace(PLAIN, head_dim=100)), "heads of 100"),
        (FLASH_2, gpu(shape=replace(PLAIN, head_dim=320)), "up to 256"),
        (FLASH_2, gpu(block_size=24), "blocks of 24"),
        (FLASH_2, gpu(wants_graphs=True, shape=replace(PLAIN, softcap=30.0, window=100)), None),
        (FLASHINFER, gpu(), None),
        (FLASHINFER, gpu(shape=replace(PLAIN, head_dim=80)), "none of 64, 128, 256"),
        (FLASHINFER, gpu(wants_graphs=True), "captured"),
        (FLASH_3, usual_needs("cpu", torch.bfloat16), "the model is on cpu"),
    ],
)
def test_limits(limits: Limits, needs: AttentionNeeds, reason: str | None) -> None:
    refusal = limits.refusal(needs)
    if reason is None:
        assert refusal is None
    else:
        assert refusal is not None
        assert reason in refusal


@pytest.mark.parametrize(
    ("needs", "reason"),
    [
        (gpu(), None),
        (gpu((8, 0), torch.float32, shape=replace(PLAIN, head_dim=80, softcap=1.0, window=7)), None),
        (gpu((8, 9), kv_dtype=E4M3), None),
        (gpu((8, 6), kv_dtype=E4M3), "8.9"),
        (gpu(kv_dtype=torch.uint8), "q8"),
        (gpu(dtype=torch.float64), "float64"),
        (gpu(shape=replace(PLAIN, head_dim=512)), "over 256"),
    ],
)
def test_triton(needs: AttentionNeeds, reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend, "triton_support", lambda device: TritonSupport(True, False, "it is there"))
    report = triton_backend.look(needs)
    assert report.is_usable == (reason is None)
    assert (reason or "it is there") in report.reason


def test_triton_is_turned_off_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "_look", lambda device: TritonSupport(True, False, "it is there"))
    assert triton_backend.look(gpu()).is_usable
    assert step_type(torch.device("cuda"), "triton") is not TorchStep
    monkeypatch.setenv("SIROCCO_TRITON", "0")
    report = triton_backend.look(gpu())
    assert (report.is_usable, report.reason) == (False, "turned off by SIROCCO_TRITON=0")
    assert step_type(torch.device("cuda"), "triton") is TorchStep


def test_support_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def look(name: str) -> TritonSupport:
        return support._look.__wrapped__(torch.device(name))

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert look("cpu").reason == "the model is on cpu"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert look("cpu").is_interpreted
    monkeypatch.setattr(support, "version", lambda name: "3.5.1")
    assert "3.5 is installed, 3.6 is the oldest" in look("cpu").reason
    monkeypatch.setattr(support, "_installed", lambda: None)
    assert look("cuda").reason == "triton is not installed"
    monkeypatch.setattr(support, "_installed", lambda: (3, 6))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "TRITON_INTERPRET" in look("cuda").reason
    monkeypatch.delenv("TRITON_INTERPRET")
    for found, is_usable in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=found: found)
        assert look("cuda").is_usable == is_usable


def test_modules_of_other_versions_are_refused_by_what_they_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    for backend, load, name, attribute in (
        (flash3_backend, flash3_backend.load, "flash_attn_interface", "flash_attn_with_kvcache"),
        (flashinfer_backend, flashinfer_backend.load, "flashinfer", "BatchPrefillWithPagedKVCacheWrapper"),
        (vllm_flash_module, vllm_flash_module.load_module, "vllm_flash_attn", "flash_attn_varlen_func"),
    ):
        assert name in load.__wrapped__()[1]
        monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: object())
        module = ModuleType(name)
        monkeypatch.setattr(backend.importlib, "import_module", lambda name, module=module: module)
        assert "does not load" in load.__wrapped__()[1]
        old = type("Old", (), {"plan": lambda self, qo_indptr: None, "__init__": lambda self, q, k_cache: None})
        setattr(module, attribute, old)
        function, reason = load.__wrapped__()
        assert function is None
        assert "of another version" in reason
        monkeypatch.undo()


class Wrong(TorchAttention):
    """Forgets the newest key of each request."""

    name = "wrong"

    def plan(self, batch: DeviceBatch) -> TorchPlan:
        batch.host.context_lens -= 1
        planned = super().plan(batch)
        batch.host.context_lens += 1
        return planned


class WrongDecodes(TorchAttention):
    """Is right as soon as there is a prefill."""

    def plan(self, batch: DeviceBatch) -> TorchPlan:
        is_decode = batch.host.max_query_len == 1
        return super().plan(replace(batch, context_lens=batch.context_lens - 1) if is_decode else batch)


class Broken(TorchAttention):
    """Does not run."""

    name = "broken"

    def plan(self, batch: DeviceBatch) -> TorchPlan:
        raise RuntimeError("no kernel image\nis available")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [PLAIN, replace(PLAIN, window=100, softcap=5.0), replace(PLAIN, n_kv_heads=8)])
def test_the_self_test_tells_right_from_wrong(shape: AttentionShape, dtype: torch.dtype) -> None:
    needs = replace(usual_needs("cpu", dtype), shapes=(shape, replace(shape, layer=1)))
    assert self_test.failure(TorchAttention(), needs) is None
    assert self_test.failure(TorchAttention(), replace(needs, kv_dtype=E4M3)) is None
    assert "off by" in str(self_test.failure(Wrong(), needs))
    assert self_test.failure(Broken(), needs) == (
        "its self-test of a prefill beside a decode fails with RuntimeError: no kernel image"
    )
    assert "of decodes alone is off by" in str(self_test.failure(WrongDecodes(), needs))


def usable(name: str) -> BackendReport:
    return BackendReport(name, True, "it is there")


def test_one_that_fails_its_self_test_is_passed_over_and_said_to_be(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    order = (
        Candidate("absent", lambda needs: BackendReport("absent", False, "it is not installed"), None),
        Candidate("wrong", lambda needs: usable("wrong"), lambda needs: Wrong()),
        Candidate("torch", lambda needs: usable("torch"), lambda needs: TorchAttention(), has_self_test=False),
    )
    monkeypatch.setattr(choose, "ORDER", order)
    needs = usual_needs("cpu", torch.float32)
    with caplog.at_level(logging.INFO, logger="serve_app.attention.choose"):
        chosen = choose_backend(needs)
    assert isinstance(chosen, TorchAttention)
    assert not isinstance(chosen, Wrong)
    assert "attention: torch (it is there); not absent: it is not installed; not wrong: its self-test" in caplog.text
    with pytest.raises(LaunchError, match="'wrong' cannot run here: its self-test of a prefill beside a decode is off"):
        choose_backend(needs, "wrong")
    with pytest.raises(LaunchError, match="'absent' cannot run here: it is not installed"):
        choose_backend(needs, "absent")


def test_the_order_and_a_reason_for_each() -> None:
    reports = list_backends(usual_needs("cpu", torch.float32, E4M3))
    assert [report.name for report in reports] == [
        "cpu", "vllm-flash-attn", "flash-attn-3", "flashinfer", "triton", "torch",
    ]  # fmt: skip
    assert all(report.reason for report in reports)
    assert reports[0].reason == "the KV cache is float8_e4m3fn"
    assert isinstance(choose_backend(usual_needs("cpu", torch.float32, E4M3)), TorchAttention)


def test_a_gpu_without_libraries_hears_why(monkeypatch: pytest.MonkeyPatch) -> None:
    vllm_flash_backend.load.cache_clear()
    report = vllm_flash_backend.look(gpu((8, 0)))
    assert "version 3: it is for compute capability 9.0" in report.reason
    assert "version 2: no installed distribution has _vllm_fa2_C" in report.reason
