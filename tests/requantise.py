"""Makes GGUF files of other types out of one of plain numbers, where the gguf package or few lines can encode them."""

from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

BY_PACKAGE = ("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
"""Types that the gguf package encodes."""


def requantise(source: Path, target: Path, type_name: str) -> None:
    """Copies a GGUF of float32 tensors; matrices become type_name: one of BY_PACKAGE, Q3_K or Q5_K."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "llama")
    for field in reader.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture", "general.file_type")):
            kind = field.types[0]
            sub_kind = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, sub_kind)
    for tensor in reader.tensors:
        values = np.array(tensor.data, np.float32)
        if values.ndim == 1:
            writer.add_tensor(tensor.name, values)
        else:
            writer.add_tensor(tensor.name, encode(values, type_name), raw_dtype=Type[type_name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def encode(values: NDArray[np.float32], type_name: str) -> NDArray[np.uint8]:
    """values [rows, columns] → the bytes of each row. Q3_K and Q5_K come out a little worse than ggml makes them."""
    if type_name in BY_PACKAGE:
        return gguf.quants.quantize(values, Type[type_name]).view(np.uint8)
    blocks = {"Q3_K": _q3_k, "Q5_K": _q5_k}[type_name](values.reshape(-1, 256))
    return blocks.reshape(len(values), -1)


def _q3_k(x: NDArray[np.float32]) -> NDArray[np.uint8]:
    """weight = d * scale * q, q in -4..3, scale in -32..31 for 16 weights."""
    groups = x.reshape(-1, 16, 16)
    scales = np.abs(groups).max(-1) / 4
    d = (scales.max(-1) / 31).astype(np.float16)
    levels = np.rint(_ratio(scales, d[:, None])).clip(0, 31).astype(np.int64)
    q = np.rint(_ratio(groups, (d[:, None] * levels)[..., None])).clip(-4, 3).astype(np.int64).reshape(-1, 256) + 4
    stored = levels + 32
    nibbles = (stored[:, :8] & 15) | (stored[:, 8:] & 15) << 4
    pairs = sum((stored[:, 4 * i : 4 * i + 4] >> 4) << 2 * i for i in range(4))
    return _joined(_bits(q >> 2, 1), _bits(q & 3, 2), nibbles, pairs, d)


def _q5_k(x: NDArray[np.float32]) -> NDArray[np.uint8]:
    """weight = d * scale * q - dmin * least, q in 0..31, scale and least in 0..63 for 32 weights."""
    groups = x.reshape(-1, 8, 32)
    least = np.maximum(-groups.min(-1), 0)
    spans = (groups.max(-1) + least) / 31
    d, dmin = ((v.max(-1) / 63).astype(np.float16) for v in (spans, least))
    scale, low = (
        np.rint(_ratio(v, unit[:, None])).clip(0, 63).astype(np.int64) for v, unit in [(spans, d), (least, dmin)]
    )
    shifted = groups + (dmin[:, None] * low)[..., None]
    q = np.rint(_ratio(shifted, (d[:, None] * scale)[..., None])).clip(0, 31).astype(np.int64).reshape(-1, 256)
    high = (scale[:, 4:] & 15) | (low[:, 4:] & 15) << 4
    scales = [scale[:, :4] | scale[:, 4:] >> 4 << 6, low[:, :4] | low[:, 4:] >> 4 << 6, high]
    return _joined(d, dmin, *scales, _bits(q >> 4, 1), _bits(q & 15, 4))


def _bits(q: NDArray[np.int64], width: int) -> NDArray[np.int64]:
    """[N, 256] → bytes: 8 / width weights that are 32 apart share one, the first in the lowest bits."""
    parts = q.reshape(len(q), -1, 8 // width, 32)
    return sum(parts[:, :, i] << width * i for i in range(8 // width)).reshape(len(q), -1)


def _ratio(x: NDArray[np.float32], unit: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.divide(x, unit, out=np.zeros_like(x), where=unit != 0)


def _joined(*parts: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Float16 scales and bytes, side by side."""
    raw = [p[:, None].view(np.uint8) if p.dtype == np.float16 else p.astype(np.uint8) for p in parts]
    return np.concatenate(raw, axis=1)
