"""What every replica does first in its constructor."""

import contextlib
import logging
from dataclasses import dataclass
from typing import Any

from deployments.log_pipe import FORMAT, PipeHandler
from serve_app.config import AppConfig, apply_log_level

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """Where the replicas live.

    is_private: on a cluster of this node alone, started by our own server. is_listening: the ingress replicas serve
    HTTP themselves. directory: of the server's files, gone when it ends. log_pipe: where the server takes log lines;
    None: standard error, which Ray takes.
    """

    is_private: bool = False
    is_listening: bool = False
    directory: str | None = None
    log_pipe: str | None = None


def prepare_process(config: AppConfig, surroundings: Surroundings) -> None:
    """Sends our log lines where they are read; keeps a private cluster's replica off the network."""
    apply_log_level(config.log)
    handler: logging.Handler | None = None
    if surroundings.log_pipe is not None:
        with contextlib.suppress(OSError):  # the server is gone already
            handler = PipeHandler(surroundings.log_pipe)
    if handler is None:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(FORMAT))
    for name in ("serve_app", "deployments"):
        ours = logging.getLogger(name)
        ours.handlers = [handler]
        ours.propagate = False
    if surroundings.is_private:
        bind_replica_server_to_loopback()


def bind_replica_server_to_loopback() -> None:
    """Makes this replica's server for calls from other replicas listen on 127.0.0.1 instead of all interfaces.

    For a cluster of one node only. Serve has no switch for it: each replica binds `[::]:0` once its constructor has
    run, so this is called from the constructor. A test looks at the sockets of the running application.
    """
    from ray.serve._private import replica

    module: Any = replica
    original = getattr(module, "add_port_to_grpc_server", None)
    if original is None:
        log.warning("this version of Ray binds the replicas' servers in another way: they may listen on all interfaces")
        return

    def add_port(server: Any, address: str) -> Any:
        return original(server, address.replace("[::]", "127.0.0.1"))

    module.add_port_to_grpc_server = add_port
