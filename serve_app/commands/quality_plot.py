"""The plot of `sirocco quality`: bits per weight against KL divergence, one labelled point a type."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from serve_app.commands.quality_report import Report, Row
from serve_app.errors import LaunchError

SUFFIXES = (".png", ".svg", ".pdf")
_DPI = 110
_LABEL_POINTS = 7.5
_MOST_BITS = 12


def require_plotting(path: Path) -> None:
    """LaunchError where nothing can be drawn: another kind of file, or matplotlib is missing."""
    if path.suffix.lower() not in SUFFIXES:
        raise LaunchError(f"The option --plot: {path.name} ends in none of {', '.join(SUFFIXES)}.")
    if find_spec("matplotlib") is None:
        raise LaunchError(
            "The option --plot needs matplotlib: install Sirocco with the extra plot (pip install 'sirocco[plot]')."
        )


def draw(path: Path, report: Report) -> None:
    """Draws the rows into a file of the kind that its name says."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    axes.set_yscale("log")
    axes.set_xlabel("bits per weight, embedding and head included")
    axes.set_ylabel("mean KL divergence from the unquantised model, nats")
    axes.set_title(f"{report.model}: {report.num_tokens} tokens of {report.text}", fontsize=10)
    axes.grid(which="major", alpha=0.3)
    # A type that changes nothing has no place on a logarithmic axis; those of 16 bits would press the others together.
    rows = [row for row in report.rows if row.distance.kl_divergence > 0]
    rows = [row for row in rows if row.size.bits_per_weight < _MOST_BITS] or rows
    for is_weighted, label, color, marker in (
        (False, "by itself", "tab:blue", "o"),
        (True, "with an importance matrix", "tab:orange", "^"),
    ):
        points = [_point(row) for row in rows if row.is_weighted == is_weighted]
        if points:
            x, y = zip(*points, strict=True)
            axes.plot(x, y, linestyle="none", markersize=5, label=label, color=color, marker=marker)
    axes.margins(0.07)
    if any(row.is_weighted for row in rows):
        axes.legend(fontsize=8)
    figure.draw_without_rendering()
    _label(axes, rows)
    figure.savefig(path)


def _point(row: Row) -> tuple[float, float]:
    return row.size.bits_per_weight, row.distance.kl_divergence


def _label(axes: Any, rows: list[Row]) -> None:
    """Names beside the points, each on the first side where it covers neither a point nor another name.

    Types that an importance matrix changes are named once, at the better of their points.
    """
    best: dict[str, Row] = {}
    for row in rows:
        if row.type not in best or row.distance.kl_divergence < best[row.type].distance.kl_divergence:
            best[row.type] = row
    pixels = _DPI / 72
    height = _LABEL_POINTS * pixels
    marks = [tuple(axes.transData.transform(_point(row))) for row in rows]
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in marks]
    for row in best.values():
        x, y = axes.transData.transform(_point(row))
        width = 0.68 * height * len(row.type)
        places = [
            (x + dx - (width if dx < 0 else width / 2 if dx == 0 else 0), y + dy - height / 2)
            for reach in (7, 14, 22)
            for dx, dy in ((reach, 0), (-reach, 0), (0, -reach - 3), (0, reach + 3), (reach, -reach), (-reach, -reach))
        ]
        boxes = [(left, low, left + width, low + height) for left, low in places]
        box = next((box for box in boxes if not any(_overlap(box, other) for other in taken)), boxes[0])
        taken.append(box)
        at = axes.transData.inverted().transform(box[:2])
        axes.text(*at, row.type, fontsize=_LABEL_POINTS, verticalalignment="bottom", horizontalalignment="left")


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
