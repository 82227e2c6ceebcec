"""`sirocco quality`: what each type costs a model, beside the model as it is."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import TYPE_CHECKING

from rich.console import Console

import serve_app
from serve_app.cli_quant_options import QualityOptions
from serve_app.commands.importance import check_options, find_importance, read_text
from serve_app.commands.progress import steps_bar
from serve_app.commands.quality_plot import draw, require_plotting
from serve_app.commands.quality_report import Report, Row, print_report, write_report
from serve_app.commands.recipes import recipes_of, type_names
from serve_app.config import AppConfig
from serve_app.errors import LaunchError
from serve_app.options import EngineConfig, IsqOptions

if TYPE_CHECKING:
    from serve_app.engine.reference_logits import ReferenceLogits
    from serve_app.loaders.model_files import ModelFiles
    from serve_app.quant.mix import Recipe

DEFAULT_TEXT = Path(serve_app.__file__).parent / "assets" / "stories.txt"


def run(config: AppConfig, options: QualityOptions) -> int:
    """Measures every type that was asked for, prints a table, and writes the files that were asked for."""
    from kernels import dispatch
    from serve_app.cpu_info import num_physical_cores
    from serve_app.engine import quality
    from serve_app.engine.reference_logits import ReferenceLogits
    from serve_app.loaders.model_files import resolve

    check_options(options.imatrix, options.calibration_file)
    recipes = _recipes(options)
    _check_targets(options)
    text_file = Path(options.text).expanduser() if options.text else DEFAULT_TEXT
    text = read_text(text_file, "--text")
    files = resolve(config.model.to_source())
    length = options.chunk_tokens or min(quality.CHUNK_TOKENS, files.max_seq_len)
    if length > files.max_seq_len:
        raise LaunchError(f"The option --chunk-tokens: {length} are more than the model's {files.max_seq_len}.")
    engine = config.engine.to_config()
    dispatch.set_num_threads(engine.num_threads or num_physical_cores())
    with (
        _imatrix(files, options) as imatrix,
        quality.open_model(files, engine, length) as reference,
    ):
        chunks = quality.chunks_of(reference, text, length, options.chunks)
        engine = quality.with_cache_of(reference, engine)
        with TemporaryFile(prefix="sirocco-", dir=_spacious_folder()) as file:
            logits = ReferenceLogits(reference, chunks, file)
            rows = [*_rows(logits, files, engine, _variants(recipes, imatrix))]
        report = Report(
            files.model_name, text_file.name, length, rows[0].perplexity.num_tokens,
            quality.size_of(reference), rows[0].reference_perplexity, rows,
        )  # fmt: skip
    print_report(report)
    try:
        if options.json:
            write_report(Path(options.json).expanduser(), report)
        if options.plot:
            draw(Path(options.plot).expanduser(), report)
    except OSError as error:
        raise LaunchError(f"{error.filename}: cannot be written ({error.strerror}).") from error
    return 0


def _recipes(options: QualityOptions) -> "list[Recipe]":
    """What --isq names, each once; without it every type."""
    from serve_app.quant.encode import ENCODERS

    names = type_names(options.isq)
    if options.isq is not None and not names:
        raise LaunchError("The option --isq names no type.")
    found = recipes_of(names or [name for name in ENCODERS if name != "F32"], options.isq_organization)
    return list({recipe.name: recipe for recipe in found}.values())


def _check_targets(options: QualityOptions) -> None:
    """LaunchError for files that cannot be written, before the measuring begins."""
    for option, name in (("--json", options.json), ("--plot", options.plot)):
        if name and not Path(name).expanduser().parent.is_dir():
            raise LaunchError(f"The option {option}: there is no folder {Path(name).parent}.")
    if options.plot:
        require_plotting(Path(options.plot))


@contextmanager
def _imatrix(files: "ModelFiles", options: QualityOptions) -> Iterator[str | None]:
    """The file of the importance matrix, computed once for all types where a text was named."""
    if options.imatrix:
        yield str(Path(options.imatrix).expanduser())
        return
    with TemporaryDirectory(prefix="sirocco-") as folder:
        made = str(Path(folder) / "imatrix.gguf") if options.calibration_file else None
        find_importance(files, None, options.calibration_file, made, options.chunk_tokens)
        yield made


def _variants(recipes: "Sequence[Recipe]", imatrix: str | None) -> list[IsqOptions]:
    """Each type, and those that an importance matrix changes once more with it."""
    from serve_app.quant.encode import WEIGHTED

    wanted = []
    for recipe in recipes:
        wanted.append(IsqOptions(recipe.name, is_pure=not recipe.promotes))
        if imatrix is not None and recipe.base in WEIGHTED:
            wanted.append(IsqOptions(recipe.name, is_pure=not recipe.promotes, imatrix=imatrix))
    return wanted


def _spacious_folder() -> str | None:
    """Where large files may lie for a while: what the user says, else not /tmp, which is often memory."""
    has_own = any(os.environ.get(name) for name in ("TMPDIR", "TEMP", "TMP"))
    return None if has_own or not os.access("/var/tmp", os.W_OK) else "/var/tmp"


def _rows(
    reference: "ReferenceLogits",
    files: "ModelFiles",
    engine: EngineConfig,
    variants: Sequence[IsqOptions],
) -> Iterator[Row]:
    """One variant after the other, so that only one is in memory beside the reference."""
    from serve_app.engine.quality import compare, open_model, size_of

    with steps_bar(Console(stderr=True)) as bar:
        task = bar.add_task("", total=len(variants) * len(reference.chunks))
        for isq in variants:
            assert isq.type is not None
            bar.update(task, description=isq.type + (" with importance" if isq.imatrix else ""))
            with open_model(replace(files, isq=isq), engine, len(reference.chunks[0])) as variant:
                distance = compare(reference, variant, lambda: bar.advance(task))
                yield Row(isq.type, isq.imatrix is not None, size_of(variant), distance)
