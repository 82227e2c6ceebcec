"""The type that a tensor gets where rows are no whole number of the wanted type's blocks."""

from serve_app.quant.quant_type import QuantType

_NEXT = {
    QuantType.Q2_K: QuantType.Q4_0,
    QuantType.Q3_K: QuantType.Q4_0,
    QuantType.Q4_K: QuantType.Q5_0,
    QuantType.Q5_K: QuantType.Q5_1,
    QuantType.Q6_K: QuantType.Q8_0,
    QuantType.Q8_K: QuantType.Q8_1,
    QuantType.FP8: QuantType.Q8_0,
    QuantType.HQQ4: QuantType.Q4_1,
    QuantType.HQQ8: QuantType.Q8_0,
}


def fitting_type(wanted: QuantType, columns: int) -> QuantType:
    """wanted itself, or the nearest type whose blocks divide a row of `columns` weights; F16 as the last resort."""
    if columns % wanted.form.block_length == 0:
        return wanted
    following = _NEXT.get(wanted)
    if following is not None and columns % following.form.block_length == 0:
        return following
    return QuantType.F16
