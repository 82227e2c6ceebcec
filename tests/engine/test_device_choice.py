import pytest
import torch

from serve_app.engine.device_choice import choose_device
from serve_app.errors import LaunchError


def test_auto_takes_what_torch_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    for is_there, device in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda is_there=is_there: is_there)
        assert choose_device("auto") == device


def test_devices_that_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, reason in (("tpu9", "is none"), ("mps", "is not supported"), ("cuda", "CUDA")):
        with pytest.raises(LaunchError, match=rf"--device.*{name}.*{reason}"):
            choose_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda:1") == "cuda:1"
    with pytest.raises(LaunchError, match="there are 2 CUDA devices"):
        choose_device("cuda:2")
