"""The results as JSON and as Markdown."""

from collections.abc import Sequence
from statistics import mean, median
from typing import Any

from benchmarks.cpu_speed.cells import Cell, Sample
from benchmarks.cpu_speed.engine import Engine
from benchmarks.cpu_speed.engines import MISTRALRS, OPENVINO, SIROCCO
from benchmarks.cpu_speed.intervals import Interval, paired_ratio, spread
from benchmarks.cpu_speed.machine import Machine
from benchmarks.cpu_speed.model_facts import ModelFacts
from benchmarks.cpu_speed.plan import Results

Json = dict[str, Any]

PEERS = ("llama.cpp", MISTRALRS)
"""The better of these is what a ratio is taken to."""


def machine_json(machine: Machine) -> Json:
    """Rates in 1e9 a second."""
    bandwidth = [
        {"threads": threads, "huge_pages": huge, **_spread(rates, 1e9)}
        for (threads, huge), rates in machine.bandwidth.items()
    ]
    dots = {kind: _spread(rates, 1e9) for kind, rates in machine.dots.items()}
    return {**machine.description, "read_GB_per_s": bandwidth, "dot_G_products_per_s": dots}


def run_json(
    model: str,
    quant_type: str,
    kv: str,
    engines: Sequence[Engine],
    cells: Sequence[Cell],
    results: Results,
    facts: ModelFacts,
    machine: Machine,
) -> Json:
    """One model and type: for each cell every engine's rates, and what follows from them."""
    names = [engine.name for engine in engines]
    return {
        "model": model,
        "type": quant_type,
        "kv": kv,
        "engines": {engine.name: engine.facts for engine in engines},
        "weight_bytes": facts.weight_bytes,
        "cells": [_cell_json(cell, names, results, facts, kv, machine) for cell in cells],
        "errors": results.errors,
    }


def better_peer(cell: Cell, results: Results) -> str | None:
    """Of PEERS, the one with the higher median rate; None where neither has samples."""
    medians = {name: median(s.rate for s in found) for name in PEERS if (found := results.of(cell, name))}
    return max(medians, key=medians.__getitem__) if medians else None


def _cell_json(
    cell: Cell, names: Sequence[str], results: Results, facts: ModelFacts, kv: str, machine: Machine
) -> Json:
    value: Json = {"cell": cell.label, "kind": cell.kind, "engines": {}}
    bandwidth = mean(results.bandwidth[cell]) if results.bandwidth.get(cell) else None
    for name in names:
        samples = results.of(cell, name)
        if not samples:
            continue
        rates = [s.rate for s in samples]
        entry: Json = {"tok_per_s": _spread(rates), "samples": [round(rate, 3) for rate in rates]}
        costs = [s.cpu_s / s.tokens * 1e3 for s in samples if s.cpu_s is not None]
        if costs:
            entry["cpu_ms_per_token"] = round(median(costs), 3)
        if cell.kind == "share":
            read_rates = [s.read_rate for s in samples if s.read_rate]
            shares = [
                facts.decode_bytes(cell.prompt, kv, cell.new) * a / b for a, b in zip(rates, read_rates, strict=True)
            ]
            entry["share_of_bandwidth"] = round(median(shares), 3)
            value["read_GB_per_s"] = round(median(read_rates) / 1e9, 2)
        elif cell.kind == "decode" and bandwidth is not None:
            # Of means: medians of what jumps between two values may fall on different ones.
            read = facts.decode_bytes(cell.prompt, kv, cell.new) * mean(rates)
            entry["share_of_bandwidth"] = round(read / bandwidth, 3)
        else:
            products = facts.products_per_token(cell) * median(rates)
            entry["share_of_dot_peak"] = {
                kind: round(products / median(peak), 3) for kind, peak in machine.dots.items()
            }
        value["engines"][name] = entry
    if bandwidth is not None and cell.kind != "share":
        value["read_GB_per_s"] = round(bandwidth / 1e9, 2)
    for key, peer in (("to_better_peer", better_peer(cell, results)), ("to_openvino", OPENVINO)):
        pairs = results.pairs(cell, SIROCCO, peer) if peer is not None else []
        if pairs:
            value[key] = {"peer": peer, **ratio_json(pairs)}
    return value


def ratio_json(pairs: Sequence[tuple[Sample, Sample]]) -> Json:
    """Of rates, and of processor time a token where it is known for all."""
    value = _interval(paired_ratio([a.rate for a, _ in pairs], [b.rate for _, b in pairs]))
    costs = [(a.cpu_s / a.tokens, b.cpu_s / b.tokens) for a, b in pairs if a.cpu_s and b.cpu_s]
    if len(costs) == len(pairs):
        value["cpu_time"] = _interval(paired_ratio([a for a, _ in costs], [b for _, b in costs]))
    return value


def markdown(report: Json) -> str:
    """A table of the machine, and one for each model and type."""
    machine = report["machine"]
    lines = [
        f"{machine['processor']}, {machine['threads']} threads, {machine['system']}, Python {machine['python']}", "",
        "| read, GB/s | median | range |", "|---|---|---|",
    ]  # fmt: skip
    for row in machine["read_GB_per_s"]:
        pages = "huge pages" if row["huge_pages"] else "4 KiB pages"
        lines.append(f"| {row['threads']} threads, {pages} | {row['median']} | {row['low']}–{row['high']} |")
    for kind, row in machine["dot_G_products_per_s"].items():
        lines.append(f"| dot {kind}, 10⁹ products/s | {row['median']} | {row['low']}–{row['high']} |")
    for run in report["runs"]:
        lines += ["", *_run_lines(run)]
    return "\n".join(lines) + "\n"


def _run_lines(run: Json) -> list[str]:
    names = list(run["engines"])
    versions = "; ".join(_facts_text(name, facts) for name, facts in run["engines"].items())
    head = ["", *names, "to the better peer", "to OpenVINO", "of the limit", "CPU ms/token"]
    lines = [f"### {run['model']} {run['type']}", "", f"tok/s: median (range); {versions}", ""]
    lines += [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for cell in run["cells"]:
        found = cell["engines"]
        ours = found.get(SIROCCO, {})
        row = [cell["cell"], *(_rate(found.get(name)) for name in names)]
        row += [_ratio(cell.get("to_better_peer")), _ratio(cell.get("to_openvino"))]
        row += [_limit(ours, run["type"]), str(ours.get("cpu_ms_per_token", ""))]
        lines.append(f"| {' | '.join(row)} |")
    for name, errors in run["errors"].items():
        lines += ["", *(f"{name}: {error}" for error in errors)]
    return lines


def _facts_text(name: str, facts: Json) -> str:
    parts = [str(facts[key]) for key in ("version", "kernels") if key in facts]
    if "kv" in facts:
        parts.append(f"KV {facts['kv']}")
    if "load_s" in facts:
        parts.append(f"loaded in {facts['load_s']} s with {facts['peak_rss_mb']} MB")
    return f"{name} ({', '.join(parts)})"


def _rate(entry: Json | None) -> str:
    if entry is None:
        return "–"
    rate = entry["tok_per_s"]
    return f"{rate['median']:.1f} ({rate['low']:.1f}–{rate['high']:.1f})"


def _limit(entry: Json, quant_type: str) -> str:
    """Decode: of the read bandwidth. Else of the dot instruction that a type's products can use."""
    if "share_of_bandwidth" in entry:
        return f"{entry['share_of_bandwidth']:.0%} of reading"
    kind = {"BF16": "bf16", "F16": "f32", "F32": "f32"}.get(quant_type, "int8")
    share = entry.get("share_of_dot_peak", {}).get(kind)
    return "" if share is None else f"{share:.0%} of {kind} dots"


def _ratio(value: Json | None) -> str:
    if value is None:
        return ""
    text = f"**{value['median']:.2f}** [{value['low']:.2f}, {value['high']:.2f}] {value['peer']}"
    if "cpu_time" in value:
        cpu = value["cpu_time"]
        text += f", CPU time {cpu['median']:.2f} [{cpu['low']:.2f}, {cpu['high']:.2f}]"
    return text


def _spread(values: Sequence[float], unit: float = 1.0) -> Json:
    found = spread(values)
    return {
        "median": round(found.median / unit, 2),
        "low": round(found.low / unit, 2),
        "high": round(found.high / unit, 2),
    }


def _interval(found: Interval) -> Json:
    return {
        "median": round(found.median, 4),
        "low": round(found.low, 4),
        "high": round(found.high, 4),
        "pairs": found.count,
    }
