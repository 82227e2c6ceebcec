"""A Ray cluster that others run: the application is deployed to it and taken off it again."""

import logging
import os
import socket
from collections.abc import Callable

from deployments.actor_options import node_environment
from deployments.replica_process import Surroundings
from serve_app.config import LOG_LEVELS, AppConfig
from serve_app.errors import LaunchError

log = logging.getLogger(__name__)

CONNECT_S = 5.0


class JoinedCluster:
    """Uses the cluster as it is: its switches hold, and are logged."""

    def __init__(self, config: AppConfig) -> None:
        self._config = config

    @property
    def surroundings(self) -> Surroundings:
        """For the replicas."""
        return Surroundings()

    def start(self, when_up: Callable[[], None]) -> None:
        """Calls when_up once the cluster is joined, before Serve starts. Raises LaunchError if it cannot be reached."""
        address = self._config.deployment.ray_address
        assert address is not None
        _check_reachable(address)
        import ray
        from ray import serve

        try:
            ray.init(address=address, logging_level=LOG_LEVELS[self._config.log])
        except Exception as error:  # Ray raises all kinds of them
            raise LaunchError(f"The Ray cluster at {address} cannot be joined: {error}") from error
        when_up()
        http = self._config.http
        serve.start(proxy_location="EveryNode", http_options={"host": http.host, "port": http.port})
        self._log_environment()

    def _log_environment(self) -> None:
        import ray

        wanted = node_environment(self._config)

        def look() -> dict[str, str | None]:
            return {name: os.environ.get(name) for name in wanted}

        found: dict[str, str | None] = ray.get(ray.remote(num_cpus=0)(look).remote())
        for name, value in found.items():
            shown = "not set" if value is None else value
            remark = (
                "" if value == wanted[name] else f" ({wanted[name]} is recommended; it must be set before Ray starts)"
            )
            log.info("the cluster has %s: %s%s", name, shown, remark)

    def stop(self, end_streams: Callable[[float], None]) -> bool:
        """Takes the application off the cluster; Serve lets open requests end first."""
        import ray
        from ray import serve

        from deployments.application import APPLICATION

        serve.delete(APPLICATION)
        ray.shutdown()
        return True

    def kill(self) -> None:
        """Leaves at once; the application stays, as it would if this machine failed."""


def _check_reachable(address: str) -> None:
    """Ray itself tries for minutes. Raises LaunchError; addresses of another form than host:port are Ray's to judge."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in host:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise LaunchError(f"The Ray cluster at {address} (--ray-address) cannot be reached: {error}.") from error
