"""The options of speculative decoding; see cli_options. None where an option was not given."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

from typer import Option

from serve_app.config import SpeculationConfig
from serve_app.options import MAX_DRAFT_TOKENS, DraftSampling, DType, ModelKind, Speculate

DraftVocab = Literal["same", "text"]

_SPECULATION = SpeculationConfig()

_speculation_option = partial(Option, rich_help_panel="Speculative decoding")
_draft_option = partial(Option, rich_help_panel="Draft model")


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculativeOptions:
    """How tokens are proposed. Fields: config.SpeculationConfig's, and vocab for maps_text."""

    use: Annotated[
        Speculate | None,
        _speculation_option(
            "--speculation",
            help="Who proposes tokens: the draft model, n-grams of the text, an index of recent texts; auto: whichever "
            "pays. Left out: auto with a draft model, else off.",
        ),
    ] = None
    max_tokens: Annotated[
        int | None,
        _speculation_option(
            "--num-draft-tokens",
            "-n",
            help=f"Most tokens that are proposed for a request in a step, 1 to {MAX_DRAFT_TOKENS}; as many as pay. "
            f"Left out: {_SPECULATION.max_tokens}.",
        ),
    ] = None
    is_fixed: Annotated[
        bool,
        _speculation_option("--fixed-draft-tokens", metavar="", help="Always propose so many, whether it pays or not."),
    ] = _SPECULATION.is_fixed
    deadline_ms: Annotated[
        float | None,
        _speculation_option(
            "--draft-deadline-ms",
            help="Longest wait of a step for the draft model, in milliseconds; then it decodes plainly. "
            f"Left out: {_SPECULATION.deadline_ms:g}.",
        ),
    ] = None
    vocab: Annotated[
        DraftVocab | None,
        _speculation_option(
            "--draft-vocab",
            help="same: both models have one vocabulary, or are refused; text: proposals go through text. "
            "Left out: same.",
        ),
    ] = None
    draft_sampling: Annotated[
        DraftSampling | None,
        _speculation_option(
            "--draft-sampling",
            help="greedy: the draft model proposes its likeliest tokens, and the text is the one without it; sampled: "
            "for requests without a seed it samples them, more are accepted, and the text has the same distribution. "
            "Left out: greedy.",
        ),
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftOptions:
    """Which draft model. Fields: config.ModelConfig's after draft_, and isq for the type in its part of that name.

    How the hub is asked, and where results of in-situ quantization are kept, is told once for both models.
    """

    draft_model: Annotated[
        str | None,
        _draft_option(
            "--draft-model-id",
            "-d",
            help="Hub id, folder or file of a smaller model that proposes tokens. Left out: none.",
            metavar="REPO_OR_PATH",
        ),
    ] = None
    draft_kind: Annotated[
        ModelKind | None, _draft_option("--draft-kind", help="Left out: auto, found out from its files.")
    ] = None
    draft_files: Annotated[
        list[str] | None,
        _draft_option("--draft-file", help="As -f, for the draft model.", metavar="FILE"),
    ] = None
    draft_isq: Annotated[
        str | None,
        _draft_option("--draft-isq", help="As --isq, for the draft model.", metavar="TYPE"),
    ] = None
    draft_arch: Annotated[
        str | None, _draft_option("--draft-arch", help="As --arch, for the draft model.", metavar="NAME")
    ] = None
    draft_gqa: Annotated[int | None, _draft_option("--draft-gqa", help="As --gqa, for the draft model.")] = None
    draft_tokenizer: Annotated[
        str | None,
        _draft_option("--draft-tokenizer", help="As --tokenizer, for the draft model.", metavar="REPO_OR_PATH"),
    ] = None
    draft_dtype: Annotated[DType | None, _draft_option("--draft-dtype", help="As --dtype, for the draft model.")] = None
    draft_revision: Annotated[
        str | None, _draft_option("--draft-revision", help="As --revision, for the draft model.", metavar="NAME")
    ] = None
