"""`sirocco quantize`: a model's files in other types."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from serve_app.cli_quant_options import QuantizeOptions
from serve_app.commands.importance import check_options, find_importance
from serve_app.config import AppConfig
from serve_app.errors import LaunchError

if TYPE_CHECKING:
    from serve_app.loaders.model_files import ModelFiles
    from serve_app.loaders.quantized import Step
    from serve_app.quant.imatrix import Importance
    from serve_app.quant.mix import Recipe


def run(config: AppConfig, options: QuantizeOptions) -> int:
    """Writes a file, or a folder, for every type that was asked for."""
    from kernels import dispatch
    from serve_app.cpu_info import num_physical_cores
    from serve_app.loaders.model_files import resolve
    from serve_app.quant.mix import Recipe

    if options.isq_organization not in ("default", "pure"):
        raise LaunchError(f"The option --isq-organization is default or pure, not {options.isq_organization!r}.")
    promotes = options.isq_organization == "default"
    try:
        recipes = [Recipe.parse(name, promotes=promotes) for name in _names(options.isq)]
    except ValueError as error:
        raise LaunchError(f"The option --isq: {error}.") from None
    targets = _targets(Path(options.output or "").expanduser(), [recipe.name for recipe in recipes])
    check_options(options.imatrix, options.calibration_file, options.save_imatrix)
    dispatch.set_num_threads(options.num_threads or num_physical_cores())
    files = resolve(config.model.to_source())
    kept = {path.resolve() for path in files.weight_files} | {files.folder.resolve()}
    if any(target.resolve() in kept for target in targets):
        raise LaunchError(f"The option --output names the model's own files: {options.output}")
    for recipe, target in zip(recipes, targets, strict=True):
        if options.calibration_file:
            _plan(files, recipe, target, None)  # what is refused anyway needs no calibration
    importance = find_importance(
        files, options.imatrix, options.calibration_file, options.num_threads, options.save_imatrix
    )
    # All are planned before the first is written: what is refused costs no time.
    plans = [_plan(files, recipe, target, importance) for recipe, target in zip(recipes, targets, strict=True)]
    for recipe, target, steps in zip(recipes, targets, plans, strict=True):
        try:
            _write(files, recipe, target, steps)
        except OSError as error:
            raise LaunchError(f"{target}: cannot be written ({error.strerror or error}).") from error
    return 0


def _is_gguf(target: Path) -> bool:
    return target.suffix == ".gguf"


def _plan(files: "ModelFiles", recipe: "Recipe", target: Path, importance: "Importance | None") -> "list[Step]":
    from serve_app.loaders.quantized_folder import plan_folder
    from serve_app.loaders.quantized_gguf import plan_gguf

    if _is_gguf(target):
        return plan_gguf(files, recipe, importance, _Tokenizers())
    return plan_folder(files, recipe, importance)


def _write(files: "ModelFiles", recipe: "Recipe", target: Path, steps: "Sequence[Step]") -> None:
    from serve_app.loaders.quantized_folder import write_folder
    from serve_app.loaders.quantized_gguf import write_gguf

    started = time.monotonic()
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        TaskProgressColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(recipe.name, total=sum(step.source.num_bytes for step in steps))

        def progress(name: str, num_bytes: int) -> None:
            bar.update(task, advance=num_bytes, description=name)

        if _is_gguf(target):
            write_gguf(target, files, recipe, steps, progress, _Tokenizers())
        else:
            write_folder(target, files, steps, progress, _Tokenizers())
    size = target.stat().st_size if _is_gguf(target) else (target / "model.safetensors").stat().st_size
    print(f"{target}: {recipe.name}, {size / 2**20:.1f} MiB in {time.monotonic() - started:.1f} s")


class _Tokenizers:
    """See TokenizerForms."""

    def gguf_values(
        self, folder: Path, config: Mapping[str, Any], vocab_size: int, pre_tokenizer: str | None
    ) -> dict[str, Any]:
        from serve_app.text.gguf_tokenizer import tokenizer_values

        return tokenizer_values(folder, config, vocab_size, pre_tokenizer)

    def write_files(self, folder: Path, metadata: Mapping[str, Any]) -> tuple[int | None, tuple[int, ...]]:
        from serve_app.text.tokenizer_export import write_tokenizer

        return write_tokenizer(folder, metadata)


def _names(given: str | None) -> list[str]:
    names = [name.strip() for name in (given or "").split(",") if name.strip()]
    if not names:
        raise LaunchError("The command quantize needs a type: give it with --isq, several separated by commas.")
    return names


def _targets(output: Path, names: Sequence[str]) -> list[Path]:
    """One path for each type: the type's name is put into it where there are several."""
    if not output.name:
        raise LaunchError("The command quantize needs a place to write to: give it with --output.")
    if len(names) == 1:
        targets = [output]
    elif output.suffix == ".gguf":
        targets = [output.with_name(f"{output.stem}-{name}.gguf") for name in names]
    else:
        targets = [output.with_name(f"{output.name}-{name}") for name in names]
    if len(set(targets)) < len(targets):
        raise LaunchError("The option --isq names a type twice.")
    for target in targets:
        if not target.parent.is_dir():
            raise LaunchError(f"The option --output: there is no folder {target.parent}.")
    return targets
