"""A draft's weights change while it is asked, in a replica's server without Ray.

The oracle: what drafts say that were loaded with the type at once.
"""

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest

from deployments import requantizer
from deployments.draft import DraftServer, build_model
from deployments.draft_plan import DraftPlan
from deployments.requantizer import Requantizer, SwitchCalls
from deployments.switch_part import PartState, Wish
from serve_app.api.backend import IsqJob
from serve_app.engine import model_switch, switch_plan
from serve_app.engine.speculation.build_draft import BuiltDraft
from serve_app.engine.speculation.draft_call import DraftCall, Drafted
from serve_app.engine.speculation.drafter import Drafter
from serve_app.engine.speculation.text_map import TextMappedDraft
from serve_app.errors import Conflict, EngineFailed, InvalidRequest, ModelFileError, Unavailable
from serve_app.loaders.load import load_model
from serve_app.metrics import HttpMetrics
from serve_app.options import IsqOptions
from serve_app.text.tokenizer import open_tokenizer
from tests.deployments.draft_process import CountingModel
from tests.deployments.test_draft import MODELS, PLAN

TEXTS = [[1, *range(300 + 20 * i, 312 + 21 * i)] for i in range(6)]
NEW = "Q4_0"


def says(isq_type: str | None) -> list[Drafted]:
    """What a draft of that type proposes behind TEXTS."""
    source = replace(PLAN.source, isq=None if isq_type is None else IsqOptions(type=isq_type))
    model = build_model(replace(PLAN, source=source)).model
    answers = model.propose([DraftCall(i, 0, text, 8) for i, text in enumerate(TEXTS)])
    model.close()
    return answers


@pytest.fixture(scope="module")
def old() -> list[Drafted]:
    return says(None)


@pytest.fixture(scope="module")
def new(old: list[Drafted]) -> list[Drafted]:
    answers = says(NEW)
    assert answers != old
    return answers


class Served(SwitchCalls):
    """A draft's server, asked for continuations of TEXTS that it was told once, and the ingress that has it change."""

    def __init__(self, built: BuiltDraft) -> None:
        self.model = built.model
        self.server = DraftServer(
            built.model, built.vocabulary, "node", make_switch=built.make_switch, stats=built.stats
        )
        self.requantizer = Requantizer({"draft": self}, HttpMetrics())

    async def each(self, command: Any, *args: Any) -> list[PartState | BaseException]:
        return list(await asyncio.gather(self.server.re_isq(command, *args), return_exceptions=True))

    async def tell(self) -> list[Drafted]:
        return await self._ask([DraftCall(i, 0, text, 8) for i, text in enumerate(TEXTS)])

    async def ask(self) -> list[Drafted]:
        """Without telling any of the texts again but its last token."""
        return await self._ask([DraftCall(i, len(text) - 1, text[-1:], 8) for i, text in enumerate(TEXTS)])

    async def _ask(self, calls: list[DraftCall]) -> list[Drafted]:
        return await self.server.propose("me", calls, [], 10.0)

    async def change(self, isq_type: str, mode: Any = "drain") -> IsqJob:
        job = await self.requantizer.begin(isq_type, mode, "draft")
        return await self.requantizer.wait(job.id)

    @property
    def isq_type(self) -> str:
        return self.server._switch.isq_type

    @property
    def drafter(self) -> Drafter:
        model: Any = self.model
        drafter: Drafter = model if isinstance(model, Drafter) else model._model
        return drafter


@pytest.fixture
async def serve(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Callable[..., Served]]:
    monkeypatch.setattr(requantizer, "POLL_S", 0.005)
    made: list[Served] = []

    def one(plan: DraftPlan = PLAN, adapt: Callable[[BuiltDraft], BuiltDraft] = lambda built: built) -> Served:
        made.append(Served(adapt(build_model(plan))))
        return made[-1]

    yield one
    for served in made:
        served.requantizer.stop()
        pool = served.drafter.pool
        await asyncio.to_thread(served.server.stop)
        assert pool.num_free == pool.num_total


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """What new weights wait for."""
    event = threading.Event()

    def load(*args: Any, **options: Any) -> Any:
        assert event.wait(30)
        return load_model(*args, **options)

    monkeypatch.setattr(model_switch, "load_model", load)
    yield event
    event.set()


def break_loading(monkeypatch: pytest.MonkeyPatch, *, breaks_old: bool = False) -> None:
    def load(files: Any, **options: Any) -> Any:
        if breaks_old or files.isq is not None:
            raise ModelFileError("broken: on purpose")
        return load_model(files, **options)

    monkeypatch.setattr(model_switch, "load_model", load)


@pytest.mark.parametrize("mode", ["drain", "swap"])
async def test_it_drafts_on_and_then_with_the_new_weights(
    serve: Callable[..., Served], gate: threading.Event, mode: Any, old: list[Drafted], new: list[Drafted]
) -> None:
    served = serve()
    assert await served.tell() == old
    weights = weakref.ref(served.drafter._model)
    job = await served.requantizer.begin(NEW, mode, "draft")
    for _ in range(5):
        assert await served.ask() == old
    assert (job.state, job.isq_type, job.target, job.mode) == ("preparing", NEW, "draft", mode)
    gate.set()
    assert (await served.requantizer.wait(job.id)).state == "done"
    assert await served.ask() == new
    assert served.isq_type == NEW
    assert await served.server.isq_wish() == served.requantizer.wishes["draft"] == Wish(1, NEW)
    gc.collect()
    assert weights() is None
    assert (await served.change("none", mode)).state == "done"
    assert await served.ask() == old
    assert await served.server.isq_wish() == Wish(2, "none")


async def test_its_metrics(serve: Callable[..., Served]) -> None:
    served = serve()
    before = await served.server.snapshot()
    assert (before["sirocco_draft_kv_blocks_used"], before["sirocco_draft_forwards_total"]) == (
        {"": [0.0]},
        {"": [0.0]},
    )
    assert before["sirocco_draft_isq_info"] == {"none": [1.0]}
    await served.tell()
    after = await served.server.snapshot()
    [used], [total] = after["sirocco_draft_kv_blocks_used"][""], after["sirocco_draft_kv_blocks_total"][""]
    assert len(TEXTS) <= used <= total
    assert after["sirocco_draft_forwards_total"][""] >= [2.0]
    assert after["sirocco_draft_evictions_total"] == {"": [0.0]}
    assert after["sirocco_process_open_fds"].keys() == {"Draft"}
    await served.change(NEW)
    assert (await served.server.snapshot())["sirocco_draft_isq_info"] == {NEW: [1.0]}


async def test_by_way_of_the_text(serve: Callable[..., Served]) -> None:
    """What the map has told the model, that still knows."""
    tokenizer = open_tokenizer(MODELS / "stories260K" / "hf", encodes=True)

    def mapped(built: BuiltDraft) -> BuiltDraft:
        return replace(built, model=TextMappedDraft(built.model, tokenizer, tokenizer))

    served, fresh = serve(adapt=mapped), serve(adapt=mapped)
    before = await served.tell()
    assert (await served.change(NEW)).state == (await fresh.change(NEW)).state == "done"
    assert await served.ask() == await fresh.tell() != before


async def test_calls_under_way_while_it_changes_again_and_again(
    serve: Callable[..., Served], old: list[Drafted], new: list[Drafted]
) -> None:
    served = serve()
    await served.tell()
    is_over = False
    seen: list[list[Drafted]] = []

    async def keep_asking() -> None:
        while not is_over:
            seen.append(await served.ask())

    asking = asyncio.create_task(keep_asking())
    for isq_type in [NEW, "none"] * 3:
        assert (await served.change(isq_type)).state == "done"
    is_over = True
    await asking
    assert len(seen) > 10
    assert all(answers in (old, new) for answers in seen)
    assert await served.ask() == old


async def test_a_failure_leaves_the_old_ones(
    serve: Callable[..., Served], old: list[Drafted], new: list[Drafted], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve()
    await served.tell()
    with monkeypatch.context() as patch:
        break_loading(patch)
        job = await served.change(NEW)
    assert job.state == "failed"
    assert job.error is not None
    assert "on purpose" in job.error.message
    assert await served.ask() == old
    with monkeypatch.context() as patch:
        patch.setattr(served.drafter, "exchange", lambda *_: 1 / 0)
        assert (await served.change(NEW)).state == "failed"
    assert await served.ask() == old
    assert served.isq_type == "none"
    assert (await served.change(NEW)).state == "done"
    assert await served.ask() == new


async def test_exchanged_weights_go_back(serve: Callable[..., Served], old: list[Drafted], new: list[Drafted]) -> None:
    served = serve()
    await served.tell()
    for command, *args in (("reserve", NEW, {}), ("start",), ("commit", "swap", Wish(1, NEW))):
        await served.server.re_isq(command, "job", *args)  # type: ignore[arg-type]
        async with asyncio.timeout(20):
            while (await served.server.re_isq("state", "job")).step.endswith("ing"):
                await asyncio.sleep(0.005)
    assert await served.ask() == new
    await served.server.re_isq("cancel", "job", Wish(2, "none"))
    assert await served.ask() == old
    assert await served.server.isq_wish() == Wish(2, "none")


class TestTooLittleMemory:
    """Old and new weights do not fit beside each other."""

    @pytest.fixture(autouse=True)
    def _little(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(switch_plan, "free_bytes", lambda device: switch_plan.MARGIN_BYTES + 20_000)

    async def test_nothing_is_proposed_meanwhile(
        self, serve: Callable[..., Served], gate: threading.Event, old: list[Drafted], new: list[Drafted]
    ) -> None:
        served = serve()
        assert await served.tell() == old
        job = await served.requantizer.begin(NEW, "swap", "draft")
        assert job.in_place
        async with asyncio.timeout(20):
            while (await served.ask()) != [[]] * len(TEXTS):
                await asyncio.sleep(0.005)
        assert served.drafter._model is None
        gate.set()
        assert (await served.requantizer.wait(job.id)).state == "done"
        assert await served.ask() == new

    async def test_a_failure_makes_the_old_ones_again(
        self, serve: Callable[..., Served], old: list[Drafted], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        served = serve()
        await served.tell()
        break_loading(monkeypatch)
        assert (await served.change(NEW)).state == "failed"
        assert await served.ask() == old
        await served.server.check_health()

    async def test_a_draft_that_has_no_weights_any_more_has_failed(
        self, serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        served = serve()
        await served.tell()
        break_loading(monkeypatch, breaks_old=True)
        assert (await served.change(NEW)).state == "failed"
        assert await served.ask() == [[]] * len(TEXTS)
        with pytest.raises(EngineFailed):
            await served.server.check_health()


async def test_what_is_refused(serve: Callable[..., Served], tmp_path: Path) -> None:
    folder = tmp_path / "draft"
    copytree(Path(str(PLAN.source.model)), folder)
    served = serve(replace(PLAN, source=replace(PLAN.source, model=str(folder))))
    with pytest.raises(InvalidRequest, match=r"Q4_0.*Q4_K_M"):
        await served.change("bogus")
    for file in folder.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(Conflict, match="cannot be read any more"):
        await served.change(NEW)
    server = DraftServer(CountingModel(), [b"a"], "node")
    with pytest.raises(Conflict, match="cannot be made anew"):
        await server.re_isq("reserve", "job", NEW, {})
    await asyncio.to_thread(server.stop)


async def test_the_end_of_the_replica_ends_the_job(serve: Callable[..., Served], gate: threading.Event) -> None:
    served = serve()
    job = await served.requantizer.begin(NEW, "drain", "draft")
    thread = served.server._thread
    await asyncio.to_thread(served.server.stop)
    with pytest.raises(Unavailable):
        thread.between_calls(lambda: None)
    gate.set()
    served.requantizer.stop()
    assert (await served.requantizer.wait(job.id)).state == "failed"
