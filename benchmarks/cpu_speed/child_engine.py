"""Engines that live in a process of their own, perhaps with another environment's Python.

Such a process loads its model once, then waits on its standard input: one JSON line in is one cell to measure, one
JSON line out its figures. While another engine is measured it is blocked in read() and takes no time.
"""

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.cpu_speed.cells import Cell, Kind, Sample
from benchmarks.cpu_speed.engine import EngineError

CHILDREN = Path(__file__).parent / "children"
_STOP_TIMEOUT_S = 20.0
_WARM_UP_SEED = 1_000_000


class ChildEngine:
    """See Engine. The process is started by the first measurement, and ended by an empty line or its input's end."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        options: Mapping[str, Any],
        needed_bytes: int,
        kinds: Sequence[Kind] = ("prefill", "decode", "batch"),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """options: what the child is told in its first line; environment: added to ours."""
        self.name = name
        self.needed_bytes = needed_bytes
        self.facts: dict[str, Any] = {}
        self._command = list(command)
        self._options = dict(options)
        self._kinds = tuple(kinds)
        self._environment = dict(environment or {})
        self._process: subprocess.Popen[str] | None = None
        self._warm: set[Cell] = set()
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the engine

    @property
    def is_loaded(self) -> bool:
        """See Engine."""
        return self._process is not None

    def can(self, cell: Cell) -> bool:
        """See Engine."""
        return cell.kind in self._kinds

    def measure(self, cell: Cell, seed: int) -> Sample:
        """See Engine. The first time in a cell is done twice: the first result, in cold memory, is dropped."""
        if self._process is None:
            self.start()
        if cell not in self._warm:
            self._ask({**asdict(cell), "seed": _WARM_UP_SEED})
            self._warm.add(cell)
        reply = self._ask({**asdict(cell), "seed": seed})
        return Sample(reply["tokens"], reply["seconds"], reply["cpu_s"], reply.get("read_rate"))

    def stop(self) -> None:
        """See Engine."""
        if self._process is None:
            return
        process, self._process = self._process, None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.close()
            process.wait(_STOP_TIMEOUT_S)
        except (subprocess.TimeoutExpired, OSError):
            process.kill()
            process.wait()
        process.stdout.close()

    def start(self) -> None:
        """Starts the process and waits until it has its model; facts are known then. Raises EngineError."""
        self._warm.clear()
        start = time.perf_counter()
        try:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
                env={**os.environ, **self._environment},
            )
        except OSError as error:
            raise EngineError(f"{self.name}: {self._command[0]} cannot be run ({error.strerror})") from error
        self.facts = self._ask(self._options)
        self.facts["start_s"] = round(time.perf_counter() - start, 2)

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(message) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.stop()
            raise EngineError(f"{self.name}: its process ended; it said last: {self._last_words()}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise EngineError(f"{self.name}: {reply['error']}")
        return reply

    def _last_words(self) -> str:
        self._log.seek(0)
        return self._log.read()[-800:].strip()
