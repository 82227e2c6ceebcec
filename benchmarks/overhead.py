"""What serving costs on top of the engine: tokens/s end to end over HTTP against the engine alone in this process, and
CPU microseconds per token by process.

    python -m benchmarks.overhead [--streams 32] [--tokens 200] [--rounds 3] [-- SERVER ARGUMENTS]

The server is started as its users start it (python -m serve_app) on the embedded model; the client is a process of its
own and is not counted. Engine and server are measured in turn, round by round, so that their ratio holds when the
machine's speed drifts.
"""

import argparse
import asyncio
import json
import os
import re
import resource
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import psutil

PROMPT = "Once upon a time"
READY_TIMEOUT_S = 120.0


@dataclass
class Round:
    """Tokens, seconds, and CPU seconds by kind of process."""

    tokens: int
    seconds: float
    cpu_s: Counter[str]


def body(tokens: int, prompt: str | list[int] = PROMPT, **further: Any) -> bytes:
    """One streaming completion of exactly `tokens` tokens. further: fields of the request."""
    fields = {
        "model": "default",
        "prompt": prompt,
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        **further,
    }
    return json.dumps(fields).encode()


async def stream(port: int, content: bytes) -> int:
    """Reads one stream to its end; the completion tokens that its usage states."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    lines = ["POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    head = "\r\n".join([*lines, f"Content-Length: {len(content)}", "", ""])
    writer.write(head.encode() + content)
    received = b""
    while b"data: [DONE]" not in received[-64:]:
        part = await reader.read(65536)
        assert part, f"the stream ended early: {received[-300:]!r}"
        received = received[-2000:] + part
    writer.close()
    found = re.findall(rb'"completion_tokens": ?(\d+)', received)
    assert found, received[-500:]
    return int(found[-1])


def run_client(port: int, contents: list[bytes]) -> tuple[int, float]:
    """All streams at once: (tokens, seconds). Runs in a process of its own."""

    async def run() -> tuple[int, float]:
        start = time.perf_counter()
        counts = await asyncio.gather(*(stream(port, content) for content in contents))
        return sum(counts), time.perf_counter() - start

    return asyncio.run(run())


def process_kind(process: psutil.Process) -> str:
    """What a process is in the table: a replica's deployment, the proxy, or one of Ray's own."""
    line = " ".join(process.cmdline())
    replica = re.search(r"ServeReplica:\w+:(\w+)", line)
    if replica:
        return replica.group(1)
    if "haproxy" in process.name():
        return "HAProxy"
    if "ProxyActor" in line or "HAProxyManager" in line:
        return "proxy actor"
    return "Ray and the rest"


def cpu_by_kind(root: psutil.Process) -> dict[psutil.Process, tuple[str, float]]:
    """CPU seconds so far of a server's processes."""
    found = {}
    for process in [root, *root.children(recursive=True)]:
        try:
            times = process.cpu_times()
            found[process] = (process_kind(process), times.user + times.system)
        except psutil.NoSuchProcess:
            continue
    return found


class Server:
    """The server under test, started and stopped as a user would."""

    def __init__(self, arguments: list[str]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        start = time.perf_counter()
        command = [sys.executable, "-m", "serve_app", "--port", str(self.port), "--log", "warn", *arguments]
        self._process = subprocess.Popen(command)
        try:
            self._wait_ready()
        except BaseException:
            self.stop()
            raise
        self.start_s = time.perf_counter() - start
        self._root = psutil.Process(self._process.pid)

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < deadline:
            assert self._process.poll() is None, "the server ended"
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2):
                    return
            except (OSError, urllib.error.HTTPError):
                time.sleep(0.2)
        raise TimeoutError("the server did not become ready")

    def measure(self, pool: ProcessPoolExecutor, contents: list[bytes]) -> Round:
        """One round: a stream for each body."""
        cpu_s = self.watch_cpu()
        count, seconds = pool.submit(run_client, self.port, contents).result()
        return Round(count, seconds, cpu_s())

    def watch_cpu(self) -> Callable[[], Counter[str]]:
        """A function that gives the processor seconds of each kind of process since now."""
        before = cpu_by_kind(self._root)

        def since() -> Counter[str]:
            cpu_s: Counter[str] = Counter()
            for process, (kind, spent) in cpu_by_kind(self._root).items():
                cpu_s[kind] += spent - before.get(process, (kind, 0.0))[1]
            return cpu_s

        return since

    def metrics(self) -> dict[str, float]:
        """Every line of /metrics: name with its labels → value."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=10) as response:
            lines = response.read().decode().splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[:1] != "#")}

    def stop(self) -> float:
        """Ctrl-C; seconds until the process is gone."""
        start = time.perf_counter()
        self._process.send_signal(signal.SIGINT)
        self._process.wait(60)
        return time.perf_counter() - start


class EngineAlone:
    """The same model and requests in this process, without Ray or HTTP, on the engine's own thread."""

    def __init__(self) -> None:
        from serve_app.engine.build import build_engine
        from serve_app.options import EngineConfig, ModelSource

        self._engine = build_engine(ModelSource(), EngineConfig(), self._count)
        self._left = 0
        self._engine.start()

    def _count(self, deltas: list) -> None:
        self._left -= sum(delta.finish is not None for delta in deltas)

    def measure(self, streams: int, tokens: int) -> Round:
        """One round of all requests."""
        from serve_app.messages import GenerateRequest
        from serve_app.options import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        prompt = self._engine.parts.tokenizer.encode(PROMPT)
        self._left = streams
        used = resource.getrusage(resource.RUSAGE_SELF)
        start = time.perf_counter()
        for i in range(streams):
            self._engine.add(GenerateRequest(f"{start}-{i}", prompt, params))
        while self._left:
            time.sleep(0.002)
        seconds = time.perf_counter() - start
        now = resource.getrusage(resource.RUSAGE_SELF)
        cpu_s = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
        return Round(streams * tokens, seconds, Counter({"engine alone": cpu_s}))

    def stop(self) -> None:
        self._engine.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("server", nargs="*", help="arguments for the server, behind --")
    args = parser.parse_args()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    pool = ProcessPoolExecutor(1)
    pool.submit(os.getpid).result()
    server = Server(args.server)
    print(f"server ready after {server.start_s:.1f} s")
    alone = EngineAlone()
    pairs = []
    for number in range(args.rounds + 1):
        pair = alone.measure(args.streams, args.tokens), server.measure(pool, [body(args.tokens)] * args.streams)
        if number:
            pairs.append(pair)
    report(pairs)
    alone.stop()
    print(f"\nstopped in {server.stop():.1f} s")


def report(pairs: list[tuple[Round, Round]]) -> None:
    """Medians over the rounds."""

    def rate(r: Round) -> float:
        return r.tokens / r.seconds

    alone = statistics.median(rate(a) for a, _ in pairs)
    served = statistics.median(rate(s) for _, s in pairs)
    ratio = statistics.median(rate(s) / rate(a) for a, s in pairs)
    print(f"\nengine alone {alone:8.0f} tokens/s\nover HTTP    {served:8.0f} tokens/s   ratio {ratio:.2f}\n")
    engine_us = statistics.median(a.cpu_s["engine alone"] / a.tokens * 1e6 for a, _ in pairs)
    print(f"{'process':24} CPU µs/token")
    print(f"{'engine alone':24} {engine_us:8.1f}")
    kinds = sorted({kind for _, s in pairs for kind in s.cpu_s})
    total = 0.0
    for kind in kinds:
        cost = statistics.median(s.cpu_s[kind] / s.tokens * 1e6 for _, s in pairs)
        total += cost
        print(f"{kind:24} {cost:8.1f}")
    print(f"{'all of the server':24} {total:8.1f}\n{'outside the engine':24} {total - engine_us:8.1f}")


if __name__ == "__main__":
    main()
