"""The options of in-situ quantization; see cli_options."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

from typer import Option

IsqOrganization = Literal["default", "pure", "moqe"]

_isq_option = partial(Option, rich_help_panel="In-situ quantization")

ORGANIZATION_HELP = (
    "default: embedding and head get a better type; pure: the same as all; moqe: nothing but the experts of mixtures "
    "is quantised."
)
IMATRIX_HELP = "Importance matrix of llama-imatrix, .dat or GGUF."
TOPOLOGY_HELP = "YAML file with types for layers (0-8: {isq: Q6K}); --isq is for the others."
CALIBRATION_HELP = "Text to compute an importance matrix from: the model reads it once, unquantised."


@dataclass(frozen=True, slots=True, kw_only=True)
class InSituOptions:
    """What the weights become while they are loaded. Fields: config.IsqConfig's, and organization for two of them."""

    type: Annotated[
        str | None,
        _isq_option(
            "--isq",
            help="Type or mix of types that weights are quantised to while they are loaded: Q4K, Q8_0, Q4_K_M, HQQ4, "
            "or the bits of a weight (2, 3, 4, 5, 6, 8). Left out: they stay as the files have them.",
            metavar="TYPE",
        ),
    ] = None
    organization: Annotated[
        IsqOrganization,
        _isq_option("--isq-organization", help=ORGANIZATION_HELP),
    ] = "default"
    imatrix: Annotated[
        str | None,
        _isq_option("--imatrix", help=IMATRIX_HELP, metavar="FILE"),
    ] = None
    calibration_file: Annotated[
        str | None,
        _isq_option("--calibration-file", help=CALIBRATION_HELP, metavar="TEXT"),
    ] = None
    topology: Annotated[
        str | None,
        _isq_option(
            "--topology",
            help=TOPOLOGY_HELP,
            metavar="FILE",
        ),
    ] = None
    cache: Annotated[
        str | None,
        _isq_option("--isq-cache", help="Folder that keeps the results, for the next start to map.", metavar="FOLDER"),
    ] = None
