"""Importance matrices computed here, against those that llama-imatrix made of the same models and text."""

from pathlib import Path

import numpy as np
import pytest

import serve_app
from serve_app.engine import calibration
from serve_app.engine.calibration import Calibration, calibrate, measure_inputs
from serve_app.errors import LaunchError
from serve_app.gguf_file import open_gguf
from serve_app.loaders.model_files import ModelFiles, resolve
from serve_app.options import ModelSource
from serve_app.quant.imatrix import read_imatrix

DATA = Path(__file__).parents[1] / "data"
GOLDEN = DATA / "imatrix"
STORIES = DATA / "models" / "stories3M"
MODELS = {"stories3M": STORIES / "stories3M-F32.gguf", "mixture": GOLDEN / "mixture-model.gguf"}
TEXT = (Path(serve_app.__file__).parent / "assets" / "stories.txt").read_text(encoding="utf-8")
CHUNKS = 4


def files(path: Path) -> ModelFiles:
    return resolve(ModelSource(model=str(path)))


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest) -> tuple[str, Calibration]:
    return request.param, measure_inputs(files(MODELS[request.param]), TEXT, max_chunks=CHUNKS)


def test_means_are_those_of_llama_imatrix(case: tuple[str, Calibration]) -> None:
    name, ours = case
    theirs = read_imatrix(GOLDEN / f"{name}-imatrix.gguf")
    # It counts routers too, which nothing quantises, and no head that is the embedding.
    expected = {key for key in theirs if "ffn_gate_inp" not in key}
    assert expected <= set(ours.importance)
    assert set(ours.importance) - expected == ({"token_embd.weight"} if name == "stories3M" else set())
    for key in expected:
        np.testing.assert_allclose(ours.importance[key], theirs[key], rtol=1e-4, err_msg=key)
    assert (ours.num_chunks, ours.chunk_tokens) == (CHUNKS, 512)


def test_counts_are_those_of_llama_imatrix(case: tuple[str, Calibration]) -> None:
    name, ours = case
    with open_gguf(GOLDEN / f"{name}-imatrix.gguf") as file:
        for key, counts in ours.counts.items():
            if f"{key}.counts" in file.tensors:
                assert file.data(f"{key}.counts").view("<f4").tolist() == counts.tolist(), key
    tokens = CHUNKS * 512
    assert ours.counts["blk.0.attn_q.weight"].tolist() == [tokens]
    if name == "mixture":
        assert ours.counts["blk.1.ffn_down_exps.weight"].sum() == 2 * tokens
        assert ours.importance["output.weight"].shape == (32,)


def test_a_folder_has_the_same_names_and_values(case: tuple[str, Calibration]) -> None:
    name, of_gguf = case
    if name == "stories3M":
        of_folder = measure_inputs(files(STORIES / "hf"), TEXT, max_chunks=CHUNKS)
        assert set(of_folder.importance) == set(of_gguf.importance)
        for key, values in of_folder.importance.items():
            np.testing.assert_allclose(values, of_gguf.importance[key], rtol=1e-4, err_msg=key)


def test_an_expert_that_no_token_reaches_counts_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    sums = calibration._Sums
    add = sums.add

    def without_the_third(self: object, matrix: object, expert: int, x: object) -> None:
        if expert != 2:
            add(self, matrix, expert, x)  # type: ignore[arg-type]

    monkeypatch.setattr(sums, "add", without_the_third)
    made = measure_inputs(files(MODELS["mixture"]), TEXT, chunk_tokens=64, max_chunks=1)
    assert made.counts["blk.0.ffn_up_exps.weight"][2] == 0
    assert (made.importance["blk.0.ffn_up_exps.weight"].reshape(5, 32)[2] == 1).all()


def test_progress_and_short_texts() -> None:
    seen = []
    model = files(MODELS["mixture"])
    measure_inputs(model, TEXT[:3000], progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]
    with pytest.raises(LaunchError, match="Calibration: the text is shorter than one chunk of 512 tokens"):
        calibrate(model, "Once upon a time")
