"""Architecture name → family: the one list of what is supported. Families are imported when they are asked for."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

from serve_app.errors import ModelFileError
from serve_app.models.base import CausalLM, ModelArgs, WeightSource
from serve_app.models.gguf_form import GgufForm

# Names are those of config.json's `architectures` and of GGUF's `general.architecture`.
_FAMILIES = {
    "LlamaForCausalLM": ("serve_app.models.llama", "LlamaArgs", "LlamaForCausalLM"),
    "llama": ("serve_app.models.llama", "LlamaArgs", "LlamaForCausalLM"),
    "MistralForCausalLM": ("serve_app.models.mistral", "MistralArgs", "MistralForCausalLM"),
    "Qwen2ForCausalLM": ("serve_app.models.qwen2", "Qwen2Args", "Qwen2ForCausalLM"),
    "qwen2": ("serve_app.models.qwen2", "Qwen2Args", "Qwen2ForCausalLM"),
    "Qwen3ForCausalLM": ("serve_app.models.qwen3", "Qwen3Args", "Qwen3ForCausalLM"),
    "qwen3": ("serve_app.models.qwen3", "Qwen3Args", "Qwen3ForCausalLM"),
    "GemmaForCausalLM": ("serve_app.models.gemma", "GemmaArgs", "GemmaForCausalLM"),
    "gemma": ("serve_app.models.gemma", "GemmaArgs", "GemmaForCausalLM"),
    "Gemma2ForCausalLM": ("serve_app.models.gemma2", "Gemma2Args", "Gemma2ForCausalLM"),
    "gemma2": ("serve_app.models.gemma2", "Gemma2Args", "Gemma2ForCausalLM"),
    "Gemma3ForCausalLM": ("serve_app.models.gemma3", "Gemma3Args", "Gemma3ForCausalLM"),
    "gemma3": ("serve_app.models.gemma3", "Gemma3Args", "Gemma3ForCausalLM"),
    "Phi3ForCausalLM": ("serve_app.models.phi3", "Phi3Args", "Phi3ForCausalLM"),
    "phi3": ("serve_app.models.phi3", "Phi3Args", "Phi3ForCausalLM"),
    "PhiForCausalLM": ("serve_app.models.phi2", "Phi2Args", "PhiForCausalLM"),
    "phi2": ("serve_app.models.phi2", "Phi2Args", "PhiForCausalLM"),
    "Starcoder2ForCausalLM": ("serve_app.models.starcoder2", "Starcoder2Args", "Starcoder2ForCausalLM"),
    "starcoder2": ("serve_app.models.starcoder2", "Starcoder2Args", "Starcoder2ForCausalLM"),
    "MixtralForCausalLM": ("serve_app.models.mixtral", "MixtralArgs", "MixtralForCausalLM"),
    "Qwen2MoeForCausalLM": ("serve_app.models.qwen2_moe", "Qwen2MoeArgs", "Qwen2MoeForCausalLM"),
    "qwen2moe": ("serve_app.models.qwen2_moe", "Qwen2MoeArgs", "Qwen2MoeForCausalLM"),
    "Qwen3MoeForCausalLM": ("serve_app.models.qwen3_moe", "Qwen3MoeArgs", "Qwen3MoeForCausalLM"),
    "qwen3moe": ("serve_app.models.qwen3_moe", "Qwen3MoeArgs", "Qwen3MoeForCausalLM"),
    "PhimoeForCausalLM": ("serve_app.models.phimoe", "PhimoeArgs", "PhimoeForCausalLM"),
    "PhiMoEForCausalLM": ("serve_app.models.phimoe", "PhimoeArgs", "PhimoeForCausalLM"),
    "phimoe": ("serve_app.models.phimoe", "PhimoeArgs", "PhimoeForCausalLM"),
    "GraniteForCausalLM": ("serve_app.models.granite", "GraniteArgs", "GraniteForCausalLM"),
    "granite": ("serve_app.models.granite", "GraniteArgs", "GraniteForCausalLM"),
}


@dataclass(frozen=True, slots=True)
class Family:
    """A family's two classes: args.from_hf or args.from_gguf, then build(args, weights)."""

    args: type[ModelArgs]
    model: Any

    def build(self, args: ModelArgs, weights: WeightSource) -> CausalLM:
        """The model; ModelFileError where the weights do not fit the args."""
        model: CausalLM = self.model(args, weights)
        return model


def gguf_architecture(metadata: Mapping[str, Any]) -> Any:
    """The name under which a GGUF's family is found: Mixtral's files call themselves llama, but have experts."""
    name = metadata.get("general.architecture")
    return "MixtralForCausalLM" if name == "llama" and metadata.get("llama.expert_count") else name


def hf_architecture(family: Family) -> str:
    """The name in config.json of a family that was found."""
    classes = (family.args.__module__, family.args.__name__)
    return next(name for name, entry in _FAMILIES.items() if name.endswith("ForCausalLM") and entry[:2] == classes)


@cache
def gguf_form(architecture: str) -> GgufForm:
    """How GGUF writes the families of that name of its own; a form without particulars for an unknown name."""
    return find_family(architecture, "").args.GGUF if architecture in _FAMILIES else GgufForm(architecture)


@dataclass(frozen=True, slots=True)
class FamilyNames:
    """A family's file, its names in config.json (`…ForCausalLM`) and GGUF, and the first lines of its description."""

    name: str
    architectures: tuple[str, ...]
    about: str


def families() -> list[FamilyNames]:
    """All that is supported, in the order of the list."""
    names: dict[str, list[str]] = {}
    for architecture, (module_name, _, _) in _FAMILIES.items():
        names.setdefault(module_name, []).append(architecture)
    found = []
    for module_name, architectures in names.items():
        about = (import_module(module_name).__doc__ or "").split("\n\n")[0]
        found.append(FamilyNames(module_name.rpartition(".")[2], tuple(architectures), " ".join(about.split())))
    return found


def find_family(architecture: str | None, file: str) -> Family:
    """The family of an architecture name found in the named file; ModelFileError lists what is supported."""
    if architecture not in _FAMILIES:
        known = ", ".join(_FAMILIES)
        raise ModelFileError(f"{file}: architecture {architecture!r} is not supported; supported are {known}")
    module_name, args_name, model_name = _FAMILIES[architecture]
    module = import_module(module_name)
    return Family(getattr(module, args_name), getattr(module, model_name))
