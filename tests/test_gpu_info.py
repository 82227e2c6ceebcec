from pathlib import Path

import pytest

from serve_app.gpu_info import num_gpus


@pytest.mark.parametrize(
    ("visible", "count"),
    [(None, 3), ("", 0), ("0", 1), ("2,0", 2), ("-1", 0), ("0,-1,1", 1), ("1,7,2", 1), ("GPU-8c1f, GPU-77aa", 2)],
)
def test_devices_that_are_there_and_visible(tmp_path: Path, visible: str | None, count: int) -> None:
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / "dev" / name).touch()
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert num_gpus(environment, tmp_path) == count


def test_no_device_folder(tmp_path: Path) -> None:
    assert num_gpus({}, tmp_path) == 0
