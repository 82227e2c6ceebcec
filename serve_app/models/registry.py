"""Architecture name → family: the one list of what is supported.

Families are imported when they are asked for; no torch before that, so that names can be looked up in any process.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from serve_app.errors import LaunchError, ModelFileError
from serve_app.models.gguf_form import GgufForm

if TYPE_CHECKING:
    from serve_app.models.base import CausalLM, ModelArgs, WeightSource


@dataclass(frozen=True, slots=True)
class _Entry:
    """A family's file in serve_app.models, its two classes, and its names in config.json (`architectures`) and GGUF
    (`general.architecture`)."""

    module: str
    args: str
    model: str
    config_names: tuple[str, ...]
    gguf_name: str


# By the name that -a takes: mistral.rs's, and one in its way where it has none.
_FAMILIES: Final[dict[str, _Entry]] = {
    "llama": _Entry("llama", "LlamaArgs", "LlamaForCausalLM", ("LlamaForCausalLM",), "llama"),
    "mistral": _Entry("mistral", "MistralArgs", "MistralForCausalLM", ("MistralForCausalLM",), "llama"),
    "qwen2": _Entry("qwen2", "Qwen2Args", "Qwen2ForCausalLM", ("Qwen2ForCausalLM",), "qwen2"),
    "qwen3": _Entry("qwen3", "Qwen3Args", "Qwen3ForCausalLM", ("Qwen3ForCausalLM",), "qwen3"),
    "gemma": _Entry("gemma", "GemmaArgs", "GemmaForCausalLM", ("GemmaForCausalLM",), "gemma"),
    "gemma2": _Entry("gemma2", "Gemma2Args", "Gemma2ForCausalLM", ("Gemma2ForCausalLM",), "gemma2"),
    "gemma3": _Entry("gemma3", "Gemma3Args", "Gemma3ForCausalLM", ("Gemma3ForCausalLM",), "gemma3"),
    "phi3": _Entry("phi3", "Phi3Args", "Phi3ForCausalLM", ("Phi3ForCausalLM",), "phi3"),
    "phi2": _Entry("phi2", "Phi2Args", "PhiForCausalLM", ("PhiForCausalLM",), "phi2"),
    "starcoder2": _Entry(
        "starcoder2", "Starcoder2Args", "Starcoder2ForCausalLM", ("Starcoder2ForCausalLM",), "starcoder2"
    ),
    "mixtral": _Entry("mixtral", "MixtralArgs", "MixtralForCausalLM", ("MixtralForCausalLM",), "llama"),
    "qwen2moe": _Entry("qwen2_moe", "Qwen2MoeArgs", "Qwen2MoeForCausalLM", ("Qwen2MoeForCausalLM",), "qwen2moe"),
    "qwen3moe": _Entry("qwen3_moe", "Qwen3MoeArgs", "Qwen3MoeForCausalLM", ("Qwen3MoeForCausalLM",), "qwen3moe"),
    "phi3.5moe": _Entry(
        "phimoe", "PhimoeArgs", "PhimoeForCausalLM", ("PhimoeForCausalLM", "PhiMoEForCausalLM"), "phimoe"
    ),
    "granite": _Entry("granite", "GraniteArgs", "GraniteForCausalLM", ("GraniteForCausalLM",), "granite"),
}


class UnknownArchitecture(ModelFileError):
    """No family has this name."""


@dataclass(frozen=True, slots=True)
class Family:
    """A family's two classes: args.from_hf or args.from_gguf, then build(args, weights)."""

    args: "type[ModelArgs]"
    model: Any

    def build(self, args: "ModelArgs", weights: "WeightSource") -> "CausalLM":
        """The model; ModelFileError where the weights do not fit the args."""
        model: CausalLM = self.model(args, weights)
        return model


def gguf_architecture(metadata: Mapping[str, Any]) -> Any:
    """The name under which a GGUF's family is found: Mixtral's files call themselves llama, but have experts."""
    name = metadata.get("general.architecture")
    return "MixtralForCausalLM" if name == "llama" and metadata.get("llama.expert_count") else name


def hf_architecture(family: Family) -> str:
    """The name in config.json of a family that was found."""
    return next(
        entry.config_names[0]
        for entry in _FAMILIES.values()
        if _module(entry).__name__ == family.args.__module__ and entry.args == family.args.__name__
    )


@cache
def gguf_form(architecture: str) -> GgufForm:
    """How GGUF writes the families of that name of its own; a form without particulars for an unknown name."""
    is_known = any(entry.gguf_name == architecture for entry in _FAMILIES.values())
    return find_family(architecture, "").args.GGUF if is_known else GgufForm(architecture)


@dataclass(frozen=True, slots=True)
class FamilyNames:
    """A family's name for -a, its names in config.json (`…ForCausalLM`) and GGUF, and the first lines of its
    description."""

    name: str
    architectures: tuple[str, ...]
    about: str


def families() -> list[FamilyNames]:
    """All that is supported, in the order of the list."""
    found = []
    for name, entry in _FAMILIES.items():
        about = (_module(entry).__doc__ or "").split("\n\n")[0]
        stored = () if _by_gguf_name(entry.gguf_name) != name else (entry.gguf_name,)
        found.append(FamilyNames(name, (*entry.config_names, *stored), " ".join(about.split())))
    return found


def family_names() -> tuple[str, ...]:
    """The names that -a takes, in the order of the list."""
    return tuple(_FAMILIES)


def stored_name(name: str, *, is_gguf: bool) -> str:
    """What files of a format call the architecture that -a names, in its short form, config.json's or GGUF's.

    LaunchError, which lists what is supported, for an unknown one.
    """
    short = _short_name(name)
    if short is None:
        raise LaunchError(f"The option --arch names {name!r}, which is not supported; supported are {_supported()}")
    return _FAMILIES[short].gguf_name if is_gguf else _FAMILIES[short].config_names[0]


def find_family(architecture: str | None, file: str) -> Family:
    """The family of an architecture name found in the named file; UnknownArchitecture lists what is supported."""
    short = None if architecture is None else _short_name(architecture)
    if short is None:
        raise UnknownArchitecture(
            f"{file}: architecture {architecture!r} is not supported; supported are {_supported()}"
        )
    entry = _FAMILIES[short]
    module = _module(entry)
    return Family(getattr(module, entry.args), getattr(module, entry.model))


def _short_name(name: str) -> str | None:
    if name in _FAMILIES:
        return name
    for short, entry in _FAMILIES.items():
        if name in entry.config_names:
            return short
    return _by_gguf_name(name)


def _by_gguf_name(name: str) -> str | None:
    """The first of the list: Mistral and Mixtral are llamas in GGUF."""
    return next((short for short, entry in _FAMILIES.items() if entry.gguf_name == name), None)


def _module(entry: _Entry) -> Any:
    return import_module(f"serve_app.models.{entry.module}")


def _supported() -> str:
    return ", ".join(f"{short} ({entry.config_names[0]})" for short, entry in _FAMILIES.items())
