"""How kernels read planes: codes, scales and whole tiles of decoded weights, as device functions of every type.

FORM is a PlanarForm, known when a kernel is compiled. A tile is ROWS rows by VECS vectors, both powers of two; a vector
is four words of the row's low plane. Tensors over words are [ROWS, 4 * VECS]: a thread gets four neighbouring words,
128 bits, and everything that it needs for them, so that nothing is exchanged between threads.
"""

# Kernels know no starred tuples, and grow them in loops.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

import triton
import triton.language as tl

from kernels.gpu.rounding import narrow


@triton.jit
def load_words(low, high, rows, first, keep_rows, num_words, FORM: tl.constexpr, VECS: tl.constexpr):
    """Words [ROWS, 4 * VECS] int32 of the low plane from vector `first` on, and those of the high one (or the same).

    rows [ROWS] int64; keep_rows [ROWS] says which of them there are; what there is not is zero.
    """
    word = first * 4 + tl.arange(0, 4 * VECS)
    # Without the hint the narrower high plane would be read in pieces of more words, by other threads.
    at = tl.max_contiguous(rows[:, None] * num_words + word[None, :], (1, 4))
    keep = keep_rows[:, None] & (word < num_words)[None, :]
    words = tl.load(low + at, mask=keep, other=0)
    high_words = words
    if FORM.high_bits > 0:
        high_words = tl.load(high + at, mask=keep, other=0).to(tl.int32)
    return words, high_words


@triton.jit
def code(words, high_words, FIELD: tl.constexpr, FORM: tl.constexpr, OFFSET: tl.constexpr):
    """Codes in one field of the words, less OFFSET, as float32 and times 1 / factor(FIELD).

    Bits stay where they are in the word: a mask and a conversion give the code times a power of two, exactly, and the
    factor goes to what is multiplied with many codes. (Bytes are converted from where they are by the hardware.)
    """
    if FORM.is_signed:
        found = (words << (24 - 8 * FIELD)) >> 24
    elif FORM.low_bits == 8:
        found = (words >> (8 * FIELD)) & 255
    else:
        half: tl.constexpr = FORM.fields // 2
        at: tl.constexpr = FORM.low_bits * (FIELD % half)
        low_mask: tl.constexpr = ((1 << FORM.low_bits) - 1) << at
        if half <= FIELD:
            found = (words >> 16) & low_mask
        else:
            found = words & low_mask
        if FORM.high_bits > 0:
            high_mask: tl.constexpr = ((1 << FORM.high_bits) - 1) << (at + FORM.low_bits)
            a_set: tl.constexpr = FORM.fields * FORM.high_bits // FORM.low_bits
            is_at: tl.constexpr = FORM.low_bits * (FIELD % a_set) + FORM.high_bits * (FIELD // a_set)
            found = found | ((high_words << (at + FORM.low_bits - is_at)) & high_mask)
        found = found - (OFFSET << at)
    return found.to(tl.float32)


@triton.jit
def factor(FIELD: tl.constexpr, FORM: tl.constexpr):
    """What code's result is to be multiplied with: a power of two."""
    at: tl.constexpr = 0 if FORM.low_bits == 8 else FORM.low_bits * (FIELD % (FORM.fields // 2))
    found: tl.constexpr = 1.0 / (1 << at)
    return found


@triton.jit
def load_block_numbers(block, rows, first, keep_rows, num_vectors, FORM: tl.constexpr, VECS: tl.constexpr):
    """The blocks' scale and second number of each vector, [ROWS, VECS] float32."""
    vector = first + tl.arange(0, VECS)
    at = rows[:, None] * (num_vectors * FORM.vector // FORM.block) + (vector * FORM.vector // FORM.block)[None, :]
    keep = keep_rows[:, None] & (vector < num_vectors)[None, :]
    bits = tl.load(block + at, mask=keep, other=0)
    if FORM.second == 3:  # ZERO: two float32
        scale = bits.to(tl.int32).to(tl.float32, bitcast=True)
        second = (bits >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    else:
        scale = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        second = scale
        if FORM.second != 0:
            second = (bits >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return scale, second


@triton.jit
def run_numbers(
    sub, d, second, rows, first, keep_rows, num_vectors, RUN: tl.constexpr, FORM: tl.constexpr, VECS: tl.constexpr
):
    """Scale and minimum of run number RUN of each vector, [ROWS, VECS] float32: weight = scale * code - minimum.

    With an offset the minimum is that of a code of 0; HQQ's is its zero times the scale.
    """
    scale = d
    minimum = second
    if FORM.sub != 0:
        vector = first + tl.arange(0, VECS)
        at = rows[:, None] * (num_vectors * FORM.vector // FORM.run)
        at += ((vector * FORM.vector + RUN * FORM.run) // FORM.run)[None, :]
        keep = keep_rows[:, None] & (vector < num_vectors)[None, :]
        numbers = tl.load(sub + at, mask=keep, other=0).to(tl.int32)
        if FORM.sub == 1:  # SIGNED_BYTE, kept in an unsigned plane
            scale = d * ((numbers << 24) >> 24).to(tl.float32)
        elif FORM.sub == 2:  # NIBBLES
            scale = d * (numbers & 15).to(tl.float32)
            minimum = second * (numbers >> 4).to(tl.float32)
        else:  # BYTE_PAIR
            scale = d * (numbers & 255).to(tl.float32)
            minimum = second * ((numbers >> 8) & 255).to(tl.float32)
    if FORM.second == 0:
        minimum = scale * FORM.offset
    elif FORM.second == 1:
        minimum = -1.0 * second
    elif FORM.second == 3:
        minimum = second * scale
    return scale, minimum


@triton.jit
def per_word(numbers, ROWS: tl.constexpr, VECS: tl.constexpr):
    """[ROWS, VECS] → [ROWS, 4 * VECS]: each number for the four words of its vector."""
    return tl.reshape(tl.broadcast_to(numbers[:, :, None], [ROWS, VECS, 4]), [ROWS, 4 * VECS])


@triton.jit
def _interleaved4(a, b, c, d):
    """Four tensors [ROWS, WORDS] → [ROWS, 4 * WORDS], their elements in turn."""
    both = tl.join(tl.join(a, c), tl.join(b, d))
    return tl.reshape(both, [a.shape[0], a.shape[1] * 4])


@triton.jit
def _interleaved8(fields, FIRST: tl.constexpr, STEP: tl.constexpr):
    """Eight of a tuple's tensors in turn: FIRST, FIRST + STEP, …"""
    even = _interleaved4(fields[FIRST], fields[FIRST + 2 * STEP], fields[FIRST + 4 * STEP], fields[FIRST + 6 * STEP])
    odd = _interleaved4(
        fields[FIRST + STEP], fields[FIRST + 3 * STEP], fields[FIRST + 5 * STEP], fields[FIRST + 7 * STEP]
    )
    return tl.reshape(tl.join(even, odd), [even.shape[0], even.shape[1] * 2])


@triton.jit
def in_order(fields, ROWS: tl.constexpr, VECS: tl.constexpr, FORM: tl.constexpr):
    """A tuple of numbers over words [ROWS, 4 * VECS], one for each field → [ROWS, VECS * vector] by columns.

    Each thread's words make up neighbouring columns, so this only says how its registers are numbered.
    """
    if FORM.fields == 4:
        by_word = _interleaved4(fields[0], fields[1], fields[2], fields[3])
    elif FORM.fields == 8:
        by_word = _interleaved8(fields, 0, 1)
    else:
        even = _interleaved8(fields, 0, 2)
        odd = _interleaved8(fields, 1, 2)
        by_word = tl.reshape(tl.join(even, odd), [ROWS, 4 * VECS * 16])
    by_vector = tl.permute(tl.reshape(by_word, [ROWS, VECS, 4, FORM.fields]), (0, 1, 3, 2))
    return tl.reshape(by_vector, [ROWS, VECS * FORM.vector])


@triton.jit
def decoded(
    low, high, sub, block, rows, first, keep_rows, num_vectors,
    ROWS: tl.constexpr, VECS: tl.constexpr, FORM: tl.constexpr, DTYPE: tl.constexpr, IS_EXACT: tl.constexpr,
):  # fmt: skip
    """A tile of weights [ROWS, VECS * vector] from vector `first` on, computed in float32 and rounded to DTYPE.

    IS_EXACT: in the order of the reference, bit for bit and infinite scales included; else types with an offset and
    HQQ take an operation less, a multiplication and addition in one.
    """
    words, high_words = load_words(low, high, rows, first, keep_rows, num_vectors * 4, FORM, VECS)
    d, second = load_block_numbers(block, rows, first, keep_rows, num_vectors, FORM, VECS)
    fields = ()
    scale = d
    minimum = d
    zero = per_word(second, ROWS, VECS)
    FIELDS: tl.constexpr = FORM.fields
    for field in tl.static_range(FIELDS):
        if field * 4 % FORM.run == 0:
            s, m = run_numbers(sub, d, second, rows, first, keep_rows, num_vectors, field * 4 // FORM.run, FORM, VECS)
            scale = per_word(s, ROWS, VECS)
            minimum = per_word(m, ROWS, VECS)
        if FORM.second == 0 and IS_EXACT:
            weight = code(words, high_words, field, FORM, FORM.offset) * (scale * factor(field, FORM))
        elif FORM.second == 3 and IS_EXACT:
            weight = (code(words, high_words, field, FORM, 0) * factor(field, FORM) - zero) * scale
        else:
            weight = code(words, high_words, field, FORM, 0) * (scale * factor(field, FORM))
            if FORM.second != 0 or FORM.offset != 0:
                weight -= minimum
        fields = fields + (narrow(weight, DTYPE),)
    return in_order(fields, ROWS, VECS, FORM)
