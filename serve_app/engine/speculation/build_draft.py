"""From two models' names to a draft model that speaks the target's ids."""

from collections.abc import Callable
from dataclasses import dataclass

from serve_app.engine.speculation.build_drafter import build_drafter
from serve_app.engine.speculation.draft_border import MakeSwitch
from serve_app.engine.speculation.draft_call import DraftModel
from serve_app.engine.speculation.text_map import TextMappedDraft
from serve_app.engine.stats import DraftStats
from serve_app.errors import ModelFileError
from serve_app.loaders.model_files import ModelFiles
from serve_app.options import EngineConfig
from serve_app.text.tokenizer import open_tokenizer
from serve_app.text.vocabulary_digest import refusal, vocabulary_of


@dataclass(frozen=True, slots=True)
class BuiltDraft:
    """vocabulary: what the model's ids mean. make_switch: how its weights can be changed. stats: what it has done."""

    model: DraftModel
    vocabulary: list[bytes]
    make_switch: MakeSwitch | None
    stats: Callable[[], DraftStats]


def build_draft(
    draft: ModelFiles, target: ModelFiles, config: EngineConfig, *, maps_text: bool = False, works_ahead: bool = True
) -> BuiltDraft:
    """target: whose tokens are proposed. config, works_ahead: see build_drafter. maps_text: see SpeculationOptions.

    Raises ModelFileError, for a tokenizer other than the target's too, and LaunchError.
    """
    own = open_tokenizer(draft.tokenizer_source, encodes=maps_text)
    targets = open_tokenizer(target.tokenizer_source, encodes=maps_text)
    mine, theirs = vocabulary_of(own), vocabulary_of(targets)
    if mine != theirs and not maps_text:
        raise ModelFileError(refusal(theirs, mine))
    drafter = build_drafter(draft, config, works_ahead=works_ahead, num_ids=len(mine))
    model = TextMappedDraft(drafter, own, targets) if mine != theirs else drafter
    return BuiltDraft(model, mine, drafter.make_switch, drafter.stats)
