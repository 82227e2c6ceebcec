"""Draws the sweep of benchmarks.speculation: what was measured beside the formula.

    python -m benchmarks.speculation_plot REPORT.json PLOT.png

Left, speed-up against the number of drafted tokens, one colour for each acceptance; right, speed-up against acceptance,
one colour for each number. Points are measured, lines are the formula with the measured costs.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.speculation import StepCosts

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
_GAMMAS = (1, 2, 4, 8)


def draw(sweep: dict[str, Any], path: Path) -> None:
    """sweep: as the report has it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    costs = StepCosts(**sweep["costs"])
    rows = sorted(sweep["targets"], key=lambda row: -row["acceptance"])
    for row, colour in zip(rows, _COLOURS, strict=True):
        acceptance, numbers = row["acceptance"], range(len(costs.verify))
        left.plot(numbers, [costs.speedup(acceptance, gamma) for gamma in numbers], color=colour, linewidth=1.2)
        measured = {int(gamma): ratio for gamma, ratio in row["measured"].items()}
        left.plot(list(measured), list(measured.values()), "o", color=colour, label=f"acceptance {acceptance:.2f}")
    places = [i / 100 for i in range(101)]
    for gamma, colour in zip(_GAMMAS, _COLOURS, strict=True):
        right.plot(places, [costs.speedup(place, gamma) for place in places], color=colour, linewidth=1.2)
        points = [(row["acceptance"], row["measured"][str(gamma)]) for row in rows]
        label = f"{gamma} token{'s' if gamma > 1 else ''} drafted"
        right.plot(*zip(*points, strict=True), "o", color=colour, label=label)
    for axes in (left, right):
        axes.axhline(1.0, color="grey", linewidth=0.8, linestyle=":")
        axes.set_ylim(0)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, loc="upper left")
    left.set_xlabel("drafted tokens a step")
    left.set_ylabel("tokens/s over plain decoding")
    right.set_xlabel("acceptance")
    right.set_xlim(0, 1)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("plot", type=Path)
    options = parser.parse_args()
    draw(json.loads(options.report.read_text())["sweep"], options.plot)


if __name__ == "__main__":
    main()
