"""The names of quantisation types and of mixes of them, as files, users and tables write them. No torch."""

from enum import StrEnum

from kernels.formats import BlockFormat, block_format


class QuantType(StrEnum):
    """A block type that weights can be kept in. F32, F16 and BF16 are blocks of one weight."""

    F32 = "F32"
    F16 = "F16"
    BF16 = "BF16"
    Q4_0 = "Q4_0"
    Q4_1 = "Q4_1"
    Q5_0 = "Q5_0"
    Q5_1 = "Q5_1"
    Q8_0 = "Q8_0"
    Q8_1 = "Q8_1"
    Q2_K = "Q2_K"
    Q3_K = "Q3_K"
    Q4_K = "Q4_K"
    Q5_K = "Q5_K"
    Q6_K = "Q6_K"
    Q8_K = "Q8_K"
    IQ1_S = "IQ1_S"
    IQ1_M = "IQ1_M"
    IQ2_XXS = "IQ2_XXS"
    IQ2_XS = "IQ2_XS"
    IQ2_S = "IQ2_S"
    IQ3_XXS = "IQ3_XXS"
    IQ3_S = "IQ3_S"
    IQ4_NL = "IQ4_NL"
    IQ4_XS = "IQ4_XS"
    TQ1_0 = "TQ1_0"
    TQ2_0 = "TQ2_0"
    MXFP4 = "MXFP4"
    NVFP4 = "NVFP4"
    FP8 = "FP8"
    HQQ4 = "HQQ4"
    HQQ8 = "HQQ8"

    @property
    def form(self) -> BlockFormat:
        """Sizes and byte layout."""
        return block_format(self.value)

    @property
    def is_gguf(self) -> bool:
        """Whether GGUF files hold weights of it: ggml knows Q8_1 and Q8_K for activations only, the others not."""
        return self not in (QuantType.Q8_1, QuantType.Q8_K, QuantType.FP8, QuantType.HQQ4, QuantType.HQQ8)

    @classmethod
    def parse(cls, name: str | int) -> "QuantType":
        """From any usual spelling (q4k, Q4_K, q8-0, iq4_xs), or the best type of a width in bits (2, 3, 4, 5, 6, 8).

        ValueError for an unknown name.
        """
        key = _key(str(name).strip())
        if key in _BEST_OF_WIDTH:
            return cls(_BEST_OF_WIDTH[key])
        key = _ALIASES.get(key, key)
        for member in cls:
            if _key(member.value) == key:
                return member
        raise ValueError(f"unknown quantisation type {name!r}; known are {', '.join(cls)}")


_BEST_OF_WIDTH = {"2": "Q2_K", "3": "Q3_K", "4": "Q4_K", "5": "Q5_K", "6": "Q6_K", "8": "Q8_0"}
_ALIASES = {"F8E4M3": "FP8", "FP8E4M3": "FP8"}

_READ_ONLY = frozenset(t for t in QuantType if t.startswith(("IQ", "TQ", "NVFP")))

WRITABLE = tuple(t for t in QuantType if t not in _READ_ONLY)
"""The types that weights can be quantised to."""

MIXES = {
    "Q2_K": QuantType.Q2_K,
    "Q3_K_S": QuantType.Q3_K,
    "Q3_K_M": QuantType.Q3_K,
    "Q3_K_L": QuantType.Q3_K,
    "Q4_K_S": QuantType.Q4_K,
    "Q4_K_M": QuantType.Q4_K,
    "Q5_K_S": QuantType.Q5_K,
    "Q5_K_M": QuantType.Q5_K,
}
"""Mixes of types that people know (quant.mix says what gets which), and the type that most matrices get."""


def encodable(name: QuantType | str | int) -> QuantType:
    """The type of that name; ValueError for one that is unknown or that can be read only."""
    wanted = QuantType.parse(name)
    if wanted in _READ_ONLY:
        raise ValueError(f"{wanted} can be read but not written; quantise to one of {', '.join(WRITABLE)}")
    return wanted


def recipe_name(name: str, *, promotes: bool = True) -> tuple[str, QuantType, bool]:
    """The name of a mix (Q4_K_M, q4km) or of a type, the type that most matrices get, and whether it is a mix.

    Q2_K is both: the mix, if embedding and head are promoted. ValueError for an unknown name, or a mix that shall not
    promote.
    """
    key = _key(name.strip())
    for mix, base in MIXES.items():
        if key in (_key(mix), "2" if mix == "Q2_K" else ""):
            if promotes:
                return mix, base, True
            if mix != base:
                raise ValueError(f"{mix} is a mix of types: it cannot be pure")
    try:
        base = encodable(name)
    except ValueError as error:
        raise ValueError(f"{error}; or one of the mixes {', '.join(MIXES)}") from None
    return base.value, base, False


def _key(name: str) -> str:
    return name.upper().replace("_", "").replace("-", "")
