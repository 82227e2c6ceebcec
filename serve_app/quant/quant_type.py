"""The names of quantisation types, as files, users and tables write them."""

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
    Q2_K = "Q2_K"
    Q3_K = "Q3_K"
    Q4_K = "Q4_K"
    Q5_K = "Q5_K"
    Q6_K = "Q6_K"
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

    @property
    def form(self) -> BlockFormat:
        """Sizes and byte layout."""
        return block_format(self.value)

    @classmethod
    def parse(cls, name: str) -> "QuantType":
        """From any usual spelling (q4k, Q4_K, q8-0, iq4_xs); ValueError for an unknown name."""
        key = _key(name)
        for member in cls:
            if _key(member.value) == key:
                return member
        raise ValueError(f"unknown quantisation type {name!r}; known are {', '.join(cls)}")


def _key(name: str) -> str:
    return name.upper().replace("_", "").replace("-", "")
