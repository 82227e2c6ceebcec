"""Which engines take part in the run of one model and type, and with what."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cpu_speed.cells import Cell, Kind
from benchmarks.cpu_speed.child_engine import CHILDREN, ChildEngine
from benchmarks.cpu_speed.engine import Engine
from benchmarks.cpu_speed.llama_cpp import LlamaCpp
from benchmarks.cpu_speed.model_facts import KV_BYTES, ModelFacts
from benchmarks.models import gguf_path, openvino_path

SIROCCO, MISTRALRS, OPENVINO, TRANSFORMERS = "Sirocco", "mistral.rs", "OpenVINO", "transformers"
ROOT = Path(__file__).resolve().parents[2]
# The export that stands for a type; others have none.
OPENVINO_FORMATS = {"Q4_0": "int4", "Q4_K_M": "int4", "Q8_0": "int8"}
_LLAMA_KV = {"q8": "q8_0"}
_OPENVINO_KV = {"q8": "u8"}
_GIB = 1 << 30
_ROUNDING_TOKENS = 64  # to whole blocks


@dataclass(frozen=True, slots=True)
class Peers:
    """Where each peer is; None: not measured. The last three are Python interpreters of environments."""

    llama_bench: Path | None = None
    mistralrs: Path | None = None
    openvino: Path | None = None
    transformers: Path | None = None
    with_sirocco: bool = True


def sirocco(model: Path, cells: Sequence[Cell], threads: int, kv: str) -> ChildEngine:
    """Our engine, alone in a process, for the GGUF at `model`; kv as --kv-cache-dtype takes it, auto too."""
    context, streams = _sizes(cells)
    # The cells use the pool one after the other; the prompts of all depths stay in it, as prefixes.
    largest = max(cell.streams * (cell.prompt + cell.new + _ROUNDING_TOKENS) for cell in cells)
    pool_tokens = largest + sum(cell.prompt + _ROUNDING_TOKENS for cell in cells) + context
    options = {"model": str(model), "threads": threads, "kv": kv}
    options |= {"context": context, "pool_tokens": pool_tokens, "streams": streams}
    command = [sys.executable, str(CHILDREN / "sirocco_child.py")]
    kv_bytes = _kv_bytes(ModelFacts.of(model), pool_tokens, kv)
    needed = int(1.15 * model.stat().st_size) + kv_bytes + 2 * _GIB
    kinds: tuple[Kind, ...] = ("prefill", "decode", "share", "batch", "serve")
    return ChildEngine(SIROCCO, command, options, needed, kinds, {"PYTHONPATH": str(ROOT)})


def make_engines(
    peers: Peers, folder: Path, model: str, quant_type: str, cells: Sequence[Cell], threads: int, kv: str
) -> list[Engine]:
    """The engines for a model's files in `folder`, named as benchmarks.models names them; none is started."""
    path = gguf_path(folder, model, quant_type)
    facts, size = ModelFacts.of(path), path.stat().st_size
    context, streams = _sizes(cells)
    kv_bytes = _kv_bytes(facts, 4 * context, kv)
    engines: list[Engine] = [sirocco(path, cells, threads, kv)] if peers.with_sirocco else []
    if peers.llama_bench is not None:
        engines.append(LlamaCpp(peers.llama_bench, path, threads, _LLAMA_KV.get(kv, kv)))
    if peers.mistralrs is not None:
        options = {"folder": str(folder), "file": path.name, "threads": threads, "streams": streams, "kv": kv}
        command = [str(peers.mistralrs), str(CHILDREN / "mistralrs_child.py")]
        # Measured: 2.9 to 3.4 times the file of the 1B shape.
        engines.append(ChildEngine(MISTRALRS, command, options, int(3.5 * size) + kv_bytes + _GIB))
    export = openvino_path(folder, model, OPENVINO_FORMATS.get(quant_type, "none"))
    if peers.openvino is not None and export.exists():
        options = {"model": str(export), "threads": threads, "kv": _OPENVINO_KV.get(kv, kv)}
        options["vocab_size"] = facts.vocab_size
        command = [str(peers.openvino), str(CHILDREN / "openvino_child.py")]
        engines.append(ChildEngine(OPENVINO, command, options, int(2.5 * size) + kv_bytes + _GIB))
    if peers.transformers is not None and quant_type == "BF16":
        command = [str(peers.transformers), str(CHILDREN / "transformers_child.py")]
        options = {"model": str(folder / model), "threads": threads}
        engines.append(ChildEngine(TRANSFORMERS, command, options, int(1.3 * size) + kv_bytes + _GIB))
    return engines


def _sizes(cells: Sequence[Cell]) -> tuple[int, int]:
    """Context and number of streams that all cells need; a template and unequal prompts take a few tokens more."""
    return max(cell.prompt + cell.new for cell in cells) + 256, max(cell.streams for cell in cells)


def _kv_bytes(facts: ModelFacts, tokens: int, kv: str) -> int:
    return int(tokens * facts.kv_values * KV_BYTES.get(kv, max(KV_BYTES.values())))
