"""Milliseconds from a client's disappearance to its blocks being free, for each process that may face the clients.

    python -m benchmarks.disconnect [--tries 40] [--proxy direct,haproxy,python]

A client starts a long stream, reads a few tokens and closes its socket. /metrics, which asks the engine itself, is then
read over and over until no block is in use; the time includes that reading, whose own duration is printed beside it.
"""

import argparse
import asyncio
import statistics
import time
import urllib.request

from benchmarks.overhead import Server, body


def blocks_used(port: int) -> float:
    """KV blocks held by requests, as the engine says now."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as response:
        for line in response.read().decode().splitlines():
            if line.startswith("sirocco_kv_blocks_used "):
                return float(line.split()[1])
    raise AssertionError("no such metric")


async def leave_a_stream(port: int) -> None:
    """Reads a few tokens of a long stream and is gone."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    content = body(480)
    lines = ["POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    writer.write("\r\n".join([*lines, f"Content-Length: {len(content)}", "", ""]).encode() + content)
    received = b""
    while received.count(b"data: {") < 5:
        received += await reader.read(4096)
    writer.transport.abort()


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=40)
    parser.add_argument("--proxy", default="direct,haproxy,python")
    args = parser.parse_args()
    print(f"{'proxy':10} {'p50 ms':>8} {'p95 ms':>8} {'max ms':>8} {'one reading ms':>15}")
    for proxy in args.proxy.split(","):
        server = Server(["--proxy", proxy])
        taken, readings = [], []
        for _ in range(args.tries + 2):
            asyncio.run(leave_a_stream(server.port))
            start = time.perf_counter()
            while True:
                reading = time.perf_counter()
                is_free = blocks_used(server.port) == 0
                readings.append((time.perf_counter() - reading) * 1e3)
                if is_free:
                    break
            taken.append((time.perf_counter() - start) * 1e3)
        taken = taken[2:]
        middle = f"{statistics.median(taken):8.1f} {percentile(taken, 0.95):8.1f} {max(taken):8.1f}"
        print(f"{proxy:10} {middle} {statistics.median(readings):15.1f}", flush=True)
        server.stop()


if __name__ == "__main__":
    main()
