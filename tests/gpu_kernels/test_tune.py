"""The tuner measures, keeps what is fastest and writes a table that the next start reads."""

from pathlib import Path

import pytest
import torch

from kernels.gpu import launch_shapes, tune
from kernels.gpu.launch_shapes import LaunchShape, read_table, rule
from kernels.gpu.planar_forms import PLANAR


def test_a_table_is_made_written_and_read(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = [LaunchShape("gemv", 1, 8, 4, 1, 1, 1), LaunchShape("tile", 16, 16, 4, 2, 4, 2)]
    monkeypatch.setattr(tune, "candidates", lambda *sizes: iter(shapes))
    said: list[str] = []
    found = tune.tune(["Q8_0", "Q4_K"], [(24, 64)], device, buckets=[1], say=said.append)
    assert list(found) == ["Q8_0 24x64"]
    assert LaunchShape.read(found["Q8_0 24x64"]["1"]) in shapes
    assert said[0].startswith("Q8_0 24x64 1: ")
    before = {"other": {"Q4_K 1x256": {"1": ["gemv", 1, 1, 8, 1, 1, 1]}}}
    path = tmp_path / "table.json"
    tune.write(tune.merged(before, "this", found), path)
    assert read_table(path) == before | {"this": found}
    again = tune.merged(read_table(path), "this", {"Q8_0 24x64": {"2": [1]}})
    assert set(again["this"]["Q8_0 24x64"]) == {"1", "2"}
    tune.write({}, path)
    assert read_table(path) == {}


def test_it_stops_in_time(device: torch.device) -> None:
    said: list[str] = []
    assert tune.tune(["Q8_0"], [(24, 64)], device, seconds=-1, say=said.append) == {}
    assert said == ["out of time before Q8_0, 1 tokens, 24x64"]


def test_a_shape_that_computes_something_else_is_no_candidate(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = [LaunchShape("gemv", 1, 8, 4, 1, 1, 1), LaunchShape("gemv", 1, 8, 4, 1, 1, 2)]
    monkeypatch.setattr(tune, "candidates", lambda *sizes: iter(shapes))
    monkeypatch.setattr(tune, "matmul", lambda matrix, x, shape: torch.full((1, matrix.rows), float(shape.stages)))
    with pytest.raises(RuntimeError, match="gives another product"):
        tune.tune(["Q8_0"], [(24, 64)], device, buckets=[1])


def test_candidates_fit_the_matrix_and_begin_with_the_rule() -> None:
    form = PLANAR["Q4_K"]
    for bucket in launch_shapes.BUCKETS:
        found = list(tune.candidates(form, 4096, 4096, bucket, 132))
        assert found[0] == rule(form, 4096, 4096, bucket, torch.bfloat16, 132)
        assert {shape.kernel for shape in found} == ({"gemv", "tile"} if bucket <= 8 else {"tile"})
        assert all(shape.tokens >= bucket and shape.vectors * shape.split <= 256 for shape in found)
    assert len(list(tune.candidates(form, 64, 256, 1, 132))) < 8


@pytest.mark.parametrize("name", PLANAR)
def test_the_rule_without_a_table(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU: gemv up to two rows, tiles above; enough programs; powers of two that the columns suffice for."""
    monkeypatch.setattr(launch_shapes, "IS_INTERPRETED", False)
    for rows, columns in ((4096, 4096), (128256, 4096), (1024, 256), (16, 14336)):
        for bucket in launch_shapes.BUCKETS:
            shape = rule(PLANAR[name], rows, columns, bucket, torch.bfloat16, 132)
            assert shape.kernel == ("gemv" if bucket <= 2 else "tile")
            assert shape.tokens >= bucket
            for number in (shape.rows, shape.vectors, shape.split, shape.tokens):
                assert number & (number - 1) == 0
            assert shape.vectors < 2 * columns // PLANAR[name].vector
    assert rule(PLANAR[name], 128256, 4096, 1, torch.bfloat16, 132) == LaunchShape("gemv", 1, 4, 32, 1, 1, 1)
    assert rule(PLANAR[name], 4096, 4096, 1, torch.bfloat16, 132) == LaunchShape("gemv", 1, 4, 64, 1, 2, 1)
    assert rule(PLANAR[name], 1024, 8192, 1, torch.bfloat16, 132) == LaunchShape("gemv", 1, 2, 128, 1, 4, 1)
    assert rule(PLANAR[name], 4096, 4096, 16, torch.bfloat16, 132).split == 4
    assert rule(PLANAR[name], 128256, 4096, 16, torch.bfloat16, 132).split == 1
