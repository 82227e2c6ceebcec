"""The real application as a process, for the tests that need it whole."""

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from typing import Any

import openai
import psutil

START_S = 180.0
SHUTDOWN_S = 10.0


def free_port() -> int:
    """A port below those that the kernel gives away, so that nobody gets it before it is used."""
    while True:
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", random.SystemRandom().randrange(20_000, 32_768)))
            return int(probe.getsockname()[1])


class Server:
    """`python -m serve_app …`, bound to two CPUs, in a process group of its own as a terminal would start it."""

    def __init__(self, *arguments: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "serve_app", "--port", str(self.port), *arguments]
        cpus = set(sorted(os.sched_getaffinity(0))[:2])
        self.output: list[str] = []
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: os.sched_setaffinity(0, cpus),
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.health_seen: list[int] = []

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.output.extend(self.process.stdout)

    def all_output(self) -> str:
        """Everything it said; for a process that has ended."""
        self._reader.join(5)
        return "".join(self.output)

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(self.url + path, timeout=10) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def post(self, path: str, **body: Any) -> tuple[int, str]:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"content-type": "application/json"}, method="POST"
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def wait(self) -> "Server":
        end = time.monotonic() + START_S
        while time.monotonic() < end:
            assert self.process.poll() is None, "".join(self.output)
            code, _ = self.get("/health")
            if code not in self.health_seen:
                self.health_seen.append(code)
            if code == 200:
                return self
            time.sleep(0.2)
        raise AssertionError(f"not ready after {START_S} s: {''.join(self.output)}")

    def processes(self) -> list[psutil.Process]:
        main = psutil.Process(self.process.pid)
        return [main, *main.children(recursive=True)]

    def metric(self, name: str) -> float:
        found = re.search(rf"^{name} (\S+)$", self.get("/metrics")[1], re.MULTILINE)
        assert found is not None, name
        return float(found[1])

    def metrics_of(self, name: str) -> dict[str, float]:
        """A metric with one label: label value → number."""
        found = re.findall(rf'^{name}{{\w+="(.+)"}} (\S+)$', self.get("/metrics")[1], re.MULTILINE)
        return {label: float(value) for label, value in found}

    def until(self, name: str, value: float, timeout_s: float = 10.0) -> None:
        end = time.monotonic() + timeout_s
        while self.metric(name) != value:
            assert time.monotonic() < end, f"{name} is {self.metric(name)}, not {value}"
            time.sleep(0.02)

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def end(self, number: int = signal.SIGTERM) -> int:
        """The exit code; nothing of the server may be left after it."""
        everyone = self.processes()
        began = time.monotonic()
        os.killpg(self.process.pid, number)
        code = self.process.wait(SHUTDOWN_S)
        assert time.monotonic() - began <= SHUTDOWN_S
        _, alive = psutil.wait_procs(everyone, timeout=1)
        names = [process.name() for process in alive]
        for process in alive:
            process.kill()
        assert not names, f"left behind: {names}"
        self._reader.join(5)
        return code

    def kill(self) -> None:
        if self.process.poll() is None:
            everyone = self.processes()
            for process in everyone:
                process.kill()
            psutil.wait_procs(everyone, timeout=5)
