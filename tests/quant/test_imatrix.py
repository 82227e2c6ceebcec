from pathlib import Path

import gguf
import numpy as np
import pytest

from serve_app.errors import ModelFileError
from serve_app.quant.imatrix import read_imatrix, write_imatrix


def test_the_older_form_comes_back(tmp_path: Path) -> None:
    values = {"blk.0.attn_q.weight": np.arange(8, dtype=np.float32), "output.weight": np.ones(4, np.float32)}
    write_imatrix(tmp_path / "a.dat", values)
    found = read_imatrix(tmp_path / "a.dat")
    assert list(found) == list(values)
    assert all(np.array_equal(found[name], values[name]) for name in values)


def test_the_gguf_form_holds_sums_and_counts(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "imatrix")
    writer.add_tensor("blk.0.ffn_up.weight.in_sum2", np.array([[2, 4], [6, 9]], np.float32))
    writer.add_tensor("blk.0.ffn_up.weight.counts", np.array([[2], [0]], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert read_imatrix(tmp_path / "a.gguf")["blk.0.ffn_up.weight"].tolist() == [1, 2, 1, 1]


@pytest.mark.parametrize("data", [b"", b"\x01\0\0\0", b"\xff\xff\xff\xff", b"\x01\0\0\0\x90\0\0\0abc"])
def test_other_files_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.dat").write_bytes(data)
    with pytest.raises(ModelFileError, match="is no importance matrix"):
        read_imatrix(tmp_path / "a.dat")


def test_negative_values_are_refused(tmp_path: Path) -> None:
    write_imatrix(tmp_path / "a.dat", {"output.weight": np.array([1, -1], np.float32)})
    with pytest.raises(ModelFileError, match="negative or not finite"):
        read_imatrix(tmp_path / "a.dat")
