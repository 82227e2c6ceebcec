"""The command line's options of quantisation: at load, and into files. As in cli_options, one field an option."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

from typer import Option

IsqOrganization = Literal["default", "pure", "moqe"]

_isq_option = partial(Option, rich_help_panel="In-situ quantization")

_ORGANIZATION_HELP = (
    "default: embedding and head get a better type; pure: the same as all; moqe: nothing but the experts of mixtures "
    "is quantised."
)
_IMATRIX_HELP = "Importance matrix of llama-imatrix, .dat or GGUF."
_CALIBRATION_HELP = "Text to compute an importance matrix from: the model reads it once, unquantised."


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
        _isq_option(
            "--isq-organization",
            help=_ORGANIZATION_HELP,
        ),
    ] = "default"
    imatrix: Annotated[
        str | None,
        _isq_option("--imatrix", help=_IMATRIX_HELP, metavar="FILE"),
    ] = None
    calibration_file: Annotated[
        str | None,
        _isq_option(
            "--calibration-file",
            help=_CALIBRATION_HELP,
            metavar="FILE",
        ),
    ] = None
    topology: Annotated[
        str | None,
        _isq_option(
            "--topology",
            help="YAML file with types for layers (0-8: {isq: Q6K}); --isq is for the others.",
            metavar="FILE",
        ),
    ] = None
    cache: Annotated[
        str | None,
        _isq_option("--isq-cache", help="Folder that keeps the results, for the next start to map.", metavar="FOLDER"),
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeOptions:
    """What `sirocco quantize` makes of a model, and where."""

    isq: Annotated[
        str | None,
        Option(
            "--isq",
            metavar="TYPE[,TYPE]",
            help="Type or mix (Q4K, Q8_0, Q4_K_M, HQQ4, 4 …); several, separated by commas, make a file each.",
        ),
    ] = None
    output: Annotated[
        str | None,
        Option("--output", "-o", metavar="PATH", help="A name that ends in .gguf, or a folder for SafeTensors."),
    ] = None
    imatrix: Annotated[
        str | None,
        Option("--imatrix", metavar="FILE", help=_IMATRIX_HELP),
    ] = None
    calibration_file: Annotated[
        str | None,
        Option(
            "--calibration-file",
            metavar="FILE",
            help=_CALIBRATION_HELP,
        ),
    ] = None
    topology: Annotated[
        str | None,
        Option("--topology", metavar="FILE", help="YAML file with types for layers; --isq is for the others."),
    ] = None
    isq_organization: Annotated[
        IsqOrganization,
        Option(
            "--isq-organization",
            help=_ORGANIZATION_HELP,
        ),
    ] = "default"
    num_threads: Annotated[
        int, Option("--threads", min=0, max=1024, help="Threads that compute. 0: one for each physical core.")
    ] = 0
