"""What every replica does first in its constructor."""

import logging
from typing import Any

from serve_app.config import AppConfig, apply_log_level

log = logging.getLogger(__name__)


def prepare_process(config: AppConfig, *, is_private: bool) -> None:
    """Our log lines go to standard error, which Ray carries to the driver; a private cluster stays off the network.

    is_private: the cluster is one node's, started by our own driver.
    """
    apply_log_level(config.log)
    for name in ("serve_app", "deployments"):
        ours = logging.getLogger(name)
        if not ours.handlers:
            handler = logging.StreamHandler()
            handler.setFormatter(logging.Formatter("%(levelname)s %(asctime)s %(name)s: %(message)s"))
            ours.addHandler(handler)
            ours.propagate = False
    if is_private:
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
