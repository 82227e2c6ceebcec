"""Which served model a client means."""

from collections.abc import Sequence

from serve_app.api.backend import ModelCard
from serve_app.config import HttpConfig
from serve_app.errors import ModelNotFound, Unavailable

DEFAULT = "default"


def resolve(name: str | None, cards: Sequence[ModelCard], config: HttpConfig) -> ModelCard:
    """The model that answers a request for `name`: the one of that name, the first for 'default' or none.

    With a single model every other name means it too, unless strict_model_name. Raises ModelNotFound, Unavailable.
    """
    if not cards:
        raise Unavailable("No model is loaded yet.")
    for card in cards:
        if card.id == name:
            return card
    if name is None or name == DEFAULT or (len(cards) == 1 and not config.strict_model_name):
        return cards[0]
    raise _not_found(name)


def find_listed(name: str, cards: Sequence[ModelCard]) -> ModelCard:
    """The model listed under `name`, or the first for 'default'. Raises ModelNotFound."""
    for card in cards:
        if name == card.id:
            return card
    if name == DEFAULT and cards:
        return cards[0]
    raise _not_found(name)


def _not_found(name: str) -> ModelNotFound:
    return ModelNotFound(
        f"The model {name[:200]!r} does not exist here; GET /v1/models lists those that do.", param="model"
    )
