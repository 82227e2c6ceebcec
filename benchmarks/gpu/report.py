"""What was found, for people and for programs."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.gpu.attention import AttentionRow
from benchmarks.gpu.engine_speed import SpeedRow
from benchmarks.gpu.limits import Limits
from benchmarks.gpu.parity import Check
from benchmarks.gpu.products import ProductRow
from benchmarks.gpu.step_profile import StepProfile


@dataclass(slots=True)
class Report:
    """machine: names and versions. skipped: what there was no time or no package for."""

    machine: dict[str, str]
    limits: Limits | None = None
    checks: list[Check] = field(default_factory=list)
    tests: str = ""
    products: list[ProductRow] = field(default_factory=list)
    attention: list[AttentionRow] = field(default_factory=list)
    speeds: list[SpeedRow] = field(default_factory=list)
    profiles: dict[str, StepProfile] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)

    @property
    def failures(self) -> list[str]:
        """Checks that failed."""
        return [f"{check.name}: {check.failure}" for check in self.checks if check.failure is not None]

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return asdict(self)

    def markdown(self) -> str:
        """Tables."""
        parts = [", ".join(f"{key} {value}" for key, value in self.machine.items())]
        if self.limits is not None:
            copying, products = self.limits.bandwidth / 1e9, self.limits.bf16_rate / 1e12
            parts.append(f"Copying: {copying:.0f} GB/s; bf16 products: {products:.0f} TFLOP/s.")
        if self.checks:
            failed = "; ".join(self.failures) or "all right"
            parts.append(f"Parity of {len(self.checks)} kernels: {failed}.")
        if self.tests:
            parts.append(f"Tests: {self.tests}")
        parts += [self._product_table(), self._attention_table(), self._speed_table(), self._profile_table()]
        if self.skipped:
            parts.append("Not done: " + "; ".join(self.skipped) + ".")
        return "\n\n".join(part for part in parts if part) + "\n"

    def _share(self, bytes_per_s: float) -> str:
        """GB/s, and the share of the copy's bandwidth."""
        share = "" if self.limits is None else f" ({100 * bytes_per_s / self.limits.bandwidth:.0f} %)"
        return f"{bytes_per_s / 1e9:.0f} GB/s{share}"

    def _product_table(self) -> str:
        if not self.products:
            return ""
        counts = sorted({row.rows for row in self.products})
        by_name: dict[str, dict[int, ProductRow]] = {}
        for row in self.products:
            by_name.setdefault(row.name, {})[row.rows] = row
        lines = []
        for name, rows in by_name.items():
            lines.append([name, *(self._product_cell(rows.get(count)) for count in counts)])
        return "A layer's products, by rows of activations:\n\n" + table(["", *map(str, counts)], lines)

    def _product_cell(self, row: ProductRow | None) -> str:
        if row is None:
            return ""
        rate = self._share(row.bytes_per_s) if row.rows <= 64 else f"{row.operations_per_s / 1e12:.0f} TFLOP/s"
        return f"{row.seconds * 1e6:.0f} µs, {rate}"

    def _attention_table(self) -> str:
        if not self.attention:
            return ""
        names = list(dict.fromkeys(row.backend for row in self.attention))
        cells = {(row.context, row.batch, row.backend): row for row in self.attention}
        lines = []
        for context, batch in dict.fromkeys((row.context, row.batch) for row in self.attention):
            found = [cells.get((context, batch, name)) for name in names]
            shown = [
                "" if row is None else f"{row.seconds * 1e6:.0f} µs, {self._share(row.bytes_per_s)}" for row in found
            ]
            lines.append([f"{batch} x {context}", *shown])
        return "Decode attention of a layer, requests by context:\n\n" + table(["", *names], lines)

    def _speed_table(self) -> str:
        lines = [
            [
                row.engine, row.layout, f"{row.load.batch} x {row.load.prompt}", f"{row.tokens_per_s:.0f}",
                self._share(row.bytes_per_s),
            ]
            for row in self.speeds
        ]  # fmt: skip
        return "" if not lines else table(["engine", "weights", "requests by prompt", "tokens/s", "read"], lines)

    def _profile_table(self) -> str:
        lines = [
            [
                name, f"{p.step_us:.0f} µs", f"{100 * p.busy_share:.1f} %", f"{p.kernels_per_step:.0f}",
                "; ".join(f"{gap.us:.0f} µs before {gap.after[:40]}" for gap in p.gaps),
            ]
            for name, p in self.profiles.items()
        ]  # fmt: skip
        return "" if not lines else table(["decode step", "time", "GPU busy", "kernels", "longest gaps"], lines)


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
