"""`sirocco quantize`: a model's files in other types."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from serve_app.cli_quant_options import QuantizeOptions
from serve_app.commands.importance import check_options, find_importance
from serve_app.commands.progress import Bar
from serve_app.commands.recipes import recipes_of, type_names
from serve_app.config import AppConfig
from serve_app.errors import LaunchError

if TYPE_CHECKING:
    from serve_app.loaders.model_files import ModelFiles
    from serve_app.loaders.quantized import Step
    from serve_app.loaders.quantized_target import Target
    from serve_app.quant.mix import Recipe


def run(config: AppConfig, options: QuantizeOptions) -> int:
    """Writes a file, or a folder, for every type that was asked for."""
    from kernels import dispatch
    from serve_app.cpu_info import num_physical_cores
    from serve_app.loaders.model_files import resolve
    from serve_app.loaders.quantized import report_fallbacks
    from serve_app.loaders.quantized_importance import with_importance

    recipes = _recipes(options)
    paths = _paths(Path(options.output or "").expanduser(), [recipe.name for recipe in recipes])
    check_options(options.imatrix, options.calibration_file, options.save_imatrix)
    dispatch.set_num_threads(options.num_threads or num_physical_cores())
    files = resolve(config.model.to_source())
    kept = {path.resolve() for path in files.weight_files} | {files.folder.resolve()}
    if any(path.resolve() in kept for path in paths):
        raise LaunchError(f"The option --output names the model's own files: {options.output}")
    # All are planned before a text is read and the first is written: what is refused costs no time.
    target = _target(files, paths[0])
    plans = [target.plan(recipe) for recipe in recipes]
    importance = find_importance(files, options.imatrix, options.calibration_file, options.save_imatrix)
    if importance is not None:
        plans = [with_importance(steps, importance) for steps in plans]
    for recipe, path, steps in zip(recipes, paths, plans, strict=True):
        report_fallbacks(steps)
        try:
            _write(target, recipe, path, steps)
        except OSError as error:
            raise LaunchError(f"{path}: cannot be written ({error.strerror or error}).") from error
    return 0


def _recipes(options: QuantizeOptions) -> "list[Recipe]":
    """One for each type. LaunchError naming the option at fault."""
    from serve_app.quant.topology import read_topology

    topology = read_topology(Path(options.topology).expanduser()) if options.topology else None
    if options.isq_organization == "moqe" and not options.isq:
        raise LaunchError("--isq-organization moqe needs a type for the experts: give it with --isq.")
    names = type_names(options.isq)
    if not names and (options.isq or topology is None):
        raise LaunchError("The command quantize needs a type: give it with --isq, several separated by commas.")
    return recipes_of(names or [None], options.isq_organization, topology)


def _target(files: "ModelFiles", path: Path) -> "Target":
    from serve_app.commands.tokenizer_forms import OwnTokenizer
    from serve_app.loaders.quantized_folder import FolderTarget
    from serve_app.loaders.quantized_gguf import GgufTarget

    return (GgufTarget if path.suffix == ".gguf" else FolderTarget)(files, OwnTokenizer(files))


def _write(target: "Target", recipe: "Recipe", path: Path, steps: "Sequence[Step]") -> None:
    from serve_app.loaders.quantized import bits_per_weight

    started = time.monotonic()
    bar = Bar(Console(stderr=True))
    before = sum(step.source.num_bytes for step in steps)
    bar.start(recipe.name, before)
    try:
        size = target.write(path, recipe, steps, bar.advance)
    finally:
        bar.finish()
    print(
        f"{path}: {recipe.name}, {bits_per_weight(steps):.2f} bits a weight, {before / 2**20:.1f} → "
        f"{size / 2**20:.1f} MiB in {time.monotonic() - started:.1f} s"
    )


def _paths(output: Path, names: Sequence[str]) -> list[Path]:
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
