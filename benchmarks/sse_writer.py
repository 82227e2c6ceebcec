"""CPU time per streamed token of the HTTP side: routes, frames and socket writes under a real uvicorn, no engine.

A pump task pushes one token to each stream a step, as the token pump does. The client, in a process of its own, reads
raw sockets. Prints µs of this process's CPU time per token, user and system.

    python benchmarks/sse_writer.py [--streams 32] [--tokens 400] [--step-ms 10]
"""

import argparse
import asyncio
import json
import multiprocessing
import resource
import socket
import time
from typing import Any

import uvicorn

from serve_app.api.backend import DeltaSink, Health, ModelCard, Started
from serve_app.api.routes import build_asgi
from serve_app.config import HttpConfig
from serve_app.messages import Finish, PromptInput, TokenDelta, Usage


class NullBackend:
    """Waits until all streams are there, then steps them together."""

    def __init__(self, num_streams: int, num_tokens: int, step_s: float) -> None:
        self._num_streams = num_streams
        self._num_tokens = num_tokens
        self._step_s = step_s
        self._streams: list[tuple[str, DeltaSink, asyncio.Future[None]]] = []
        self.cpu_s = 0.0
        self.wall_s = 0.0

    async def generate(self, prompt: PromptInput, sink: DeltaSink) -> None:
        done = asyncio.get_running_loop().create_future()
        sink.begin(Started(4, [1, 2, 3, 4]))
        self._streams.append((prompt.request_id, sink, done))
        if len(self._streams) == self._num_streams:
            await self._run()
        await done

    async def _run(self) -> None:
        # One null round first: what a step costs without any stream, to be taken off.
        idle = await self._steps([])
        before, began = _cpu_s(), time.monotonic()
        await self._steps(self._streams)
        self.cpu_s = _cpu_s() - before - idle
        self.wall_s = time.monotonic() - began
        for _, _, done in self._streams:
            done.set_result(None)

    async def _steps(self, streams: list[tuple[str, DeltaSink, asyncio.Future[None]]]) -> float:
        before = _cpu_s()
        for index in range(self._num_tokens):
            finish = Finish("length", Usage(4, self._num_tokens)) if index + 1 == self._num_tokens else None
            for name, sink, _ in streams:
                sink.push([TokenDelta(name, 0, index, [index], " token", None, finish)])
            await asyncio.sleep(self._step_s)
        return _cpu_s() - before

    async def models(self) -> list[ModelCard]:
        return [ModelCard("null", 0, 4096)]

    async def health(self) -> Health:
        return Health(True)

    async def metrics(self) -> bytes:
        return b""


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def read_streams(port: int, num_streams: int, num_tokens: int) -> None:
    """Opens the streams and reads them all to their end."""

    async def read_one() -> None:
        body = json.dumps({"messages": "hi", "stream": True, "max_tokens": num_tokens}).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        while await reader.read(1 << 16):
            pass
        writer.close()

    async def read_all() -> None:
        await asyncio.gather(*(read_one() for _ in range(num_streams)))

    asyncio.run(read_all())


async def measure(num_streams: int, num_tokens: int, step_s: float, loop: str) -> dict[str, Any]:
    backend = NullBackend(num_streams, num_tokens, step_s)
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    app = build_asgi(lambda: backend, HttpConfig())
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    port = listener.getsockname()[1]
    client = multiprocessing.get_context("spawn").Process(target=read_streams, args=(port, num_streams, num_tokens))
    client.start()
    while client.is_alive():
        await asyncio.sleep(0.05)
    server.should_exit = True
    await serving
    tokens = num_streams * num_tokens
    return {
        "streams": num_streams,
        "step_ms": step_s * 1e3,
        "loop": loop,
        "cpu_us_per_token": round(backend.cpu_s / tokens * 1e6, 2),
        "tokens_per_s": round(tokens / backend.wall_s),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--step-ms", type=float, nargs="*", default=[10.0, 0.0])
    arguments = parser.parse_args()
    import uvloop

    for step_ms in arguments.step_ms:
        for name, runner in (("uvloop", uvloop.run), ("asyncio", asyncio.run)):
            print(json.dumps(runner(measure(arguments.streams, arguments.tokens, step_ms / 1e3, name))))


if __name__ == "__main__":
    main()
