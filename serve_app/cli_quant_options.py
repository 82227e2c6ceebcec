"""The options of the commands about quantisation; see cli_options."""

from dataclasses import dataclass
from typing import Annotated, Literal

from typer import Option

from serve_app.cli_isq_options import CALIBRATION_HELP, IMATRIX_HELP, ORGANIZATION_HELP, TOPOLOGY_HELP, IsqOrganization


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
        Option("--imatrix", metavar="FILE", help=IMATRIX_HELP),
    ] = None
    calibration_file: Annotated[
        str | None,
        Option("--calibration-file", metavar="TEXT", help=CALIBRATION_HELP),
    ] = None
    save_imatrix: Annotated[
        str | None,
        Option(
            "--save-imatrix",
            metavar="FILE",
            help="Keep the importance matrix of --calibration-file: a name that ends in .gguf or .dat.",
        ),
    ] = None
    topology: Annotated[
        str | None,
        Option("--topology", metavar="FILE", help=TOPOLOGY_HELP),
    ] = None
    isq_organization: Annotated[IsqOrganization, Option("--isq-organization", help=ORGANIZATION_HELP)] = "default"
    num_threads: Annotated[
        int, Option("--threads", min=0, max=1024, help="Threads that compute. 0: one for each physical core.")
    ] = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityOptions:
    """What `sirocco quality` measures, and how it reports."""

    isq: Annotated[
        str | None,
        Option("--isq", metavar="TYPE[,TYPE]", help="Types or mixes to measure. Left out: every type."),
    ] = None
    text: Annotated[
        str | None,
        Option("--text", metavar="FILE", help="Text to measure on. Left out: stories that come with Sirocco."),
    ] = None
    imatrix: Annotated[
        str | None,
        Option(
            "--imatrix",
            metavar="FILE",
            help="Importance matrix: types that have a use for one are measured with and without it.",
        ),
    ] = None
    calibration_file: Annotated[
        str | None,
        Option("--calibration-file", metavar="TEXT", help="The same, computed from a text."),
    ] = None
    isq_organization: Annotated[
        Literal["default", "pure"],
        Option("--isq-organization", help="default: embedding and head get a better type; pure: the same as all."),
    ] = "default"
    chunk_tokens: Annotated[
        int | None,
        Option(
            "--chunk-tokens",
            min=8,
            help="Texts are read in chunks of so many tokens; the second half of each is scored. Left out: 512, or the "
            "model's context where that is shorter.",
        ),
    ] = None
    chunks: Annotated[
        int | None, Option("--chunks", min=1, help="Chunks to read at most. Left out: the whole text.")
    ] = None
    json: Annotated[str | None, Option("--json", metavar="FILE", help="Write the figures to this file.")] = None
    plot: Annotated[
        str | None,
        Option("--plot", metavar="FILE", help="Draw bits per weight against KL divergence: .png, .svg or .pdf."),
    ] = None
