"""The replicas' log lines on the server's own standard error, without the rest of what Ray's processes print."""

import logging
import os
import sys
import threading
from pathlib import Path

FORMAT = "%(levelname)s %(asctime)s %(name)s: %(message)s"

# What a pipe takes in one piece, so that lines of several writers do not mix.
_ATOMIC_BYTES = 4096


class LogPipe:
    """The reading end, in the server's process: a named pipe in a private directory, copied to standard error."""

    def __init__(self, directory: Path) -> None:
        self.path = str(directory / "log")
        os.mkfifo(self.path, 0o600)
        # Opened for writing too: a pipe whose last writer left would read as ended for ever.
        self._fd = os.open(self.path, os.O_RDWR)
        threading.Thread(target=self._copy, name="log pipe", daemon=True).start()

    def _copy(self) -> None:
        while data := os.read(self._fd, 1 << 16):
            sys.stderr.write(data.decode("utf-8", "replace"))
            sys.stderr.flush()


class PipeHandler(logging.Handler):
    """The writing end, in a replica. A line that would have to wait is dropped."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter(FORMAT))
        self._fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record).encode("utf-8", "replace")
            os.write(self._fd, line[: _ATOMIC_BYTES - 1] + b"\n")
        except OSError:
            pass  # the server is gone, or does not keep up: nothing that a log line could mend
        except Exception:
            self.handleError(record)
