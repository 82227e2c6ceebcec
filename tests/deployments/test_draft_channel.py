"""The way between a target and a draft: two processes, of which one may die, be late or come back."""

import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from deployments.draft import DraftServer
from deployments.draft_channel import DraftThread
from deployments.draft_link import ChannelLink, LinkLost
from deployments.draft_messages import MOST_IDS, Answer, Answers, Calls, pack, read_by_draft
from deployments.remote_proposer import DraftOffer, RemoteProposer
from serve_app.engine.speculation.draft_call import DraftCall, Drafted, SampledTokens, SamplingChain
from serve_app.engine.speculation.proposer import DraftWish
from serve_app.errors import EngineFailed
from tests.deployments.draft_process import CountingModel, expected, sampled

DEADLINE_S = 0.05
VOCABULARY = [b"%d" % i for i in range(600)]


class DraftProcess:
    """A draft that can be killed and started again, asked as a Serve handle would be."""

    def __init__(self, directory: Path, model: str = "counting", *, spins: bool = False) -> None:
        self._arguments = [str(directory), model, str(spins)]
        self._process: subprocess.Popen[str] | None = None
        self.path = ""
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "tests.deployments.draft_process", *self._arguments]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.path = self._process.stdout.readline().strip()

    def signal(self, number: int) -> None:
        assert self._process is not None
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._process = None

    async def open_channel(self, digest: bytes) -> DraftOffer:
        if self._process is None:
            raise ConnectionError("the replica is dead")
        return DraftOffer("node", self.path, self._process.pid, None, False)

    async def propose(
        self, client: str, calls: Sequence[DraftCall], ended: Sequence[int], limit_s: float
    ) -> list[Drafted]:
        raise AssertionError("there is a channel")


@pytest.fixture(params=[False, True], ids=["sleeps", "spins"])
def spins(request: pytest.FixtureRequest) -> bool:
    """Whether both ends of a channel wait by looking again and again."""
    return bool(request.param)


@pytest.fixture
def draft(tmp_path: Path, spins: bool) -> Iterator[DraftProcess]:
    process = DraftProcess(tmp_path, spins=spins)
    yield process
    process.kill()


Make = Callable[..., RemoteProposer]


@pytest.fixture
async def make(spins: bool) -> AsyncIterator[Make]:
    made: list[RemoteProposer] = []

    def one(draft: object, node_id: str = "node", deadline_s: float = DEADLINE_S) -> RemoteProposer:
        made.append(RemoteProposer(draft, "target", node_id, VOCABULARY, deadline_s, spins=spins))  # type: ignore[arg-type]
        return made[-1]

    yield one
    for proposer in made:
        proposer.close()
    await asyncio.sleep(0)


async def until_open(proposer: RemoteProposer, timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not proposer.is_open:
            await asyncio.sleep(0.005)


def wish(sequence: int, text: list[int], max_tokens: int = 4) -> DraftWish:
    return DraftWish(sequence, text, 1, max_tokens)


async def ask(proposer: RemoteProposer, *wishes: DraftWish) -> list[list[int]]:
    """As the engine's thread would."""
    return await asyncio.to_thread(proposer.propose, list(wishes))


async def test_deltas_reach_the_draft_whole(draft: DraftProcess, make: Make) -> None:
    proposer = make(draft)
    assert await ask(proposer, wish(0, [1])) == [[]]
    await until_open(proposer)
    assert proposer.has_channel
    rng = random.Random(1)
    texts = {i: [rng.randrange(500)] for i in range(20)}
    for i in range(0, 20, 2):
        proposer.admit(i, texts[i])
    for _ in range(30):
        some = rng.sample(sorted(texts), k=rng.randint(1, 20))
        answers = await ask(proposer, *(wish(i, texts[i], rng.randint(1, 8)) for i in some))
        for i, drafted in zip(some, answers, strict=True):
            assert drafted == expected(texts[i], len(drafted))
            assert drafted
            texts[i] = [*texts[i], *rng.choices(range(500), k=rng.randint(1, 5))]
        if rng.random() < 0.3:
            # A number is never used again; the draft has forgotten it.
            gone = rng.choice(sorted(texts))
            proposer.forget(gone)
            assert await ask(proposer, wish(gone, [5, 6])) == [expected([5, 6], 4)]
            texts[gone] = [5, 6]
    counts = proposer.counts
    assert 30 <= sum(counts.exchanges.counts) == sum(counts.messaging.counts)
    assert 0 < counts.messaging.total_s < counts.exchanges.total_s


async def test_waiting_for_what_the_draft_had_begun_is_not_messaging(tmp_path: Path, spins: bool, make: Make) -> None:
    draft = DraftProcess(tmp_path, "busy", spins=spins)
    try:
        proposer = make(draft, deadline_s=1.0)
        await until_open(proposer)
        text = [1]
        for _ in range(30):
            await ask(proposer, wish(0, text))
            text = [*text, 5]
            await asyncio.sleep(0.005)
    finally:
        draft.kill()
    counts = proposer.counts
    assert sum(counts.messaging.counts) == sum(counts.exchanges.counts) == 30
    assert counts.exchanges.total_s > 30 * 0.003
    assert counts.messaging.total_s < counts.exchanges.total_s / 3


async def test_long_prompts(draft: DraftProcess, make: Make) -> None:
    """One that fits no message, one that fits no socket's buffer, and many together."""
    proposer = make(draft, deadline_s=2.0)
    await until_open(proposer)
    rng = random.Random(2)
    long = rng.choices(range(500), k=3 * MOST_IDS + 7)
    proposer.admit(0, long)
    longest = rng.choices(range(500), k=200_000)
    proposer.admit(1, longest)
    many = {i: rng.choices(range(500), k=5000) for i in range(2, 12)}
    texts = {0: long, 1: longest, **many}
    assert await ask(proposer, *(wish(i, text) for i, text in texts.items())) == [
        expected(text, 4) for text in texts.values()
    ]
    assert await ask(proposer, wish(1, [*longest, 3])) == [expected([*longest, 3], 4)]


async def test_a_draft_that_dies_costs_no_more_than_the_deadline(draft: DraftProcess, make: Make) -> None:
    proposer = make(draft)
    rng = random.Random(3)
    texts = {i: rng.choices(range(500), k=50) for i in range(16)}
    waits: list[float] = []

    async def step() -> bool:
        def timed() -> list[list[int]]:
            began_s = time.monotonic()
            answers = proposer.propose([wish(i, text) for i, text in texts.items()])
            waits.append(time.monotonic() - began_s)
            return answers

        answers = await asyncio.to_thread(timed)
        for (i, text), drafted in zip(texts.items(), answers, strict=True):
            assert drafted in ([], expected(text, 4))
            texts[i] = [*text, rng.randrange(500)]
        return any(answers)

    for _ in range(10):
        await until_open(proposer)
        assert await step()

        async def steps() -> None:
            for _ in range(40):
                await step()

        stepping = asyncio.create_task(steps())
        await asyncio.sleep(rng.random() * 0.02)
        await asyncio.to_thread(draft.kill)
        await stepping
        assert not await step()
        await asyncio.to_thread(draft.start)
    await until_open(proposer)
    assert await step()
    # A dying process may still take a connection.
    assert 10 <= proposer.counts.num_losses == proposer.counts.num_opened - 1
    assert sorted(waits)[int(0.99 * len(waits))] <= DEADLINE_S + 0.02


async def test_a_late_answer_is_dropped_and_nothing_asked_before_it(draft: DraftProcess, make: Make) -> None:
    proposer = make(draft)
    await until_open(proposer)
    text = [7, CountingModel.SLOW + 400]
    began_s = time.monotonic()
    assert await ask(proposer, wish(0, text)) == [[]]
    assert DEADLINE_S <= time.monotonic() - began_s <= DEADLINE_S + 0.2
    assert proposer.counts.num_timeouts == 1
    # Those that come meanwhile do not wait at all.
    began_s = time.monotonic()
    assert await ask(proposer, wish(0, [*text, 8]), wish(1, [1])) == [[], []]
    assert time.monotonic() - began_s < DEADLINE_S
    assert proposer.counts.num_skipped == 1
    await asyncio.sleep(0.5)
    # What was told with the late call counts, its answer does not.
    again = [*text, 8, 9]
    assert await ask(proposer, wish(0, again), wish(1, [1])) == [expected(again, 4), expected([1], 4)]
    assert proposer.counts.num_losses == 0


async def test_a_draft_that_hangs_is_given_up_and_asked_again(
    draft: DraftProcess, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.draft_link.SILENCE_S", 0.2)
    proposer = make(draft)
    await until_open(proposer)
    draft.signal(signal.SIGSTOP)
    assert await ask(proposer, wish(0, [1, 2])) == [[]]
    await asyncio.sleep(0.25)
    assert await ask(proposer, wish(0, [1, 2, 3])) == [[]]
    assert proposer.counts.num_losses == 1
    draft.signal(signal.SIGCONT)
    # A stopped process takes connections too: until it runs again, it may be given up once more.
    async with asyncio.timeout(10):
        while await ask(proposer, wish(0, [1, 2, 3])) != [expected([1, 2, 3], 4)]:
            await asyncio.sleep(0.05)


async def test_by_calls_from_another_node(make: Make) -> None:
    model = CountingModel()
    server = DraftServer(model, VOCABULARY, "elsewhere")
    proposer = make(server)
    await until_open(proposer)
    assert not proposer.has_channel
    text = [1, 2]
    for i in range(5):
        assert await ask(proposer, wish(0, text), wish(1, [i])) == [expected(text, 4), expected([i], 4)]
        text = [*text, i, i]
        proposer.forget(1)
    late = [*text, CountingModel.SLOW + 400]
    began_s = time.monotonic()
    assert await ask(proposer, wish(0, late)) == [[]]
    assert await ask(proposer, wish(0, [*late, 1])) == [[]]
    assert time.monotonic() - began_s < 2 * DEADLINE_S + 0.2
    await asyncio.sleep(0.5)
    assert await ask(proposer, wish(0, [*late, 1])) == [expected([*late, 1], 4)]
    # The draft forgets behind the target's back, once it has done what it was asked for.
    await asyncio.sleep(0.1)
    model.forget(("target", 0))
    assert await ask(proposer, wish(0, [*late, 1, 2])) == [[]]
    assert await ask(proposer, wish(0, [*late, 1, 2])) == [expected([*late, 1, 2], 4)]
    await server.check_health()
    await asyncio.to_thread(server.stop)


class SlowWay:
    """A draft on another node: each call takes a while."""

    def __init__(self, server: DraftServer, delay_s: float) -> None:
        self.open_channel = server.open_channel
        self._server = server
        self._delay_s = delay_s
        self.num_calls = 0

    async def propose(
        self, client: str, calls: Sequence[DraftCall], ended: Sequence[int], limit_s: float
    ) -> list[Drafted]:
        self.num_calls += 1
        await asyncio.sleep(self._delay_s)
        return await self._server.propose(client, calls, ended, limit_s)


async def test_calls_are_made_for_the_text_that_is_likely_next(make: Make) -> None:
    server = DraftServer(CountingModel(), VOCABULARY, "elsewhere")
    way = SlowWay(server, 0.1)
    proposer = make(way, deadline_s=1.0)
    await until_open(proposer)
    texts = {0: [1, 2], 1: [5]}
    assert await ask(proposer, *(wish(i, text) for i, text in texts.items())) == [
        expected(text, 4) for text in texts.values()
    ]
    for _ in range(5):
        # All of it accepted, and the draft's own next token drawn: the answer is there when it is asked for.
        await asyncio.sleep(0.2)
        texts = {i: [*text, *expected(text, 5)] for i, text in texts.items()}
        num_calls, began_s = way.num_calls, time.monotonic()
        assert await ask(proposer, *(wish(i, text) for i, text in texts.items())) == [
            expected(text, 4) for text in texts.values()
        ]
        assert time.monotonic() - began_s < 0.1
        await asyncio.sleep(0.005)
        assert way.num_calls == num_calls + 1
    # One goes on otherwise, after two that were right; a third sequence comes; the other one rests.
    texts = {0: [*texts[0], *expected(texts[0], 2), 9], 2: [4]}
    for _ in range(2):
        assert await ask(proposer, *(wish(i, text) for i, text in texts.items())) == [
            expected(text, 4) for text in texts.values()
        ]
        texts[2] = [*texts[2], *expected(texts[2], 5)]
    await asyncio.to_thread(server.stop)


class BusyModel(CountingModel):
    """Has always something to do, and fails where a text has 13 in it."""

    def advance(self) -> bool:
        time.sleep(0.002)
        return True

    def _answer(self, call: DraftCall) -> Drafted:
        if 13 in call.token_ids:
            raise RuntimeError("a broken kernel")
        return super()._answer(call)


async def test_a_busy_draft_answers_between_two_forwards_and_one_that_fails_is_replaced(make: Make) -> None:
    server = DraftServer(BusyModel(), VOCABULARY, "node")
    proposer = make(server)
    await until_open(proposer)
    for i in range(20):
        assert await ask(proposer, wish(i, [1, i])) == [expected([1, i], 4)] or i == 13
    assert proposer.counts.num_timeouts == 0
    for _ in range(2):
        assert await ask(proposer, wish(50, [13])) == [[]]
    await server.check_health()
    assert await ask(proposer, wish(100, [1])) == [expected([1], 4)]
    for _ in range(3):
        assert await ask(proposer, wish(50, [13])) == [[]]
    with pytest.raises(EngineFailed):
        await server.check_health()
    await asyncio.to_thread(server.stop)


async def test_another_vocabulary_is_refused(make: Make) -> None:
    other = [*VOCABULARY[:42], b"other", *VOCABULARY[43:]]
    server = DraftServer(CountingModel(), other, "node")
    proposer = make(server)
    async with asyncio.timeout(5):
        while proposer.refusal is None:
            await asyncio.sleep(0.005)
    assert "id 42 is '42' to the target and 'other' to the draft" in proposer.refusal
    assert await ask(proposer, wish(0, [1])) == [[]]
    await asyncio.to_thread(server.stop)


async def test_a_call_that_was_given_up_is_not_computed() -> None:
    server = DraftThread(CountingModel())
    server.start()
    slow = server.call("a", [DraftCall(0, 0, [CountingModel.SLOW + 50], 1)], [], 1.0)
    given_up = server.call("a", [DraftCall(1, 0, [1], 1)], [], 1.0)
    assert given_up.cancel()
    assert await asyncio.wrap_future(slow) == [expected([CountingModel.SLOW + 50], 1)]
    assert await asyncio.wrap_future(server.call("a", [DraftCall(1, 1, [2], 1)], [], 1.0)) == [None]
    assert not server.is_failed
    server.stop()


async def test_sequences_of_two_targets_are_kept_apart_and_go_with_their_sockets() -> None:
    model = CountingModel()
    server = DraftThread(model)
    server.start()
    links = [ChannelLink(server.path) for _ in range(2)]
    for n, link in enumerate(links):
        assert link.ask([wish(0, [n, 5])], time.monotonic() + 5) == [expected([n, 5], 4)]
    assert len(model.texts) == 2
    links[0].close()
    async with asyncio.timeout(5):
        while len(model.texts) > 1:
            await asyncio.sleep(0.005)
    assert links[1].ask([wish(0, [1, 5, 6])], time.monotonic() + 5) == [expected([1, 5, 6], 4)]
    server.stop()
    with pytest.raises(LinkLost):
        links[1].ask([wish(0, [1, 5, 6, 7])], time.monotonic() + 5)
    links[1].close()


async def test_answers_of_earlier_calls_are_dropped(tmp_path: Path) -> None:
    """A server that says other things before the answer."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(tmp_path / "socket"))
    listener.listen()
    link = ChannelLink(str(tmp_path / "socket"))
    connection, _ = listener.accept()

    def serve(*answers: tuple[int, Answer]) -> None:
        message = read_by_draft(connection.recv(1 << 17))
        assert isinstance(message, Calls)
        for shift, answer in answers:
            connection.send(pack(Answers(message.epoch + shift, 0.0, [answer])))

    serving = asyncio.create_task(asyncio.to_thread(serve, (-1, Answer(3, 2, [8])), (0, Answer(3, 2, [9]))))
    assert await asyncio.to_thread(link.ask, [wish(3, [1, 2])], time.monotonic() + 5) == [[9]]
    await serving
    # Of the right epoch, for another length of the text.
    serving = asyncio.create_task(asyncio.to_thread(serve, (0, Answer(3, 3, [7]))))
    assert await asyncio.to_thread(link.ask, [wish(3, [1, 2, 3, 4])], time.monotonic() + 5) == [[]]
    await serving
    for end in (connection, listener, link):
        end.close()


class SamplingModel(CountingModel):
    """Says that what it proposes was sampled, where that is wanted."""

    def _answer(self, call: DraftCall) -> Drafted:
        drafted = super()._answer(call)
        return drafted if call.chain is None or drafted is None else sampled(list(drafted), call.chain.top_k)


@pytest.mark.parametrize("node_id", ["node", "elsewhere"])
async def test_sampled_tokens_come_with_what_from(make: Make, node_id: str) -> None:
    """By packets and by calls, of which the second is made before it is asked for."""
    server = DraftServer(SamplingModel(), VOCABULARY, "node")
    proposer = make(server, node_id, deadline_s=1.0)
    await until_open(proposer)
    assert proposer.has_channel == (node_id == "node")
    text, chain = [1, 2], SamplingChain(0.5, 3)
    for i in range(4):
        first, second = await ask(proposer, replace(wish(0, text), chain=chain), wish(3 + i, [*text, 7]))
        assert isinstance(first, SampledTokens)
        assert list(first) == expected(text, 4)
        assert first.candidates.tolist() == [[token + i for i in range(3)] for token in first]
        assert first.chances.shape == (4, 3)
        assert second == expected([*text, 7], 4)
        text = [*text, *expected(text, 5)]
    # A place ends the proposal if any of its candidates is unknown, whichever was sampled.
    width = len(VOCABULARY) - 300
    [drafted] = await ask(proposer, replace(wish(2, text), chain=SamplingChain(0.5, width)))
    known = expected(text, 4)
    count = next(i for i, token in enumerate(known) if token + width > len(VOCABULARY))
    assert list(drafted) == known[:count]
    await asyncio.to_thread(server.stop)


async def test_an_exchange_is_short(tmp_path: Path, make: Make) -> None:
    """With a model that takes no time. The limit is wide: other processes run beside the tests."""
    draft = DraftProcess(tmp_path, "empty")
    proposer = make(draft)
    await until_open(proposer)
    text, took = [1, 2, 3], []

    def steps() -> None:
        for i in range(3000):
            text.append(i % 500)
            began_s = time.perf_counter()
            [drafted] = proposer.propose([wish(0, text)])
            took.append(time.perf_counter() - began_s)
            assert len(drafted) == 4

    await asyncio.to_thread(steps)
    draft.kill()
    took.sort()
    print(f"p50 {took[1500] * 1e6:.0f} us, p99 {took[2970] * 1e6:.0f} us")
    assert took[1500] < 0.001
