"""What a model's matrices take, counted from its files by another reader."""

from pathlib import Path

import gguf
import pytest

from serve_app.engine.weight_probe import WeightProbe
from serve_app.loaders.load import load_model
from serve_app.loaders.model_files import resolve
from serve_app.options import ModelSource

DATA = Path(__file__).parents[1] / "data"


@pytest.mark.parametrize(
    "path",
    [
        DATA / "models" / "stories3M" / "stories3M-F32.gguf",
        DATA / "models" / "stories3M" / "stories3M-Q4_K_M.gguf",
        DATA / "models" / "stories260K" / "stories260K-Q4_0.gguf",
        DATA / "imatrix" / "mixture-model.gguf",
    ],
    ids=lambda path: path.stem,
)
def test_every_matrix_is_counted_once(path: Path) -> None:
    model = load_model(resolve(ModelSource(model=str(path))), dtype="auto", device="cpu").model
    matrices = [t for t in gguf.GGUFReader(path).tensors if len(t.shape) >= 2]
    num_weights = sum(int(t.n_elements) for t in matrices)
    num_bytes = sum(int(t.n_bytes) for t in matrices)
    probe = WeightProbe.of(model)
    assert probe.num_weights == num_weights
    assert probe.bits_per_weight == pytest.approx(8 * num_bytes / num_weights)
    assert probe.nbytes == pytest.approx(num_bytes, rel=0.01)
