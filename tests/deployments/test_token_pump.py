"""The token path between two event-loop ends, over real sockets and without Ray."""

import asyncio
import os
import stat
import threading
from collections.abc import Sequence

import pytest

from deployments.pump_receiver import TokenReceiver
from deployments.pump_sender import TokenSender
from deployments.token_pump import (
    HEARTBEAT,
    SILENCE_TICKS,
    TOKENS,
    BadMessage,
    pack,
    pack_tokens,
    unpack,
    unpack_delta,
)
from serve_app.api.backend import Started
from serve_app.errors import EngineFailed, Unavailable
from serve_app.messages import Finish, TokenDelta, TokenLogprob, Usage

TICK_S = 0.02


class Sink:
    """Collects deltas; `stuck` makes them all count as not taken."""

    def __init__(self) -> None:
        self.deltas: list[TokenDelta] = []
        self.stuck = False

    def begin(self, started: Started) -> None:
        pass

    def push(self, deltas: Sequence[TokenDelta]) -> None:
        self.deltas.extend(deltas)

    @property
    def backlog(self) -> int:
        return len(self.deltas) if self.stuck else 0


class Pair:
    """A receiver and a sender on the running loop."""

    def __init__(self, *, window: int = 256, tcp: bool = False) -> None:
        loop = asyncio.get_running_loop()
        self.paused: list[str] = []
        self.resumed: list[str] = []
        host = "127.0.0.1" if tcp else None
        self.receiver = TokenReceiver("ingress", "node-a", loop, tcp_host=host, tick_s=TICK_S, window=window)
        self.sender = TokenSender(
            "target",
            "node-b" if tcp else "node-a",
            loop,
            pause=self.paused.append,
            resume=self.resumed.append,
            tick_s=TICK_S,
            window=window,
        )

    async def __aenter__(self) -> "Pair":
        return self

    async def __aexit__(self, *_: object) -> None:
        self.sender.stop()
        self.receiver.stop()


def delta(request_id: str, index: int, *, choice: int = 0, finish: str | None = None) -> TokenDelta:
    end = None if finish is None else Finish(finish, Usage(3, index + 1))  # type: ignore[arg-type]
    return TokenDelta(request_id, choice, index, [index], f"w{index}", finish=end)


async def until(condition, timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


def test_every_field_survives_the_wire():
    logprobs = [TokenLogprob(5, -0.5, [(5, -0.5), (7, -1.25)], "a", ["a", "b"])]
    first = [TokenLogprob(1, None, [], "x", [])]
    full = TokenDelta("r", 1, 4, [5], "a", logprobs, Finish("stop", Usage(3, 5, 2, 4, 1), "END"), first)
    several = TokenDelta("r", 1, 5, [5, 7], "ab", [*logprobs, TokenLogprob(7, -2.0, [(8, -0.1)], "b", ["c"])])
    plain = TokenDelta("r", 0, 0, [9, 10], "héé\U0001f600")
    kind, epoch, (sequence, rows) = unpack(pack_tokens(11, 3, [plain, full, several]))
    assert (kind, epoch, sequence) == (TOKENS, 11, 3)
    assert [unpack_delta(row) for row in rows] == [plain, full, several]


def test_an_error_never_travels_the_token_path():
    failed = TokenDelta("r", 0, 0, [], "", finish=Finish("error", Usage(1, 0), error=Unavailable("too late")))
    _, _, (_, rows) = unpack(pack_tokens(1, 0, [failed]))
    assert unpack_delta(rows[0]).finish is None


@pytest.mark.parametrize(
    "message", [b"", b"\xc1", b"\x01", b"\x92\xa1x\x01", b"\x91\x01", b"\xdd\xff\xff\xff\xff", b"\x80"]
)
def test_bytes_that_are_no_message_are_refused(message):
    with pytest.raises(BadMessage):
        unpack(message)


@pytest.mark.parametrize("row", [[], ["r"], ["r", 0, 0, [1], "t", 5, None, None], 7, ["r", 0, 0, [1], "t", None]])
def test_rows_that_are_no_delta_are_refused(row):
    with pytest.raises(BadMessage):
        unpack_delta(row)


@pytest.mark.parametrize("tcp", [False, True])
async def test_tokens_arrive_in_order_and_both_ends_see_the_end(tcp):
    async with Pair(tcp=tcp) as pair:
        sinks = {name: Sink() for name in ("a", "b")}
        streams = {name: pair.receiver.open(name, sink, 2) for name, sink in sinks.items()}
        ends = {name: pair.sender.open(name, pair.receiver.address, 2) for name in sinks}

        def engine() -> None:
            for index in range(50):
                last = "length" if index == 49 else None
                pair.sender.publish([delta(n, index, choice=c, finish=last) for n in sinks for c in (0, 1)])

        thread = threading.Thread(target=engine)
        thread.start()
        async with asyncio.timeout(10):
            await asyncio.gather(*(stream.finished for stream in streams.values()))
            finishes = await ends["a"]
        thread.join()
        assert [f.usage.completion_tokens for f in finishes] == [50, 50]
        for sink in sinks.values():
            for choice in (0, 1):
                mine = [d for d in sink.deltas if d.choice == choice]
                assert [d.index for d in mine] == list(range(50))
                assert "".join(d.text for d in mine) == "".join(f"w{i}" for i in range(50))


async def test_the_unix_socket_is_private():
    async with Pair() as pair:
        path = pair.receiver.address.ipc_endpoint.removeprefix("ipc://")
        assert stat.S_IMODE(os.stat(os.path.dirname(path)).st_mode) == 0o700
        assert pair.receiver.address.tcp_endpoint == ""
    assert not os.path.exists(os.path.dirname(path))


async def test_steps_of_several_tokens_leave_no_gap():
    async with Pair() as pair:
        sink = Sink()
        stream = pair.receiver.open("r", sink, 1)
        pair.sender.open("r", pair.receiver.address, 1)
        for index, ids, finish in [(0, [7], None), (1, [8, 9, 10], None), (4, [11, 12], Finish("stop", Usage(1, 6)))]:
            pair.sender.publish([TokenDelta("r", 0, index, ids, "x" * len(ids), finish=finish)])
        await asyncio.wait_for(stream.finished, 5)
        assert [token_id for d in sink.deltas for token_id in d.token_ids] == [7, 8, 9, 10, 11, 12]
        assert "".join(d.text for d in sink.deltas) == "xxxxxx"


@pytest.mark.parametrize("index", [2, 3, 5])
async def test_a_step_of_several_tokens_that_is_not_the_next_is_a_loss(index):
    async with Pair() as pair:
        stream = pair.receiver.open("r", Sink(), 1)
        pair.sender.open("r", pair.receiver.address, 1)
        pair.sender.publish([TokenDelta("r", 0, 0, [1, 2, 3, 4], "abcd")])
        pair.sender.publish([TokenDelta("r", 0, index, [5], "e")])
        with pytest.raises(EngineFailed, match="lost"):
            await asyncio.wait_for(stream.finished, 5)


async def test_a_gap_ends_the_stream_with_an_error():
    async with Pair() as pair:
        sink, other = Sink(), Sink()
        stream, healthy = pair.receiver.open("r", sink, 1), pair.receiver.open("s", other, 1)
        for name in ("r", "s"):
            pair.sender.open(name, pair.receiver.address, 1)
        pair.sender.publish([delta("r", 0), delta("s", 0)])
        pair.sender.publish([delta("r", 2), delta("s", 1, finish="stop")])
        with pytest.raises(EngineFailed, match="lost"):
            await asyncio.wait_for(stream.finished, 5)
        await asyncio.wait_for(healthy.finished, 5)
        assert [d.index for d in sink.deltas] == [0]


async def test_a_lost_message_ends_all_streams_of_that_target():
    async with Pair() as pair:
        streams = [pair.receiver.open(name, Sink(), 1) for name in "rs"]
        for name in "rs":
            pair.sender.open(name, pair.receiver.address, 1)
        pair.sender.publish([delta("r", 0), delta("s", 0)])
        await until(lambda: all(s.num_pushed for s in streams))
        link = next(iter(pair.sender._links.values()))
        link.sequence += 1
        pair.sender.publish([delta("r", 1)])
        for stream in streams:
            with pytest.raises(EngineFailed, match="1 messages from the engine were lost"):
                await asyncio.wait_for(stream.finished, 5)


async def test_a_silent_target_ends_its_streams():
    async with Pair() as pair:
        stream = pair.receiver.open("r", Sink(), 1)
        pair.sender.open("r", pair.receiver.address, 1)
        pair.sender.publish([delta("r", 0)])
        await until(lambda: stream.num_pushed == 1)
        await asyncio.sleep(TICK_S * SILENCE_TICKS * 1.5)
        assert not stream.finished.done(), "heartbeats keep a quiet stream alive"
        pair.sender._ticker.cancel()
        with pytest.raises(EngineFailed, match="silent"):
            await asyncio.wait_for(stream.finished, 5)


async def test_a_silent_ingress_has_its_requests_aborted():
    async with Pair() as pair:
        pair.receiver.open("r", Sink(), 1)
        end = pair.sender.open("r", pair.receiver.address, 1)
        pair.sender.publish([delta("r", 0)])
        await asyncio.sleep(TICK_S * SILENCE_TICKS * 1.5)
        assert not end.done()
        pair.receiver._ticker.cancel()
        with pytest.raises(EngineFailed, match="lost"):
            await asyncio.wait_for(end, 5)


async def test_messages_of_another_life_are_dropped():
    async with Pair() as pair:
        sink = Sink()
        stream = pair.receiver.open("r", sink, 1)
        pair.sender.open("r", pair.receiver.address, 1)
        link = next(iter(pair.sender._links.values()))
        link.socket.send((pack(HEARTBEAT, pair.receiver.address.epoch + 1, 0),))
        link.socket.send((b"\xc1 garbage",))
        link.socket.send((pack(TOKENS, pair.receiver.address.epoch + 1, 0, [["r", 0, 0, [1], "stale"]]),))
        pair.sender.publish([delta("r", 0, finish="stop")])
        await asyncio.wait_for(stream.finished, 5)
        assert [d.text for d in sink.deltas] == ["w0"]


async def test_a_slow_client_pauses_only_its_own_request():
    async with Pair(window=8) as pair:
        slow, fast = Sink(), Sink()
        slow.stuck = True
        slow_stream = pair.receiver.open("slow", slow, 1)
        fast_stream = pair.receiver.open("fast", fast, 1)
        for name in ("slow", "fast"):
            pair.sender.open(name, pair.receiver.address, 1)
        for index in range(40):
            names = ["fast"] if pair.paused.count("slow") else ["fast", "slow"]
            pair.sender.publish([delta(n, index) for n in names])
            await until(lambda i=index: len(fast.deltas) == i + 1)
            await asyncio.sleep(0.002)
        sent = len(slow.deltas)
        assert sent == 8
        assert pair.paused.count("slow") == 1
        assert not pair.resumed
        slow.stuck = False
        await until(lambda: pair.resumed == ["slow"])
        pair.sender.publish([delta("slow", sent, finish="stop"), delta("fast", 40, finish="stop")])
        await asyncio.wait_for(asyncio.gather(slow_stream.finished, fast_stream.finished), 5)
        assert pair.paused == ["slow"]


async def test_a_failing_writer_ends_its_request_only():
    class Broken(Sink):
        def push(self, deltas: Sequence[TokenDelta]) -> None:
            raise ValueError("no")

    async with Pair() as pair:
        broken, healthy = pair.receiver.open("r", Broken(), 1), pair.receiver.open("s", Sink(), 1)
        for name in "rs":
            pair.sender.open(name, pair.receiver.address, 1)
        pair.sender.publish([delta("r", 0, finish="stop"), delta("s", 0, finish="stop")])
        with pytest.raises(EngineFailed, match="ValueError"):
            await asyncio.wait_for(broken.finished, 5)
        await asyncio.wait_for(healthy.finished, 5)


async def test_a_failed_request_raises_at_the_target_and_stays_open_at_the_ingress():
    async with Pair() as pair:
        stream = pair.receiver.open("r", Sink(), 2)
        end = pair.sender.open("r", pair.receiver.address, 2)
        error = Unavailable("waited too long", retry_after_s=3)
        pair.sender.publish([TokenDelta("r", 0, 0, [], "", finish=Finish("error", Usage(1, 0), error=error))])
        with pytest.raises(Unavailable, match="waited too long"):
            await asyncio.wait_for(end, 5)
        await asyncio.sleep(0.05)
        assert not stream.finished.done(), "the call that stays open brings the error"


@pytest.mark.parametrize("has_begun", [True, False])
async def test_a_request_that_the_ingress_gave_up_ends_at_the_target(has_begun):
    async with Pair() as pair:
        stream = pair.receiver.open("r", Sink(), 1)
        end = pair.sender.open("r", pair.receiver.address, 1)
        if has_begun:
            pair.sender.publish([delta("r", 0)])
            await until(lambda: stream.num_pushed == 1)
        pair.receiver.close("r")
        if not has_begun:
            pair.sender.publish([delta("r", 0)])
        with pytest.raises(Unavailable, match="Nobody waits"):
            await asyncio.wait_for(end, 5)


async def test_a_finished_request_is_not_cancelled():
    async with Pair() as pair:
        stream, other = pair.receiver.open("r", Sink(), 1), pair.receiver.open("s", Sink(), 1)
        ends = [pair.sender.open(name, pair.receiver.address, 1) for name in "rs"]
        pair.sender.publish([delta("r", 0, finish="stop"), delta("s", 0)])
        await asyncio.wait_for(stream.finished, 5)
        pair.receiver.close("r")
        pair.sender.publish([delta("s", 1, finish="stop")])
        await asyncio.wait_for(other.finished, 5)
        assert [len(await end) for end in ends] == [1, 1]


async def test_closed_requests_leave_nothing_behind():
    async with Pair() as pair:
        pair.receiver.open("r", Sink(), 1)
        pair.sender.open("r", pair.receiver.address, 1)
        pair.sender.publish([delta("r", 0)])
        await until(lambda: any(s.requests for s in pair.receiver._sources.values()))
        pair.receiver.close("r")
        pair.sender.close("r")
        pair.sender.publish([delta("r", 1)])
        await asyncio.sleep(0.05)
        assert pair.receiver.num_requests == 0
        assert not any(s.requests for s in pair.receiver._sources.values())
        assert not any(link.requests for link in pair.sender._links.values())
