import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from serve_app.errors import ModelFileError
from serve_app.gguf_file import open_gguf

DATA = Path(__file__).parent / "data"
U32, U64, BOOL, STRING, ARRAY, F32 = 4, 10, 7, 8, 9, 6


def u32(n: int) -> bytes:
    return struct.pack("<I", n)


def u64(n: int) -> bytes:
    return struct.pack("<Q", n)


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return u64(len(raw)) + raw


def key(name: str, type_id: int, value: bytes) -> bytes:
    return string(name) + u32(type_id) + value


def tensor(name: str, dims: list[int], type_id: int = 0, offset: int = 0) -> bytes:
    return string(name) + u32(len(dims)) + b"".join(map(u64, dims)) + u32(type_id) + u64(offset)


def gguf_bytes(keys: list[bytes] = (), tensors: list[bytes] = (), data: bytes = b"", version: int = 3) -> bytes:
    head = b"GGUF" + u32(version) + u64(len(tensors)) + u64(len(keys)) + b"".join(keys) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32) + data


SMALL = gguf_bytes(
    keys=[
        key("general.architecture", STRING, string("llama")),
        key("flag", BOOL, b"\1"),
        key("count", U32, u32(7)),
        key("big", U64, u64(1 << 60)),
        key("ratio", F32, struct.pack("<f", 0.5)),
        key("tokens", ARRAY, u32(STRING) + u64(3) + string("a") + string("é") + string("")),
        key("scores", ARRAY, u32(F32) + u64(2) + struct.pack("<2f", 1, 2)),
        key("flags", ARRAY, u32(BOOL) + u64(2) + b"\2\0"),
    ],
    tensors=[tensor("a", [4, 2]), tensor("b", [32], 8, 32)],
    data=bytes(range(32)) + b"\7" * 34,
)


def write(tmp_path: Path, content: bytes, name: str = "m.gguf") -> Path:
    path = tmp_path / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("path", sorted(DATA.glob("models/*/*.gguf")), ids=lambda p: p.name)
def test_equals_the_gguf_package(path: Path) -> None:
    reader = gguf.GGUFReader(path)
    with open_gguf(path) as file:
        stated = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
        assert list(file.metadata) == list(stated)
        for name, value in stated.items():
            ours = file.metadata[name]
            assert (ours.tolist() if isinstance(ours, np.ndarray) else ours) == value, name
        assert list(file.tensors) == [t.name for t in reader.tensors]
        for t in reader.tensors:
            info = file.tensors[t.name]
            assert info.shape == tuple(reversed(t.shape.tolist()))
            assert (info.type_id, info.offset, info.n_bytes) == (t.tensor_type, t.data_offset, t.n_bytes)
            assert np.array_equal(file.data(t.name), t.data.view(np.uint8).reshape(-1))


@pytest.mark.parametrize("version", [2, 3])
def test_reads_every_kind_of_value(tmp_path: Path, version: int) -> None:
    content = SMALL[:4] + u32(version) + SMALL[8:]
    with open_gguf(write(tmp_path, content)) as file:
        assert file.version == version
        assert file.metadata["flag"] is True
        assert (file.metadata["count"], file.metadata["big"], file.metadata["ratio"]) == (7, 1 << 60, 0.5)
        assert file.metadata["tokens"] == ["a", "é", ""]
        assert file.metadata["scores"].tolist() == [1, 2]
        assert file.metadata["flags"].tolist() == [True, False]
        assert file.tensors["a"].shape == (2, 4)
        assert bytes(file.data("a")) == bytes(range(32))
        assert bytes(file.data("b")) == b"\7" * 34


def test_data_stays_valid_after_close(tmp_path: Path) -> None:
    file = open_gguf(write(tmp_path, SMALL))
    data = file.data("a")
    file.close()
    file.close()
    assert data[3] == 3
    assert not data.flags.writeable


def test_alignment_of_the_file_is_used(tmp_path: Path) -> None:
    head = gguf_bytes([key("general.alignment", U32, u32(8))], [tensor("a", [1]), tensor("b", [1], 0, 8)])
    size = 4 + 4 + 16 + len(key("general.alignment", U32, u32(8))) + 2 * len(tensor("a", [1]))
    content = head[:size] + b"\0" * (-size % 8) + bytes(8) + b"\1\2\3\4"
    with open_gguf(write(tmp_path, content)) as file:
        assert bytes(file.data("b")) == b"\1\2\3\4"


DEFECTS = {
    "empty": (b"", "0 bytes"),
    "wrong magic": (b"GGML" + SMALL[4:], "wrong magic"),
    "version 1": (SMALL[:4] + u32(1) + SMALL[8:], "version 1"),
    "version 99": (SMALL[:4] + u32(99) + SMALL[8:], "version 99"),
    "big-endian": (SMALL[:4] + struct.pack(">I", 3) + SMALL[8:], "big-endian"),
    "only magic": (b"GGUF", "truncated"),
    "absurd key count": (SMALL[:16] + u64(1 << 63) + SMALL[24:], "metadata keys"),
    "absurd tensor count": (SMALL[:8] + u64(1 << 40) + SMALL[16:], "tensors"),
    "absurd string": (gguf_bytes([string("k") + u32(STRING) + u64(1 << 62)]), "truncated, it ends inside key 'k'"),
    "absurd array": (gguf_bytes([key("k", ARRAY, u32(U64) + u64(1 << 61))]), "key 'k' counts"),
    "absurd strings": (gguf_bytes([key("k", ARRAY, u32(STRING) + u64(1 << 50))]), "key 'k' counts"),
    "nested array": (gguf_bytes([key("k", ARRAY, u32(ARRAY) + u64(0))]), "unsupported type 9"),
    "unknown value type": (gguf_bytes([key("k", 77, bytes(8))]), "unknown value type 77"),
    "key twice": (gguf_bytes([key("k", BOOL, b"\0")] * 2), "key 'k' occurs twice"),
    "bad UTF-8 value": (gguf_bytes([key("k", STRING, string(b"\xff"))]), "key 'k' is not UTF-8"),
    "bad UTF-8 key": (gguf_bytes([string(b"\xff") + u32(BOOL) + b"\0"]), "key 0 is not UTF-8"),
    "bad UTF-8 in array": (gguf_bytes([key("k", ARRAY, u32(STRING) + u64(1) + string(b"\xff"))]), "key 'k' holds"),
    "long key": (gguf_bytes([key("k" * 70000, BOOL, b"\0")]), "at most 65535"),
    "alignment 0": (gguf_bytes([key("general.alignment", U32, u32(0))]), "general.alignment"),
    "alignment 33": (gguf_bytes([key("general.alignment", U32, u32(33))]), "general.alignment"),
    "alignment text": (gguf_bytes([key("general.alignment", STRING, string("8"))]), "general.alignment"),
    "five dimensions": (gguf_bytes(tensors=[tensor("t", [1] * 5)], data=bytes(4)), "tensor 't' has 5 dimensions"),
    "no rows": (gguf_bytes(tensors=[tensor("t", [4, 0])]), "tensor 't' has the impossible dimensions"),
    "half a block": (gguf_bytes(tensors=[tensor("t", [33], 8)], data=bytes(99)), "tensor 't' has the impossible dim"),
    "unknown type": (gguf_bytes(tensors=[tensor("t", [32], 4)], data=bytes(99)), "tensor 't' has the unknown type 4"),
    "absurd dimensions": (gguf_bytes(tensors=[tensor("t", [1 << 63] * 4)]), "tensor 't' with dimensions"),
    "out of file": (gguf_bytes(tensors=[tensor("t", [8])], data=bytes(31)), "tensor 't' ends at byte"),
    "far out of file": (gguf_bytes(tensors=[tensor("t", [8], 0, 1 << 62)], data=bytes(32)), "tensor 't' ends at byte"),
    "not aligned": (gguf_bytes(tensors=[tensor("t", [1], 0, 4)], data=bytes(32)), "tensor 't' begins at 4"),
    "overlap": (gguf_bytes(tensors=[tensor("t", [16]), tensor("u", [8], 0, 32)], data=bytes(99)), "overlaps"),
    "tensor twice": (gguf_bytes(tensors=[tensor("t", [8])] * 2, data=bytes(99)), "tensor 't' occurs twice"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_refuses(tmp_path: Path, defect: str) -> None:
    content, sentence = DEFECTS[defect]
    path = write(tmp_path, content)
    with pytest.raises(ModelFileError) as caught:
        open_gguf(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_refuses_what_is_no_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none.gguf", tmp_path, tmp_path / "a\0b"):
        with pytest.raises(ModelFileError):
            open_gguf(path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    for size in range(len(SMALL)):
        with pytest.raises(ModelFileError):
            open_gguf(write(tmp_path, SMALL[:size]))


def shard(no: int, count: int, tensors: list[bytes], total: int = 2) -> bytes:
    numbers = [("split.no", no), ("split.count", count), ("split.tensors.count", total)]
    keys = [key(k, U32, u32(v)) for k, v in numbers]
    return gguf_bytes([key("name", STRING, string(f"shard {no}")), *keys], tensors, bytes([no]) * 32)


def write_split(tmp_path: Path, contents: list[bytes]) -> list[Path]:
    count = len(contents)
    return [write(tmp_path, c, f"m-{i + 1:05}-of-{count:05}.gguf") for i, c in enumerate(contents)]


@pytest.mark.parametrize("given", [[0], [1], [0, 1], [1, 0]])
def test_reads_split_files(tmp_path: Path, given: list[int]) -> None:
    paths = write_split(tmp_path, [shard(0, 2, [tensor("a", [8])]), shard(1, 2, [tensor("b", [8])])])
    with open_gguf([paths[i] for i in given]) as file:
        assert file.paths == tuple(paths)
        assert file.metadata["name"] == "shard 0"
        assert [file.tensors[n].shard for n in "ab"] == [0, 1]
        assert bytes(file.data("a")) == bytes(32)
        assert bytes(file.data("b")) == b"\1" * 32


def test_reads_what_the_gguf_package_splits(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "s.gguf", "llama", split_max_tensors=2)
    arrays = {f"t{i}": np.full((3, 4), i, np.float32) for i in range(5)}
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_gguf(tmp_path / "s-00001-of-00003.gguf") as file:
        assert len(file.paths) == 3
        for name, array in arrays.items():
            assert file.tensors[name].shape == (3, 4)
            assert np.array_equal(file.data(name).view(np.float32), array.reshape(-1))


@pytest.mark.parametrize(
    ("contents", "sentence"),
    [
        ([shard(0, 2, [tensor("a", [8])]), shard(0, 2, [tensor("b", [8])])], "split.no"),
        ([shard(0, 2, [tensor("a", [8])]), shard(1, 2, [tensor("a", [8])])], "another shard"),
        ([shard(0, 2, [tensor("a", [8])]), shard(1, 3, [tensor("b", [8])])], "split.count"),
        ([shard(0, 2, [tensor("a", [8])], 9), shard(1, 2, [tensor("b", [8])], 9)], "split.tensors.count is 9"),
    ],
)
def test_refuses_shards_that_do_not_fit(tmp_path: Path, contents: list[bytes], sentence: str) -> None:
    with pytest.raises(ModelFileError, match=sentence):
        open_gguf(write_split(tmp_path, contents)[0])


def test_names_the_missing_shard(tmp_path: Path) -> None:
    first, second = write_split(tmp_path, [shard(0, 2, [tensor("a", [8])]), b""])
    second.unlink()
    with pytest.raises(ModelFileError, match=r"m-00002-of-00002\.gguf"):
        open_gguf(first)
    with pytest.raises(ModelFileError, match="does not end in -NNNNN-of-00002"):
        open_gguf(first.rename(tmp_path / "other.gguf"))


NUMBERS = st.sampled_from(
    [0, 1, 2, 8, 9, 255, 1 << 16, (1 << 31) - 1, 1 << 32, 1 << 40, 1 << 62, 1 << 63, (1 << 64) - 1]
)
MUTATION = st.tuples(st.integers(0, len(SMALL) - 1), st.one_of(st.binary(min_size=1, max_size=3), NUMBERS.map(u64)))


@settings(max_examples=400)
@given(mutations=st.lists(MUTATION, min_size=1, max_size=4), size=st.integers(0, len(SMALL)), cut=st.booleans())
@example(mutations=[(16, u64(1 << 63))], size=0, cut=False)
def test_a_mutated_file_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, mutations: list[tuple[int, bytes]], size: int, cut: bool
) -> None:
    content = bytearray(SMALL)
    for at, new in mutations:
        content[at : at + len(new)] = new
    path = tmp_path_factory.getbasetemp() / "mutated.gguf"
    path.write_bytes(content[:size] if cut else content)
    refusal = f"{path}: "
    tracemalloc.start()
    try:
        with open_gguf(path) as file:
            for name, info in file.tensors.items():
                assert file.data(name).nbytes == info.n_bytes <= len(content)
    except ModelFileError as error:
        refusal = str(error)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert refusal.startswith(f"{path}: ")
    assert len(refusal) < 2000
    assert peak < 64 * len(content) + 65536
