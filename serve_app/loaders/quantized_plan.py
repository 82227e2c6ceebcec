"""What becomes of each tensor of a model."""

from collections.abc import Sequence

from kernels.formats import BY_NAME
from serve_app.errors import LaunchError, ModelFileError
from serve_app.loaders.quantized import Source, Step
from serve_app.quant.mix import ModelFacts, Recipe, is_expert
from serve_app.quant.quant_type import QuantType


def plan_steps(sources: Sequence[Source], recipe: Recipe, facts: ModelFacts, *, needs_gguf: bool) -> list[Step]:
    """What becomes of each tensor, before any importance.

    ModelFileError for a tensor that is no weight's, experts without a mixture, and a topology of a model with more
    layers; LaunchError for a tensor that stays in a type which the target cannot hold (needs_gguf: a GGUF).
    """
    if recipe.experts_only and not any(is_expert(source.gguf_name) for source in sources):
        raise ModelFileError("only experts are to be quantised (moqe), but this model has none")
    if recipe.topology is not None:
        recipe.topology.require_layers(facts.n_layers)
    steps = []
    for source in sources:
        old, stored = source.stored_form, source.parts[0]
        if not old.is_decodable:
            raise ModelFileError(f"{stored.file}: tensor {stored.name!r} has type {old.name}, no weight's")
        chosen = recipe.type_of(source.gguf_name, source.shape, facts, source.name)
        form = old if chosen is None else chosen[1].form
        # As llama.cpp wants its norms and routers; and what a shift has been added to has no type of its own.
        if chosen is None and (source.shift or (needs_gguf and _is_float32(source))):
            form = BY_NAME["F32"]
        if needs_gguf and not QuantType(form.name).is_gguf:
            raise LaunchError(f"Tensor {source.name!r} stays as it is. " + _no_gguf(QuantType(form.name)))
        steps.append(Step(source, form, None if chosen is None else chosen[0]))
    return steps


def _is_float32(source: Source) -> bool:
    return len(source.shape) == 1 or ".ffn_gate_inp." in source.gguf_name


def require_gguf_types(recipe: Recipe) -> None:
    """LaunchError with the reason where a GGUF cannot hold a type."""
    for wanted in recipe.types:
        if not wanted.is_gguf:
            raise LaunchError(_no_gguf(wanted))


def _no_gguf(kind: QuantType) -> str:
    known = "knows it for activations only" if kind.startswith("Q8") else "has no such type"
    return f"{kind} cannot be written as .gguf: ggml {known}. Give -o a folder, for SafeTensors that Sirocco loads."
