"""The request log: one JSON line per generation request. It never holds headers, and so no API keys."""

import json
import os
import queue
import threading
import time
from typing import Any

from serve_app.api.call import Call
from serve_app.errors import LaunchError

_QUEUE_LENGTH = 4096


class RequestLog:
    """Appends records to a file from a thread of its own. Several processes may share the file: a line is one write.

    The file is created readable by its owner alone, since it holds what users write. Raises LaunchError if it cannot be
    opened. When the disk does not keep up, records are dropped and the next line says how many.
    """

    def __init__(self, path: str) -> None:
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise LaunchError(f"The request log {path} cannot be opened: {error.strerror}.") from error
        self._records: queue.Queue[dict[str, Any] | None] = queue.Queue(_QUEUE_LENGTH)
        self._num_dropped = 0
        self._thread = threading.Thread(target=self._run, name="request-log", daemon=True)
        self._thread.start()

    def write(self, record: dict[str, Any]) -> None:
        """Takes a record; it must not be changed afterwards."""
        if self._num_dropped:
            record = {**record, "dropped_before": self._num_dropped}
        try:
            self._records.put_nowait(record)
            self._num_dropped = 0
        except queue.Full:
            self._num_dropped += 1

    def close(self) -> None:
        """Writes what is queued and closes the file."""
        if self._thread.is_alive():
            self._records.put(None)
            self._thread.join()
            os.close(self._file)

    def _run(self) -> None:
        while (record := self._records.get()) is not None:
            line = json.dumps(record, separators=(",", ":"), default=str).encode() + b"\n"
            try:
                os.write(self._file, line)
            except OSError:
                self._num_dropped += 1


def record_of(call: Call, endpoint: str) -> dict[str, Any]:
    """What the log tells of a call that has ended."""
    record: dict[str, Any] = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "id": call.id,
        "x_request_id": call.proxy_id,
        "endpoint": endpoint,
        "code": call.code,
        "request": call.body,
        "total_s": round(time.monotonic() - call.arrived, 6),
        **call.outcome,
    }
    if call.error is not None:
        record["error"] = {"message": call.error.message, "type": call.error.type, "code": call.error.code}
    return record
