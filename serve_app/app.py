"""The composition root: which deployments make the application, and the life of the server process."""

import atexit
import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from deployments.actor_options import (
    check_private,
    draft_options,
    ingress_options,
    preprocessor_options,
    target_options,
)
from deployments.edge import choose_edge, reserve_port
from deployments.joined_cluster import JoinedCluster
from deployments.private_cluster import PrivateCluster
from deployments.replica_process import Surroundings
from serve_app.api.backend import Backend
from serve_app.api.routes import build_asgi
from serve_app.config import AppConfig, HttpConfig, ModelConfig
from serve_app.errors import LaunchError, ModelFileError
from serve_app.loaders.model_files import resolve
from serve_app.metrics import HttpMetrics
from serve_app.options import ModelSource

log = logging.getLogger(__name__)

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

_START_POLL_S = 0.5
_WATCH_POLL_S = 5.0


class Cluster(Protocol):
    """A Ray cluster, our own or one that was joined. Ray is imported by start, once its environment is set."""

    @property
    def surroundings(self) -> Surroundings: ...
    def start(self, when_up: Callable[[], None]) -> None: ...
    def stop(self, end_streams: Callable[[float], None]) -> bool: ...
    def kill(self) -> None: ...


def build_app(config: AppConfig) -> Any:
    """The Serve application of a configuration, for a cluster that others run; `serve deploy` calls it.

    config may also be the plain data of AppConfig.to_args.
    """
    return _application(AppConfig.model_validate(config), Surroundings())


def run(config: AppConfig) -> int:
    """Serves until SIGINT or SIGTERM; returns the exit code.

    Raises LaunchError and ModelFileError, before anything listens for all that can be seen by then.
    """
    config = with_absolute_paths(config)
    config.http.resolve_api_keys()
    if config.deployment.ray_address is not None:
        # The files are those of the cluster's nodes: not looked for here.
        name = config.http.served_model_name or config.model.model or "the embedded model"
        return _Server(config, JoinedCluster(config), name).run()
    check_private(config)
    with reserve_port(config.http.host, config.http.port):
        source, draft = config.model.to_source(), config.speculation.draft
        name = config.http.served_model_name or resolve(source).model_name
        sources = [source]
        if draft is not None:
            sources.append(draft.to_source())
            resolve(sources[1])
        cluster = PrivateCluster(config, choose_edge(config.deployment))
        return _Server(config, cluster, name, HeaderCheck(*sources)).run()


def with_absolute_paths(config: AppConfig) -> AppConfig:
    """The configuration for processes that run in other folders: names of local files in full."""
    http, speculation = config.http, config.speculation
    update: dict[str, Any] = {"model": _with_absolute_files(config.model)}
    if speculation.draft is not None:
        draft = _with_absolute_files(speculation.draft)
        update["speculation"] = speculation.model_copy(update={"draft": draft})
    keys = tuple(_absolute(key) for key in http.api_keys)
    log_file = http.request_logging_file and str(Path(http.request_logging_file).expanduser().absolute())
    update["http"] = http.model_copy(update={"api_keys": keys, "request_logging_file": log_file})
    return config.model_copy(update=update)


def _with_absolute_files(model: ModelConfig) -> ModelConfig:
    local: dict[str, Any] = {
        key: _absolute(value)
        for key in ("model", "tokenizer", "chat_template", "jinja_explicit", "hf_cache", "token_source")
        if (value := getattr(model, key)) is not None
    }
    if (isq := model.isq) is not None:
        paths = {
            key: value for key in ("imatrix", "calibration_file", "topology", "cache") if (value := getattr(isq, key))
        }
        # The cache's folder need not be there yet.
        full = {key: str(Path(value).expanduser().absolute()) for key, value in paths.items()}
        local["isq"] = isq.model_copy(update=full)
    return model.model_copy(update=local)


def _absolute(value: str) -> str:
    """value, made absolute if it names a file or folder that is there, by itself or as `path:FILE`."""
    prefix = "path:" if value.startswith("path:") else ""
    try:
        path = Path(value.removeprefix(prefix)).expanduser()
        return prefix + str(path.absolute()) if path.exists() else value
    except OSError:  # too long for a name: a template, say
        return value


def _application(config: AppConfig, surroundings: Surroundings) -> Any:
    from deployments.draft import Draft
    from deployments.ingress import Ingress
    from deployments.preprocessor import Preprocessor
    from deployments.target import Target

    def bind(deployment: Any, options: Callable[..., dict[str, Any]], *more: Any) -> Any:
        return deployment.options(**options(config, is_private=surroundings.is_private)).bind(
            config, surroundings, *more
        )

    preprocessor = bind(Preprocessor, preprocessor_options)
    draft = () if config.speculation.draft is None else (bind(Draft, draft_options),)
    target = bind(Target, target_options, *draft)
    return bind(Ingress, ingress_options, _build_asgi, preprocessor, target, *draft)


def _build_asgi(get_backend: Callable[[], Backend], config: HttpConfig, metrics: HttpMetrics) -> Any:
    return build_asgi(get_backend, config, metrics=metrics)


class HeaderCheck:
    """Looks whether the models' files can be loaded, in a process of its own while Ray starts: it needs torch."""

    def __init__(self, *sources: ModelSource) -> None:
        command = [sys.executable, "-m", "serve_app.loaders.check"]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=subprocess.DEVNULL, stderr=pipe, text=True)
        assert self._process.stdin is not None
        json.dump([asdict(source) for source in sources], self._process.stdin)
        self._process.stdin.close()
        self._sentence = ""
        self._thread = threading.Thread(target=self._read, name="header check", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stderr is not None
        lines = self._process.stderr.read().strip().splitlines()
        # A check that fails in another way says nothing: the target will.
        if self._process.wait() == EXIT_USAGE and lines:
            self._sentence = lines[-1]

    def wait(self) -> None:
        """Waits for the end of the check. Raises ModelFileError if it has found something."""
        self._thread.join()
        if self._sentence:
            raise ModelFileError(self._sentence)


class _Server:
    """The server process: starts the cluster and the application, watches, and ends both."""

    def __init__(
        self, config: AppConfig, cluster: Cluster, model_name: str, header_check: HeaderCheck | None = None
    ) -> None:
        self._config = config
        self._header_check = header_check
        self._cluster = cluster
        self._model_name = model_name
        self._is_started = False
        self._is_serving = False
        self._is_stopping = False
        self._exit_code = EXIT_USAGE
        # An exit code or what went wrong. A SimpleQueue may be filled from a signal handler.
        self._events: queue.SimpleQueue[int | Exception] = queue.SimpleQueue()

    def run(self) -> int:
        self._take_signals()
        try:
            self._cluster.start(self._when_up)
            self._exit_code = self._serve()
        except KeyboardInterrupt:
            self._exit_code = EXIT_INTERRUPTED
        finally:
            self._end()
        return self._exit_code

    def _when_up(self) -> None:
        """Ray runs, and nothing of ours listens yet."""
        # Ray puts its own handler in the place of ours.
        self._take_signals()
        self._is_started = True
        if self._header_check is not None:
            self._header_check.wait()

    def _serve(self) -> int:
        # Calls to a cluster that is dying do not come back: this thread makes none, and waits for whatever is first.
        threading.Thread(target=self._deploy_and_watch, name="watch", daemon=True).start()
        event = self._events.get()
        if isinstance(event, Exception):
            raise event
        return event

    def _deploy_and_watch(self) -> None:
        from deployments import application

        try:
            application.deploy(_application(self._config, self._cluster.surroundings))
            self._wait_until_running()
        except Exception as error:
            self._events.put(error)
            return
        self._is_serving = True
        http = self._config.http
        host = f"[{http.host}]" if ":" in http.host else http.host
        print(f"Sirocco serves {self._model_name} at http://{host}:{http.port}/v1", flush=True)
        try:
            self._watch()
        except Exception as error:  # whatever Ray raises when its cluster is gone
            log.error("The Ray cluster is lost: %s", error)
            self._events.put(EXIT_FAILED)

    def _wait_until_running(self) -> None:
        from deployments import application

        timeout_s = self._config.deployment.startup_timeout_s
        end_s = time.monotonic() + timeout_s
        while (progress := application.progress()).state is not application.State.RUNNING:
            if progress.state is application.State.FAILED:
                if progress.is_our_sentence:
                    raise ModelFileError(progress.message)
                raise LaunchError(f"The application cannot be started: {progress.message}")
            if time.monotonic() > end_s:
                raise LaunchError(f"The application is not ready after {timeout_s:g} s (--startup-timeout).")
            time.sleep(_START_POLL_S)

    def _watch(self) -> None:
        from deployments import application

        is_well = True
        while True:
            time.sleep(_WATCH_POLL_S)
            progress = application.progress()
            was_well, is_well = is_well, progress.state is not application.State.FAILED
            if was_well and not is_well:
                log.warning("Serve reports: %s", progress.message)
            elif is_well and not was_well:
                log.info("Serve reports no trouble any more.")

    def _take_signals(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self._is_started or self._is_stopping:
            # While starting, and for who asks twice: at once.
            raise KeyboardInterrupt
        self._is_stopping = True
        self._events.put(EXIT_OK if self._is_serving else EXIT_INTERRUPTED)

    def _end(self) -> None:
        from deployments import application

        try:
            has_ended = self._is_started and self._cluster.stop(application.end_streams)
        except KeyboardInterrupt:
            has_ended = False
        if not has_ended:
            # Ray would try once more while Python exits, and hang or crash there.
            atexit.register(_exit_at_once, self._exit_code)
            self._cluster.kill()


def _exit_at_once(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
