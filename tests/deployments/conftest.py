"""The whole path from backend to engine in one process: real pump, fake engine, no Ray."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest

from deployments.pump_receiver import TokenReceiver
from deployments.serve_backend import ServeBackend
from deployments.target import TargetServer
from serve_app.config import AppConfig
from serve_app.metrics import HttpMetrics
from tests.deployments.fakes import FakeEngine, FakeReplicas


@dataclass
class Stack:
    """Backend, replicas, target and engine, connected."""

    backend: Any
    replicas: Any
    target: Any
    engine: Any
    receiver: Any


@pytest.fixture
async def stack() -> AsyncIterator[Stack]:
    engines = []

    def build(source: Any, config: Any, on_deltas: Any) -> Any:
        engines.append(FakeEngine(on_deltas))
        return engines[-1]

    target = TargetServer(AppConfig(), "target", "node", build)
    receiver = TokenReceiver("ingress", "node", asyncio.get_running_loop())
    replicas = FakeReplicas(target)
    yield Stack(
        ServeBackend(replicas, receiver, HttpMetrics(), max_requests=50), replicas, target, engines[0], receiver
    )
    target.stop()
    receiver.stop()
