"""Byte layout of every GGML block type: the single source of sizes and offsets.

A tensor's row is a whole number of blocks; a block holds `block_length` weights in `block_bytes` bytes. Numbers are
little-endian. Imports no torch, so that file parsers without torch can read it. Source: ggml's file format (ggml.h,
ggml-common.h) as the `gguf` distribution 0.19 states it; but Q8_1 has had float16 scales for long, which the
distribution does not know.
"""

from dataclasses import dataclass
from typing import Final

SUPER_BLOCK: Final = 256
"""Weights in a block of the K, IQ and TQ types."""


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """One block type. fields: (name, bytes) in file order; together they fill the block.

    is_decodable: kernels.reference.quant turns it into float32. The others are known by size only: integers and types
    that no weight uses.
    """

    name: str
    type_id: int
    block_length: int
    block_bytes: int
    fields: tuple[tuple[str, int], ...]
    is_decodable: bool = True

    @property
    def is_block(self) -> bool:
        """True where weights come in blocks of more than one."""
        return self.block_length > 1

    @property
    def bits_per_weight(self) -> float:
        """Mean bits that one weight takes, scales included."""
        return 8.0 * self.block_bytes / self.block_length

    def row_bytes(self, row_length: int) -> int:
        """Bytes of a row of `row_length` weights; ValueError where that is no whole number of blocks."""
        if row_length % self.block_length:
            raise ValueError(f"{row_length} weights are no whole number of {self.name} blocks of {self.block_length}")
        return row_length // self.block_length * self.block_bytes

    def row_length(self, row_bytes: int) -> int:
        """Weights in a row of `row_bytes` bytes; ValueError where that is no whole number of blocks."""
        if row_bytes % self.block_bytes:
            raise ValueError(f"{row_bytes} bytes are no whole number of {self.name} blocks of {self.block_bytes} bytes")
        return row_bytes // self.block_bytes * self.block_length

    def offset(self, field: str) -> int:
        """Where a field begins in the block; KeyError for an unknown name."""
        start = 0
        for name, size in self.fields:
            if name == field:
                return start
            start += size
        raise KeyError(field)


def _format(name: str, type_id: int, length: int, *fields: tuple[str, int], is_decodable: bool = True) -> BlockFormat:
    return BlockFormat(name, type_id, length, sum(size for _, size in fields), fields, is_decodable)


# d: scale, m / dmin: minimum (float16 unless 4 bytes); qs: low bits of the weights, qh: high bits; scales: per
# sub-block; signs: one bit a weight.
_FORMATS = (
    _format("F32", 0, 1, ("value", 4)),
    _format("F16", 1, 1, ("value", 2)),
    _format("Q4_0", 2, 32, ("d", 2), ("qs", 16)),
    _format("Q4_1", 3, 32, ("d", 2), ("m", 2), ("qs", 16)),
    _format("Q5_0", 6, 32, ("d", 2), ("qh", 4), ("qs", 16)),
    _format("Q5_1", 7, 32, ("d", 2), ("m", 2), ("qh", 4), ("qs", 16)),
    _format("Q8_0", 8, 32, ("d", 2), ("qs", 32)),
    _format("Q8_1", 9, 32, ("d", 2), ("s", 2), ("qs", 32)),
    _format("Q2_K", 10, SUPER_BLOCK, ("scales", 16), ("qs", 64), ("d", 2), ("dmin", 2)),
    _format("Q3_K", 11, SUPER_BLOCK, ("hmask", 32), ("qs", 64), ("scales", 12), ("d", 2)),
    _format("Q4_K", 12, SUPER_BLOCK, ("d", 2), ("dmin", 2), ("scales", 12), ("qs", 128)),
    _format("Q5_K", 13, SUPER_BLOCK, ("d", 2), ("dmin", 2), ("scales", 12), ("qh", 32), ("qs", 128)),
    _format("Q6_K", 14, SUPER_BLOCK, ("ql", 128), ("qh", 64), ("scales", 16), ("d", 2)),
    _format("Q8_K", 15, SUPER_BLOCK, ("d", 4), ("qs", 256), ("bsums", 32)),
    _format("IQ2_XXS", 16, SUPER_BLOCK, ("d", 2), ("qs", 64)),
    _format("IQ2_XS", 17, SUPER_BLOCK, ("d", 2), ("qs", 64), ("scales", 8)),
    _format("IQ3_XXS", 18, SUPER_BLOCK, ("d", 2), ("qs", 64), ("scales", 32)),
    _format("IQ1_S", 19, SUPER_BLOCK, ("d", 2), ("qs", 32), ("qh", 16)),
    _format("IQ4_NL", 20, 32, ("d", 2), ("qs", 16)),
    _format("IQ3_S", 21, SUPER_BLOCK, ("d", 2), ("qs", 64), ("qh", 8), ("signs", 32), ("scales", 4)),
    _format("IQ2_S", 22, SUPER_BLOCK, ("d", 2), ("qs", 32), ("signs", 32), ("qh", 8), ("scales", 8)),
    _format("IQ4_XS", 23, SUPER_BLOCK, ("d", 2), ("scales_h", 2), ("scales_l", 4), ("qs", 128)),
    _format("I8", 24, 1, ("value", 1), is_decodable=False),
    _format("I16", 25, 1, ("value", 2), is_decodable=False),
    _format("I32", 26, 1, ("value", 4), is_decodable=False),
    _format("I64", 27, 1, ("value", 8), is_decodable=False),
    _format("F64", 28, 1, ("value", 8), is_decodable=False),
    _format("IQ1_M", 29, SUPER_BLOCK, ("qs", 32), ("qh", 16), ("scales", 8)),
    _format("BF16", 30, 1, ("value", 2)),
    _format("TQ1_0", 34, SUPER_BLOCK, ("qs", 48), ("qh", 4), ("d", 2)),
    _format("TQ2_0", 35, SUPER_BLOCK, ("qs", 64), ("d", 2)),
    _format("MXFP4", 39, 32, ("e", 1), ("qs", 16)),
    _format("NVFP4", 40, 64, ("d", 4), ("qs", 32)),
    _format("Q1_0", 41, 128, ("d", 2), ("qs", 16), is_decodable=False),
)

# Types of our own, in no GGUF file. FP8: E4M3 numbers and a float32 scale; HQQ: (q - zero) * step, both float32.
_OWN_FORMATS = (
    _format("FP8", 1000, 128, ("d", 4), ("qs", 128)),
    _format("HQQ4", 1001, 64, ("step", 4), ("zero", 4), ("qs", 32)),
    _format("HQQ8", 1002, 64, ("step", 4), ("zero", 4), ("qs", 64)),
)

GGML_BY_ID: Final[dict[int, BlockFormat]] = {f.type_id: f for f in _FORMATS}
BY_ID: Final[dict[int, BlockFormat]] = GGML_BY_ID | {f.type_id: f for f in _OWN_FORMATS}
BY_NAME: Final[dict[str, BlockFormat]] = {f.name: f for f in BY_ID.values()}


def block_format(type_name_or_id: str | int) -> BlockFormat:
    """The format of a type name ("Q4_K") or GGML type id; KeyError for an unknown one."""
    if isinstance(type_name_or_id, str):
        return BY_NAME[type_name_or_id]
    return BY_ID[type_name_or_id]
