"""Dequantisation is bit-exact against the `gguf` package, the oracle, for every type that it decodes."""

from collections.abc import Iterator

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES

from kernels.formats import BY_NAME, GGML_BY_ID, block_format
from kernels.reference import quant

OURS = {"Q8_1", "Q8_K", "FP8", "HQQ4", "HQQ8"}
DECODABLE = sorted(name for name, form in BY_NAME.items() if form.is_decodable and name not in OURS)
PLAIN_DTYPES = {"F32": np.float32, "F16": np.float16}


def oracle(name: str, rows: np.ndarray) -> np.ndarray:
    """What the gguf package makes of the rows."""
    with np.errstate(all="ignore"):
        return np.asarray(gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[name]))


def assert_same_bits(actual: np.ndarray, expected: np.ndarray) -> None:
    """Equal bit for bit; a NaN equals any NaN, since processors choose its payload."""
    assert actual.dtype == expected.dtype == np.float32
    assert actual.shape == expected.shape
    is_nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(actual), is_nan)
    np.testing.assert_array_equal(actual.view(np.uint32)[~is_nan], expected.view(np.uint32)[~is_nan])


def random_rows(name: str, rows: int, blocks: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, blocks * BY_NAME[name].block_bytes), dtype=np.uint8)


def scale_bytes(name: str) -> Iterator[int]:
    """Offsets of the high bytes of a block's float16 numbers."""
    form = BY_NAME[name]
    for field, size in form.fields:
        if field in ("d", "dmin", "m") and size == 2:
            yield form.offset(field) + 1


def test_sizes_are_those_of_the_gguf_package() -> None:
    sizes = {int(t): sizes for t, sizes in GGML_QUANT_SIZES.items()}
    assert sizes[BY_NAME["Q8_1"].type_id] == (32, 40)  # of before 2023: ggml's two scales are float16 now
    sizes[BY_NAME["Q8_1"].type_id] = (32, 36)
    assert sizes == {i: (form.block_length, form.block_bytes) for i, form in GGML_BY_ID.items()}
    assert {int(t): t.name for t in GGML_QUANT_SIZES} == {i: form.name for i, form in GGML_BY_ID.items()}


def test_all_types_of_the_oracle_are_decodable() -> None:
    of_oracle = {t.name for t in gguf.quants._type_traits} | set(PLAIN_DTYPES)
    assert set(DECODABLE) == of_oracle == set(quant._DECODERS) - OURS


@pytest.mark.parametrize("name", DECODABLE)
def test_random_bytes(name: str) -> None:
    rows = random_rows(name, rows=24, blocks=5, seed=1)
    assert_same_bits(quant.dequantize(name, torch.from_numpy(rows)).numpy(), oracle(name, rows))


@pytest.mark.parametrize("name", [n for n in DECODABLE if list(scale_bytes(n))])
def test_scales_of_usual_size(name: str) -> None:
    rows = random_rows(name, rows=64, blocks=4, seed=2)
    blocks = rows.reshape(-1, BY_NAME[name].block_bytes)
    for offset in scale_bytes(name):
        blocks[:, offset] = (blocks[:, offset] & 0x83) | 0x20  # exponents that neither overflow nor are subnormal
    expected = oracle(name, rows)
    assert np.isfinite(expected).all()
    assert_same_bits(quant.dequantize(name, torch.from_numpy(rows)).numpy(), expected)


@pytest.mark.nightly
@pytest.mark.parametrize("name", DECODABLE)
def test_many_random_bytes(name: str) -> None:
    for seed in range(20):
        rows = random_rows(name, rows=1024, blocks=4, seed=seed)
        assert_same_bits(quant.dequantize(name, torch.from_numpy(rows)).numpy(), oracle(name, rows))


@pytest.mark.parametrize("name", DECODABLE)
def test_every_byte_value_in_every_place(name: str) -> None:
    block_bytes = BY_NAME[name].block_bytes
    rows = np.random.default_rng(3).integers(0, 256, (256, block_bytes), dtype=np.uint8)
    rows = (np.arange(256)[:, None] + rows[:1]).astype(np.uint8)
    assert_same_bits(quant.dequantize(name, torch.from_numpy(rows)).numpy(), oracle(name, rows))


@pytest.mark.parametrize("name", ["Q4_0", "MXFP4", "Q6_K", "F16"])
def test_rows_at_an_odd_address(name: str) -> None:
    rows = random_rows(name, rows=3, blocks=2, seed=4)
    storage = torch.empty(rows.size + 1, dtype=torch.uint8)
    storage[1:] = torch.from_numpy(rows).flatten()
    assert_same_bits(quant.dequantize(name, storage[1:].view(rows.shape)).numpy(), oracle(name, rows))


def test_type_by_id_and_no_rows() -> None:
    assert quant.dequantize(8, torch.zeros(0, 68, dtype=torch.uint8)).shape == (0, 64)
    assert quant.dequantize(block_format("Q8_0"), torch.zeros(2, 34, dtype=torch.uint8)).tolist() == [[0.0] * 32] * 2


def test_refusals() -> None:
    with pytest.raises(KeyError):
        quant.dequantize("Q1_0", torch.zeros(1, 18, dtype=torch.uint8))
    with pytest.raises(KeyError):
        quant.dequantize(99, torch.zeros(1, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match="no whole number of Q4_0 blocks"):
        quant.dequantize("Q4_0", torch.zeros(1, 17, dtype=torch.uint8))
    with pytest.raises(ValueError, match="no whole number of Q4_K blocks"):
        block_format("Q4_K").row_bytes(255)
    with pytest.raises(KeyError):
        block_format("Q4_K").offset("qh")


def test_layout_facts() -> None:
    q5_k = block_format("Q5_K")
    assert [q5_k.offset(n) for n, _ in q5_k.fields] == [0, 2, 4, 16, 48]
    assert q5_k.bits_per_weight == 5.5
    assert q5_k.row_bytes(512) == 352
    assert q5_k.is_block
    assert not block_format("F32").is_block
