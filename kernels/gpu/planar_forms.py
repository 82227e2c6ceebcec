"""How each quantised type is kept on a GPU: which bits of a weight lie in which plane, and what scales them.

A weight's code is split in its low bits (2, 4 or 8) and its high bits (none, 1 or 2). weight = scale * (code - offset)
- minimum, or (code - zero) * scale for HQQ. The scale is a float16 of the block, for K-quants times an integer of a
sub-block; HQQ's scale and zero are float32. docs/kernels.md draws the planes. Imports neither torch nor triton.
"""

from dataclasses import dataclass
from typing import Final

from kernels.formats import BY_NAME, SUPER_BLOCK

NO_SUB, SIGNED_BYTE, NIBBLES, BYTE_PAIR = range(4)
"""What the plane of sub-block scales has: nothing; int8 scales; scale and minimum in a byte; a byte for each."""

NO_SECOND, MINIMUM, SUB_MINIMUM, ZERO = range(4)
"""What follows the block's scale: nothing; a minimum to add; one to subtract, times the sub-block's; HQQ's zero."""

VECTOR_WORDS: Final = 4
"""32-bit words that a thread loads at once: 128 bits."""

_WORD_BYTES: Final = 4


@dataclass(frozen=True, slots=True)
class Field:
    """A field of a file's block: its name, bits a weight, and for how many bytes weights have the same bits of them."""

    name: str
    bits: int
    group: int


@dataclass(frozen=True, slots=True)
class PlanarForm:
    """One type. low, high: fields of the file's block that have the code's bits; scales: those that have its scales.

    run: weights that share the innermost scale; block: weights that share the outermost; offset: what is taken from a
    code; is_signed: codes are int8.
    """

    name: str
    low_bits: int
    high_bits: int
    run: int
    block: int
    sub: int
    second: int
    offset: int
    low: Field
    high: Field | None
    scales: tuple[str, ...]
    is_signed: bool = False

    @property
    def vector(self) -> int:
        """Weights whose low bits fill 128 bits: the smallest piece of a row that kernels read."""
        return VECTOR_WORDS * 32 // self.low_bits

    @property
    def fields(self) -> int:
        """Weights in a 32-bit word of the low plane."""
        return 32 // self.low_bits

    @property
    def high_bytes(self) -> int:
        """Bytes of the high plane for a word of the low one."""
        return self.fields * self.high_bits // 8

    def low_bit(self, field: int) -> int:
        """Where a field's low bits begin in its word."""
        return self.low_bits * field

    def high_bit(self, field: int) -> int:
        """Where a field's high bits begin in its word of the high plane.

        Not one after the other, but as far apart as the low bits are: then one shift of the whole word brings the high
        bits of several fields to their place above the low ones.
        """
        fields_a_set = self.fields * self.high_bits // self.low_bits
        return self.low_bits * (field % fields_a_set) + self.high_bits * (field // fields_a_set)

    @property
    def sub_bytes(self) -> int:
        """Bytes of a sub-block's scales."""
        return {NO_SUB: 0, SIGNED_BYTE: 1, NIBBLES: 1, BYTE_PAIR: 2}[self.sub]

    @property
    def block_bytes(self) -> int:
        """Bytes of a block's scale and what follows it: float16 numbers, HQQ's float32."""
        return {NO_SECOND: 2, MINIMUM: 4, SUB_MINIMUM: 4, ZERO: 8}[self.second]

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row in all planes; ValueError for columns that are no whole number of blocks."""
        if columns % self.block:
            raise ValueError(f"{columns} weights are no whole number of {self.name} blocks of {self.block}")
        words = columns // self.fields
        return (
            words * (_WORD_BYTES + self.high_bytes)
            + columns // self.run * self.sub_bytes
            + columns // self.block * self.block_bytes
        )


def _simple(name: str, second: int, offset: int, high_bits: int = 0) -> PlanarForm:
    high = Field("qh", 1, 1) if high_bits else None
    scales = ("d",) if second == NO_SECOND else ("d", "m")
    return PlanarForm(name, 4, high_bits, 32, 32, NO_SUB, second, offset, Field("qs", 4, 16), high, scales)


def _super(
    name: str, run: int, sub: int, second: int, offset: int, low: Field, high: Field | None = None
) -> PlanarForm:
    high_bits = 0 if high is None else high.bits
    scales = ("d",) if second == NO_SECOND else ("d", "dmin")
    return PlanarForm(name, low.bits, high_bits, run, SUPER_BLOCK, sub, second, offset, low, high, scales)


def _hqq(bits: int) -> PlanarForm:
    qs = Field("qs", bits, 32 if bits == 4 else 64)
    return PlanarForm(f"HQQ{bits}", bits, 0, 64, 64, NO_SUB, ZERO, 0, qs, None, ("step", "zero"))


_FORMS = (
    _simple("Q4_0", NO_SECOND, 8),
    _simple("Q4_1", MINIMUM, 0),
    _simple("Q5_0", NO_SECOND, 16, high_bits=1),
    _simple("Q5_1", MINIMUM, 0, high_bits=1),
    PlanarForm("Q8_0", 8, 0, 32, 32, NO_SUB, NO_SECOND, 0, Field("qs", 8, 32), None, ("d",), is_signed=True),
    _super("Q2_K", 16, NIBBLES, SUB_MINIMUM, 0, Field("qs", 2, 32)),
    _super("Q3_K", 16, SIGNED_BYTE, NO_SECOND, 4, Field("qs", 2, 32), Field("hmask", 1, 32)),
    _super("Q4_K", 32, BYTE_PAIR, SUB_MINIMUM, 0, Field("qs", 4, 32)),
    _super("Q5_K", 32, BYTE_PAIR, SUB_MINIMUM, 0, Field("qs", 4, 32), Field("qh", 1, 32)),
    _super("Q6_K", 16, SIGNED_BYTE, NO_SECOND, 32, Field("ql", 4, 64), Field("qh", 2, 32)),
    _hqq(4),
    _hqq(8),
)

PLANAR: Final[dict[str, PlanarForm]] = {form.name: form for form in _FORMS}
"""Every type that has a planar form, by its name."""


def planar_form(type_name: str) -> PlanarForm | None:
    """The form into which a file's blocks of a type can be packed; None for plain numbers and for IQ, TQ, FP4 and FP8
    types."""
    form = PLANAR.get(type_name)
    assert form is None or form.block == BY_NAME[type_name].block_length
    return form
