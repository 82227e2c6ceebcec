"""What `sirocco quality` found, as a table and as JSON."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from serve_app.engine.perplexity import Perplexity
    from serve_app.engine.quality import Distance, Size


@dataclass(frozen=True, slots=True)
class Row:
    """One type's figures. is_weighted: quantised with an importance matrix."""

    type: str
    is_weighted: bool
    size: "Size"
    distance: "Distance"

    @property
    def perplexity(self) -> "Perplexity":
        """The type's own."""
        return self.distance.perplexity

    @property
    def reference_perplexity(self) -> "Perplexity":
        """The unquantised model's over the same tokens."""
        return self.distance.reference_perplexity


@dataclass(frozen=True, slots=True)
class Report:
    """All rows, and what they are measured against. num_tokens: those that were scored."""

    model: str
    text: str
    chunk_tokens: int
    num_tokens: int
    reference_size: "Size"
    reference_perplexity: "Perplexity"
    rows: Sequence[Row]


def print_report(report: Report) -> None:
    """The table, to standard output."""
    table = Table(
        title=f"{report.model}: {report.num_tokens} tokens of {report.text}, chunks of {report.chunk_tokens}",
        title_justify="left",
    )
    table.add_column("type")
    has_weighted = any(row.is_weighted for row in report.rows)
    if has_weighted:
        table.add_column("importance")
    for name in ("bits/weight", "MiB", "perplexity", "KL divergence", "same top token"):
        table.add_column(name, justify="right")

    def add(name: str, weighted: str, size: "Size", perplexity: "Perplexity", distance: str, agreement: str) -> None:
        cells = [f"{size.bits_per_weight:.2f}", f"{size.weight_bytes / 2**20:.1f}"]
        cells += [f"{perplexity.value:.4f} ± {perplexity.error:.4f}", distance, agreement]
        table.add_row(name, *([weighted] if has_weighted else []), *cells)

    add("as it is", "", report.reference_size, report.reference_perplexity, "", "")
    for row in report.rows:
        distance = f"{row.distance.kl_divergence:.6f} ± {row.distance.kl_error:.6f}"
        agreement = f"{100 * row.distance.top1_agreement:.2f} %"
        add(row.type, "yes" if row.is_weighted else "", row.size, row.perplexity, distance, agreement)
    Console(width=None if Console().is_terminal else 120).print(table)


def write_report(path: Path, report: Report) -> None:
    """JSON: the facts of the measurement, the reference, and one object a row."""
    facts: dict[str, Any] = {
        "model": report.model,
        "text": report.text,
        "chunk_tokens": report.chunk_tokens,
        "num_tokens": report.num_tokens,
        "reference": _figures(report.reference_size, report.reference_perplexity),
        "types": [
            {
                "type": row.type,
                "has_importance": row.is_weighted,
                **_figures(row.size, row.perplexity),
                "kl_divergence": row.distance.kl_divergence,
                "kl_error": row.distance.kl_error,
                "top1_agreement": row.distance.top1_agreement,
            }
            for row in report.rows
        ],
    }
    path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def _figures(size: "Size", perplexity: "Perplexity") -> dict[str, float]:
    return {
        "bits_per_weight": size.bits_per_weight,
        "weight_bytes": size.weight_bytes,
        "perplexity": perplexity.value,
        "perplexity_error": perplexity.error,
    }
