"""A Ray cluster of this machine alone, started and ended with the server."""

import contextlib
import ctypes
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import psutil

from deployments.actor_options import logging_config
from deployments.edge import Edge, private_directory, private_environment
from deployments.log_pipe import LogPipe
from deployments.replica_process import Surroundings
from serve_app.config import LOG_LEVELS, AppConfig
from serve_app.errors import LaunchError
from serve_app.gpu_info import num_gpus

log = logging.getLogger(__name__)

# The object store carries no tensors of ours: the smallest that Ray likes.
OBJECT_STORE_BYTES = 128 * 2**20
START_ATTEMPTS = 2
# Of the time for the whole shutdown, what each part may take.
_STREAMS_SHARE, _SERVE_SHARE, _RAY_SHARE = 0.25, 0.4, 0.25
_LOOK_S = 0.1
_PR_SET_CHILD_SUBREAPER = 36


class PrivateCluster:
    """Starts Ray and Serve, and ends them within a deadline, whatever they do."""

    def __init__(self, config: AppConfig, edge: Edge) -> None:
        self._config = config
        self._edge = edge
        self._directory = private_directory()
        self._log_pipe = LogPipe(self._directory)
        self._children: dict[int, psutil.Process] = {}
        self._servers: list[psutil.Process] = []

    @property
    def surroundings(self) -> Surroundings:
        """For the replicas."""
        return Surroundings(
            is_private=True,
            is_listening=self._edge is Edge.DIRECT,
            directory=str(self._directory),
            log_pipe=self._log_pipe.path,
        )

    def start(self, when_up: Callable[[], None]) -> None:
        """Calls when_up once Ray runs, before Serve starts. Raises LaunchError if Ray cannot be started."""
        # What the user has set holds: Ray's switches are many, and some are for looking into Ray.
        for name, value in private_environment(self._config, self._edge, self._directory).items():
            os.environ.setdefault(name, value)
        _adopt_orphans()
        import ray
        from ray import serve

        # Ray's and Serve's own news are for those who look for trouble.
        others = psutil.Process().children()
        level = logging.WARNING if self._config.log == "info" else LOG_LEVELS[self._config.log]
        logging.getLogger("ray.serve").setLevel(level)
        for attempt in range(1, START_ATTEMPTS + 1):
            try:
                ray.init(
                    address="local",
                    _node_ip_address="127.0.0.1",
                    include_dashboard=False,
                    num_gpus=num_gpus(),
                    object_store_memory=OBJECT_STORE_BYTES,
                    logging_level=level,
                    log_to_driver=self._config.log in ("debug", "trace"),
                )
                break
            except Exception as error:  # Ray raises all kinds of them; a busy machine makes it miss its own deadlines
                ray.shutdown()
                self._end_children(time.monotonic() + 1, others)
                if attempt == START_ATTEMPTS:
                    raise LaunchError(f"Ray cannot be started on this machine: {error}") from error
                log.warning("Ray did not start (%s): trying once more", error)
        self._note_children()
        self._servers = [child for child in psutil.Process().children() if child not in others]
        when_up()
        serve.start(
            proxy_location="Disabled" if self._edge is Edge.DIRECT else "HeadOnly",
            http_options={"host": self._config.http.host, "port": self._config.http.port},
            logging_config=logging_config(self._config),
        )
        self._note_children()

    def stop(self, end_streams: Callable[[float], None]) -> bool:
        """Ends open streams, Serve, Ray, and what is left of our children, in shutdown_timeout_s at most.

        Signals to the whole process group reach Ray's processes too; with those gone there is only the rest to end.
        False: Ray's own shutdown has not come back.
        """
        total_s = self._config.deployment.shutdown_timeout_s
        end_s = time.monotonic() + total_s
        self._note_children()

        def within(share: float, what: str, call: Callable[..., Any], *args: Any) -> bool:
            return _within(share * total_s, what, call, *args, is_hopeless=self._is_lost)

        import ray
        from ray import serve

        has_ended = True
        with _silence(self._config.log not in ("debug", "trace")):
            if ray.is_initialized():
                within(_STREAMS_SHARE, "ending the open streams", end_streams, total_s * _STREAMS_SHARE - 1)
                # Here already: with its raylet dead, Ray may end this process any moment.
                shutil.rmtree(self._directory, ignore_errors=True)
                within(_SERVE_SHARE, "serve.shutdown", serve.shutdown)
                self._note_children()
                has_ended = within(_RAY_SHARE, "ray.shutdown", ray.shutdown)
            self._end_children(end_s)
        shutil.rmtree(self._directory, ignore_errors=True)
        return has_ended

    def kill(self) -> None:
        """Ends all our children at once."""
        self._end_children(time.monotonic())
        shutil.rmtree(self._directory, ignore_errors=True)

    def _note_children(self) -> None:
        # Noted early and often: a child whose parent is gone is no descendant of ours any more.
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process().children(recursive=True):
                self._children[child.pid] = child

    def _is_lost(self) -> bool:
        """Whether Ray's own processes were ended by others, as by a signal to the whole group: no call comes back then.

        Of gcs_server and raylet, which take long to end, the rest tells first; one of that may be gone by itself.
        """
        return sum(not _is_alive(server) for server in self._servers) >= 2

    def _end_children(self, end_s: float, spared: Sequence[psutil.Process] = ()) -> None:
        """By pid; psutil checks that a pid still is the process it was."""
        # Those too that a process of Ray has left behind when it was ended itself.
        self._note_children()
        for process in spared:
            self._children.pop(process.pid, None)
        _, alive = psutil.wait_procs(self._children.values(), timeout=max(0.0, min(1.0, end_s - time.monotonic())))
        for child in alive:
            log.debug("ending process %d", child.pid)
            with contextlib.suppress(psutil.Error):
                child.kill()
        psutil.wait_procs(alive, timeout=1.0)
        self._children.clear()
        self._servers.clear()


def _adopt_orphans() -> None:
    """Makes this process the parent of descendants whose own parent dies, on Linux: they stay in sight until the end.

    A signal to the whole group may end Ray's raylet before its workers, and before we look at who is there.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _within(timeout_s: float, what: str, call: Callable[..., Any], *args: Any, is_hopeless: Callable[[], bool]) -> bool:
    """Runs a call that may hang or fail on a thread of its own, and waits only so long. Whether it has ended."""

    def run() -> None:
        try:
            call(*args)
        except Exception as error:  # the way down goes on, whatever a part of it says
            log.debug("%s: %r", what, error)

    thread = threading.Thread(target=run, name=what, daemon=True)
    thread.start()
    end_s = time.monotonic() + timeout_s
    while thread.is_alive() and time.monotonic() < end_s and not is_hopeless():
        thread.join(_LOOK_S)
    # What is hopeless may still end by itself.
    thread.join(_LOOK_S)
    if thread.is_alive():
        log.debug("%s is not waited for any longer", what)
    return not thread.is_alive()


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


@contextlib.contextmanager
def _silence(is_wanted: bool) -> Iterator[None]:
    """Drops what Ray's own threads print, from C++ too, about a cluster that is being ended."""
    if not is_wanted:
        yield
        return
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [(number, os.dup(number)) for number in (1, 2)]
    with open(os.devnull, "w", encoding="ascii") as null:
        for number, _ in saved:
            os.dup2(null.fileno(), number)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in saved:
            os.dup2(copy, number)
            os.close(copy)
