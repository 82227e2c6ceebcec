"""Which attention runs here, and why the others do not."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from serve_app.attention import (
    cpu_backend,
    flash3_backend,
    flashinfer_backend,
    self_test,
    torch_backend,
    triton_backend,
    vllm_flash_backend,
)
from serve_app.attention.backend import AttentionBackend, AttentionNeeds, AttentionShape
from serve_app.attention.report import BackendReport
from serve_app.attention.torch_backend import TorchAttention
from serve_app.errors import LaunchError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Candidate:
    """make None: no operation by itself, but part of the native program of a whole step."""

    name: str
    look: Callable[[AttentionNeeds], BackendReport]
    make: Callable[[AttentionNeeds], AttentionBackend] | None
    has_self_test: bool = True


ORDER = (
    Candidate("cpu", cpu_backend.look, None),
    Candidate(vllm_flash_backend.NAME, vllm_flash_backend.look, vllm_flash_backend.make),
    Candidate(flash3_backend.NAME, flash3_backend.look, flash3_backend.make),
    Candidate(flashinfer_backend.NAME, flashinfer_backend.look, flashinfer_backend.make),
    Candidate(triton_backend.NAME, triton_backend.look, triton_backend.make),
    # The oracle of the self-test itself.
    Candidate("torch", torch_backend.look, lambda needs: TorchAttention(), has_self_test=False),
)


def usual_needs(device: torch.device | str, dtype: torch.dtype, kv_dtype: torch.dtype | None = None) -> AttentionNeeds:
    """Those of most models: heads of 128, four query heads to a KV head, blocks of 32."""
    shape = AttentionShape(0, 8, 2, 128, 128**-0.5)
    device = torch.device(device)
    return AttentionNeeds(device, architecture_of(device), dtype, dtype if kv_dtype is None else kv_dtype, 32, (shape,))


def architecture_of(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of a CUDA device, None for any other."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def list_backends(needs: AttentionNeeds) -> list[BackendReport]:
    """All backends in the order of preference."""
    return [candidate.look(needs) for candidate in ORDER]


def choose_backend(needs: AttentionNeeds, name: str = "auto") -> AttentionBackend | None:
    """The named backend, or with 'auto' the first usable one that passes its self-test.

    LaunchError says why a named one, or any at all, cannot run. None is the backend 'cpu': no operation by itself, but
    part of the native program of a whole step.
    """
    candidates = [candidate for candidate in ORDER if name in ("auto", candidate.name)]
    if not candidates:
        known = ", ".join(candidate.name for candidate in ORDER)
        raise LaunchError(f"There is no attention backend {name!r}; there are auto, {known}.")
    refused: list[BackendReport] = []
    for candidate in candidates:
        report = candidate.look(needs)
        backend = None
        if report.is_usable:
            backend, report = _start(candidate, needs, report)
        if report.is_usable:
            _log(report, refused)
            return backend
        refused.append(report)
    last = refused[-1]
    raise LaunchError(f"The attention backend {last.name!r} cannot run here: {last.reason}.")


def _start(
    candidate: Candidate, needs: AttentionNeeds, report: BackendReport
) -> tuple[AttentionBackend | None, BackendReport]:
    """Makes the backend and runs its self-test; the report then says whether it passed."""
    if candidate.make is None:
        return None, report
    backend = candidate.make(needs)
    failure = self_test.failure(backend, needs) if candidate.has_self_test else None
    if failure is None:
        return backend, report
    log.warning("attention: %s is not used, though it is here: %s", candidate.name, failure)
    return None, BackendReport(candidate.name, False, failure)


def _log(report: BackendReport, refused: list[BackendReport]) -> None:
    others = "".join(f"; not {other.name}: {other.reason}" for other in refused)
    log.info("attention: %s (%s)%s", report.name, report.reason, others)
