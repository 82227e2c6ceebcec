"""The types that commands are told, as recipes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from serve_app.cli_isq_options import IsqOrganization
from serve_app.errors import LaunchError

if TYPE_CHECKING:
    from serve_app.quant.mix import Recipe
    from serve_app.quant.topology import Topology


def type_names(given: str | None) -> list[str]:
    """The names of --isq, which are separated by commas."""
    return [name.strip() for name in (given or "").split(",") if name.strip()]


def recipes_of(
    names: Sequence[str | None], organization: IsqOrganization, topology: "Topology | None" = None
) -> "list[Recipe]":
    """One for each name, None: what the topology alone says. LaunchError naming the option at fault."""
    from serve_app.quant.mix import Recipe

    promotes, experts_only = organization != "pure", organization == "moqe"
    try:
        return [Recipe.parse(name, promotes=promotes, experts_only=experts_only, topology=topology) for name in names]
    except ValueError as error:
        raise LaunchError(f"The option --isq: {error}.") from None
