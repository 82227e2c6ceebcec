from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from serve_app.errors import LaunchError, ModelFileError
from serve_app.loaders.saved_imatrix import check_imatrix_name, save_imatrix
from serve_app.quant.encode import ENCODERS, WEIGHTED, quantize
from serve_app.quant.imatrix import read_imatrix, write_imatrix

DATA = Path(__file__).parents[1] / "data"
GOLDEN = DATA / "imatrix"


def gguf_form(path: Path, sums: list[list[float]], counts: list[list[float]] | None, dtype: type = np.float32) -> Path:
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_tensor("blk.0.ffn_up.weight.in_sum2", np.array(sums, dtype))
    if counts is not None:
        writer.add_tensor("blk.0.ffn_up.weight.counts", np.array(counts, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_older_form_comes_back(tmp_path: Path) -> None:
    values = {"blk.0.attn_q.weight": np.arange(8, dtype=np.float32), "output.weight": np.ones(4, np.float32)}
    write_imatrix(tmp_path / "a.dat", values, evaluations=4)
    found = read_imatrix(tmp_path / "a.dat")
    assert list(found) == list(values)
    assert all(np.array_equal(found[name], values[name]) for name in values)


@pytest.mark.parametrize("name", ["stories3M", "mixture"])
def test_files_of_llama_imatrix(name: str) -> None:
    new, old = (read_imatrix(GOLDEN / f"{name}-imatrix.{form}") for form in ("gguf", "dat"))
    assert set(new) == set(old)
    for key, values in new.items():
        np.testing.assert_allclose(values, old[key], rtol=1e-6, err_msg=key)
    assert len(new) == {"stories3M": 28, "mixture": 17}[name]
    assert new["blk.0.ffn_up.weight" if name == "stories3M" else "blk.0.ffn_up_exps.weight"].size in (256, 5 * 32)
    tensors = {t.name: np.array(t.data) for t in gguf.GGUFReader(GOLDEN / f"{name}-imatrix.gguf").tensors}
    for key, values in new.items():
        counts = tensors[f"{key}.counts"].reshape(-1, 1)
        means = tensors[f"{key}.in_sum2"].reshape(len(counts), -1) / counts
        np.testing.assert_allclose(values, means.reshape(-1), rtol=1e-6, err_msg=key)


def test_the_gguf_form_holds_sums_and_counts(tmp_path: Path) -> None:
    path = gguf_form(tmp_path / "a.gguf", [[2, 4], [6, 9]], [[2], [0]])
    assert read_imatrix(path)["blk.0.ffn_up.weight"].tolist() == [1, 2, 1, 1]


@pytest.mark.parametrize("form", ["gguf", "dat"])
def test_a_saved_one_comes_back(form: str, tmp_path: Path) -> None:
    values = np.random.default_rng(0).random(6).astype(np.float32)
    importance = {"output.weight": values, "blk.0.ffn_up_exps.weight": np.concatenate([values, np.ones(6, np.float32)])}
    counts = {"output.weight": np.array([700]), "blk.0.ffn_up_exps.weight": np.array([90, 0])}
    path = tmp_path / f"a.{form}"
    save_imatrix(path, importance, counts, num_chunks=3, chunk_tokens=512, dataset="text.txt")
    found = read_imatrix(path)
    for name, expected in importance.items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-6)
    if form == "gguf":
        fields = gguf.GGUFReader(path).fields
        assert fields["general.type"].contents() == "imatrix"
        assert fields["imatrix.datasets"].contents() == ["text.txt"]
        assert (fields["imatrix.chunk_count"].contents(), fields["imatrix.chunk_size"].contents()) == (3, 512)
        theirs = gguf.GGUFReader(GOLDEN / "mixture-imatrix.gguf").fields
        assert {key: field.types for key, field in fields.items()} == {k: f.types for k, f in theirs.items()}


def test_names_of_saved_ones(tmp_path: Path) -> None:
    check_imatrix_name(tmp_path / "a.gguf")
    with pytest.raises(LaunchError, match=r"saved as \.gguf or \.dat, not as 'a\.bin'"):
        check_imatrix_name(tmp_path / "a.bin")
    with pytest.raises(LaunchError, match="no folder"):
        check_imatrix_name(tmp_path / "missing" / "a.dat")


@pytest.mark.parametrize("data", [b"", b"\x01\0\0\0", b"\xff\xff\xff\xff", b"\x01\0\0\0\x90\0\0\0abc"])
def test_other_files_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.dat").write_bytes(data)
    with pytest.raises(ModelFileError, match="is no importance matrix"):
        read_imatrix(tmp_path / "a.dat")


def test_a_matrix_without_entries_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.dat").write_bytes(bytes(64))
    with pytest.raises(ModelFileError, match="is an importance matrix without entries"):
        read_imatrix(tmp_path / "a.dat")
    (tmp_path / "b.dat").write_bytes(b"\x01\0\0\0\x01\0\0\0x" + bytes(20))
    with pytest.raises(ModelFileError, match="importance of 'x' has no values"):
        read_imatrix(tmp_path / "b.dat")


@pytest.mark.parametrize("form", ["gguf", "dat"])
def test_truncated_files_are_refused(form: str, tmp_path: Path) -> None:
    data = (GOLDEN / f"mixture-imatrix.{form}").read_bytes()
    # Behind the entries of a .dat stand the number of chunks and the text's name, which nothing depends on.
    last = len(data) - (4 + 4 + len("stories.txt") if form == "dat" else 64)
    for length in range(3, last, 61):
        path = tmp_path / f"a.{form}"
        path.write_bytes(data[:length])
        with pytest.raises(ModelFileError):
            read_imatrix(path)


def test_broken_gguf_forms_name_the_tensor(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    with pytest.raises(ModelFileError, match=r"tensor 'blk\.0\.ffn_up\.weight\.counts' is missing"):
        read_imatrix(gguf_form(path, [[1, 2]], None))
    with pytest.raises(ModelFileError, match=r"3 sums of .* do not fit 2 counts"):
        read_imatrix(gguf_form(path, [[1, 2, 3]], [[1], [1]]))
    with pytest.raises(ModelFileError, match=r"counts of .* are negative or not finite"):
        read_imatrix(gguf_form(path, [[1, 2]], [[-1]]))
    with pytest.raises(ModelFileError, match="are no float32"):
        read_imatrix(gguf_form(path, [[1, 2]], [[1]], np.float16))
    with pytest.raises(ModelFileError, match="negative or not finite"):
        read_imatrix(gguf_form(path, [[1, np.inf]], [[1]]))
    with pytest.raises(ModelFileError, match="holds no importance matrix"):
        read_imatrix(GOLDEN / "mixture-model.gguf")
    with pytest.raises(ModelFileError, match="cannot be read"):
        read_imatrix(tmp_path / "missing.dat")


def test_negative_values_are_refused(tmp_path: Path) -> None:
    write_imatrix(tmp_path / "a.dat", {"output.weight": np.array([1, -1], np.float32)})
    with pytest.raises(ModelFileError, match="negative or not finite"):
        read_imatrix(tmp_path / "a.dat")


@pytest.mark.parametrize("name", ENCODERS)
def test_which_types_an_importance_changes(name: str) -> None:
    rng = np.random.default_rng(1)
    x = torch.from_numpy(rng.standard_normal((16, 512)).astype(np.float32))
    importance = torch.from_numpy(rng.random(512).astype(np.float32) ** 4)
    is_changed = not torch.equal(torch.as_tensor(quantize(x, name)), torch.as_tensor(quantize(x, name, importance)))
    assert is_changed == (name in WEIGHTED)
