"""Weights that change under running requests. The oracle: what plain engines say, before the change and after it."""

import gc
import logging
import re
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path
from shutil import copy
from typing import Any

import pytest
import torch
from family_cases import CASES, hf_model

from serve_app.commands.quality import DEFAULT_TEXT
from serve_app.engine import calibration, model_switch, switch_plan
from serve_app.engine.calibration import measure_inputs, memory_bytes
from serve_app.engine.llm import LLM
from serve_app.engine.request_factory import _derive
from serve_app.errors import Conflict, EngineFailed, InvalidRequest, ModelFileError
from serve_app.loaders.load import load_model
from serve_app.loaders.model_files import ModelFiles, resolve
from serve_app.loaders.weight_files import EMBEDDED_MODEL
from serve_app.options import IsqOptions, ModelSource, SamplingParams
from tests.engine.switching import CONFIG, FILES, MODELS, Plain, Served, load_other_file, request, until
from tests.engine.test_angle_sets import ROPES
from tests.loaded_weights import same

NEW = "Q4_0"
PROMPTS = ("Once upon a time", "The little dog", "Lily and Tom", "One day, a big", "In the forest there")


@pytest.fixture(scope="module")
def old() -> Iterator[Plain]:
    plain = Plain("none")
    yield plain
    plain.close()


@pytest.fixture(scope="module")
def new() -> Iterator[Plain]:
    plain = Plain(NEW)
    yield plain
    plain.close()


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr(model_switch, "load_model", load_other_file)
    server = Served()
    yield server
    server.close()


def prompts(plain: Plain, count: int) -> list[list[int]]:
    return [[*plain.encode(PROMPTS[i % len(PROMPTS)]), 300 + i] for i in range(count)]


def test_drain_ends_old_requests_on_old_weights_and_new_ones_on_new(served: Served, old: Plain, new: Plain) -> None:
    sent = prompts(old, 40)
    served.engine.start()
    for i, prompt in enumerate(sent[:32]):
        served.engine.add(request(f"r{i}", prompt, seed=i, max_tokens=100))
    until(lambda: served.engine.stats().num_running == 32 and len(served.deltas) == 32)
    with served.switching(NEW, "drain") as thread:
        for i, prompt in enumerate(sent[32:], 32):
            served.engine.add(request(f"r{i}", prompt, seed=i))
        until(lambda: served.engine.stats().num_waiting == 8 or not thread.is_alive())
        assert thread.is_alive(), "the old requests ended before the new ones came"
    served.switch.settle()
    until(lambda: not served.engine.has_requests)
    assert served.reasons() == {"length"}
    before = old.all([(prompt, {"seed": i, "max_tokens": 100}) for i, prompt in enumerate(sent[:32])])
    after = new.all([(prompt, {"seed": i}) for i, prompt in enumerate(sent[32:], 32)])
    for i, expected in enumerate([*before, *after]):
        assert served.ids(f"r{i}") == expected.token_ids, i
    assert served.ids("r32") != old(sent[32], seed=32)[0].token_ids
    assert served.switch.isq_type == NEW


def test_swap_goes_on_from_what_was_said_with_the_new_weights(
    served: Served, old: Plain, new: Plain, caplog: pytest.LogCaptureFixture
) -> None:
    """32 running choices, some of one request, with log-probabilities and penalties, and more requests waiting."""
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 0.0},
        {"logprobs": 3},
        {"repetition_penalty": 1.3},
        {"n": 3},
        {"top_p": 0.8, "top_k": 20, "min_p": 0.02},
    ]
    sent = [(prompt, {"seed": i, **kinds[i % len(kinds)]}) for i, prompt in enumerate(prompts(old, 30))]
    for i, (prompt, sampling) in enumerate(sent):
        served.engine.add(request(f"r{i}", prompt, **sampling))
    served.step(8)
    assert served.engine.stats().num_running == 32
    begun = {key: len(served.ids(*key)) for key in list(served.deltas)}
    assert min(begun.values()) > 3
    with caplog.at_level(logging.INFO, model_switch.__name__), served.switching(NEW, "swap"):
        served.step()
    assert served.switch.isq_type == NEW
    served.finish()
    assert served.reasons() == {"length"}
    found = re.search(r"exchanged in (\S+) ms, 32 texts are computed again", caplog.text)
    assert found is not None
    assert float(found[1]) < 250
    choices = [
        ((f"r{i}", choice), prompt, {**sampling, "n": 1, "seed": i if choice == 0 else _derive(i, choice)})
        for i, (prompt, sampling) in enumerate(sent)
        for choice in range(sampling.get("n", 1))
    ]
    undisturbed = old.all([(prompt, sampling) for _, prompt, sampling in choices])
    said = [served.ids(*key) for key, _, _ in choices]
    assert sum(ids != first.token_ids for ids, first in zip(said, undisturbed, strict=True)) > 30, "nothing changed"
    num_before = [begun.get(key, 0) for key, _, _ in choices]
    after = new.all(
        [
            ([*prompt, *ids[:before]], {**sampling, "max_tokens": 40 - before})
            for (_, prompt, sampling), ids, before in zip(choices, said, num_before, strict=True)
        ]
    )
    for (key, _, sampling), ids, before, first, rest in zip(choices, said, num_before, undisturbed, after, strict=True):
        assert ids == [*first.token_ids[:before], *rest.token_ids], key
        if "logprobs" in sampling:
            told = [one for delta in served.deltas[key] for one in delta.logprobs or []]
            assert told[before:] == rest.logprobs


def test_a_stop_string_across_the_border_is_found(served: Served, old: Plain) -> None:
    prompt = prompts(old, 1)[0]

    def run(name: str, **sampling: Any) -> str:
        served.engine.add(request(name, prompt, seed=4, **sampling))
        served.step(12)
        with served.switching(NEW if name == "a" else "none", "swap"):
            served.step()
        served.switch.settle()
        served.finish()
        return served.text(name)

    served.switch.prepare(served.switch.plan("none"), lambda done: None)
    served.switch.undo()
    whole = run("a")
    said = "".join(delta.text for delta in served.deltas["a", 0][:12])
    stop = whole[len(said) - 4 : len(said) + 4]
    # Back, so that the same change comes once more.
    with served.switching("none", "swap"):
        served.step()
    served.switch.settle()
    served.engine.add(request("b", prompt, seed=4, stop=(stop,)))
    served.step(12)
    with served.switching(NEW, "swap"):
        served.step()
    served.finish()
    assert served.text("b") == whole[: whole.index(stop)]
    finish = served.deltas["b", 0][-1].finish
    assert finish is not None
    assert finish.stop_reason == stop


@pytest.mark.parametrize("mode", ["swap", "drain"])
def test_a_fork_that_is_pending(served: Served, old: Plain, new: Plain, mode: Any) -> None:
    """The leader is in the midst of its prompt, the other choices wait for it; so do its prompt's numbers."""
    prompt = [1, *(260 + i % 200 for i in range(80))]
    served.engine.add(request("r", prompt, n=3, seed=9, logprobs=2, prompt_logprobs=True, max_tokens=12))
    served.step()
    assert [r.num_computed for r in served.engine.parts.scheduler.running] == [32]
    with served.switching(NEW, mode) as thread:
        while thread.is_alive():
            served.step()
    served.finish()
    plain = new if mode == "swap" else old
    for choice in range(3):
        seed = 9 if choice == 0 else _derive(9, choice)
        assert served.ids("r", choice) == plain(prompt, seed=seed, max_tokens=12)[0].token_ids
    expected = plain.prompt_logprobs(prompt, seed=9, logprobs=2, prompt_logprobs=True, max_tokens=1)
    assert served.deltas["r", 0][0].prompt_logprobs == expected


def test_more_choices_than_rows_drain_together(old: Plain, new: Plain, monkeypatch: pytest.MonkeyPatch) -> None:
    """Choices that wait for a row of their own belong to a request that has begun; a new request does not."""
    monkeypatch.setattr(model_switch, "load_model", load_other_file)
    served = Served(replace(CONFIG, max_seqs=2))
    try:
        prompt = prompts(old, 1)[0]
        served.engine.add(request("begun", prompt, n=5, seed=3, max_tokens=10))
        served.step(3)
        with served.switching(NEW, "drain") as thread:
            served.engine.add(request("late", prompt, seed=3, max_tokens=10))
            while thread.is_alive():
                served.step()
        served.finish()
        for choice in range(5):
            seed = 3 if choice == 0 else _derive(3, choice)
            assert served.ids("begun", choice) == old(prompt, seed=seed, max_tokens=10)[0].token_ids
        assert served.ids("late") == new(prompt, seed=3, max_tokens=10)[0].token_ids
    finally:
        served.close()


def test_the_prefix_cache_forgets(served: Served) -> None:
    prompt = [1, *range(260, 330)]

    def cached(name: str) -> int:
        served.engine.add(request(name, prompt, max_tokens=2))
        served.finish()
        finish = served.deltas[name, 0][-1].finish
        assert finish is not None
        return finish.usage.cached_tokens

    assert [cached("a"), cached("b")] == [0, 64]
    with served.switching(NEW, "drain"):
        served.step()
    assert [cached("c"), cached("d")] == [0, 64]


def test_a_request_that_waited_to_be_admitted_is_hashed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its hashes were made for the old weights when it did not fit."""
    monkeypatch.setattr(model_switch, "load_model", load_other_file)
    served = Served(replace(CONFIG, pool_tokens=16 * 16))
    try:
        prompt = [1, *range(260, 400)]
        for name in ("a", "b"):
            served.engine.add(request(name, prompt, max_tokens=30))
        served.step(8)
        waiting = served.engine.parts.scheduler.waiting
        assert [r.request_id for r in waiting] == ["b"]
        assert waiting[0].block_hashes
        with served.switching(NEW, "swap"):
            served.step()
        served.finish()
        assert served.reasons() == {"length"}
        hasher = served.engine.parts.scheduler.pool.hasher
        chain = hasher.chain(b"", prompt, 16)
        assert served.engine.parts.scheduler.pool.peek(chain).num_matched == 8
    finally:
        served.close()


def switch_once(served: Served) -> None:
    with served.switching(NEW, "swap"):
        served.step(2)


@pytest.mark.parametrize("where", ["load_model", "exchange", "renew"])
def test_after_a_failure_the_old_weights_serve(
    served: Served, old: Plain, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    sent = prompts(old, 8)
    for i, prompt in enumerate(sent):
        served.engine.add(request(f"r{i}", prompt, seed=i, n=1 + i % 2))
    served.step(5)

    def fails(*_: Any, **__: Any) -> Any:
        raise ModelFileError("broken: on purpose")

    owner = {"exchange": served.engine.parts.runner, "renew": served.engine.parts.scheduler.pool}.get(
        where, model_switch
    )
    with monkeypatch.context() as patch:
        patch.setattr(owner, where, fails)
        with pytest.raises(ModelFileError, match="on purpose"):
            switch_once(served)
    served.switch.undo()
    served.finish()
    assert served.reasons() == {"length"}
    for i, prompt in enumerate(sent):
        assert served.ids(f"r{i}") == old(prompt, seed=i)[0].token_ids
    assert served.switch.isq_type == "none"
    with served.switching(NEW, "swap"):
        served.step()
    assert served.switch.isq_type == NEW


def test_undo_after_the_switch_puts_the_old_weights_back(served: Served, old: Plain, new: Plain) -> None:
    prompt = prompts(old, 1)[0]
    served.engine.start()
    with served.switching(NEW, "swap"):
        pass
    served.engine.add(request("r", prompt, seed=1, max_tokens=200))
    until(lambda: len(served.ids("r")) > 5)
    served.switch.undo()
    until(lambda: not served.engine.has_requests)
    said = served.ids("r")
    on_new = new(prompt, seed=1, max_tokens=200)[0].token_ids
    at = next(i for i, (a, b) in enumerate(zip(said, on_new, strict=True)) if a != b)
    begun = max(n for n in range(at + 1) if old([*prompt, *said[:n]], seed=1, max_tokens=1)[0].token_ids == [said[n]])
    assert said[begun:] == old([*prompt, *said[:begun]], seed=1, max_tokens=200 - begun)[0].token_ids
    assert served.switch.isq_type == "none"


def test_a_drain_can_be_stopped(served: Served, old: Plain) -> None:
    prompt = prompts(old, 1)[0]
    served.engine.start()
    served.engine.add(request("long", prompt, seed=1, max_tokens=400))
    until(lambda: len(served.ids("long")) > 2)

    def stop_while_it_drains() -> None:
        with served.switching(NEW, "drain"):
            served.engine.add(request("late", prompt, seed=2))
            until(lambda: served.engine.stats().num_waiting == 1)
            served.switch.stop()

    with pytest.raises(CancelledError):
        stop_while_it_drains()
    served.switch.undo()
    until(lambda: not served.engine.has_requests)
    assert served.reasons() == {"length"}
    assert served.ids("late") == old(prompt, seed=2)[0].token_ids


def test_stopping_ends_the_loading(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_switch, "load_model", load_model)
    seen: list[float] = []

    def note(done: float) -> None:
        seen.append(done)
        if done > 0.5:
            served.switch.stop()

    with pytest.raises(CancelledError):
        served.switch.prepare(served.switch.plan(NEW), note)
    assert seen == sorted(seen)
    assert 0.5 < seen[-1] < 1.0
    served.switch.undo()
    served.switch.prepare(served.switch.plan(NEW), seen.append)
    assert seen[-1] == 1.0


class TestTooLittleMemory:
    """Old and new weights do not fit beside each other."""

    @pytest.fixture(autouse=True)
    def _little(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # What the margin asks for and a little: with the old weights gone it is enough.
        monkeypatch.setattr(switch_plan, "free_bytes", lambda device: (64 << 20) + 2_000_000)

    def test_the_old_ones_go_first(
        self, served: Served, old: Plain, new: Plain, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        prompt = prompts(old, 1)[0]
        runner: Any = served.engine.parts.runner
        model, was_there = weakref.ref(runner.model), []

        def load(files: Any, **options: Any) -> Any:
            gc.collect()
            was_there.append(model() is not None)
            return load_other_file(files, **options)

        monkeypatch.setattr(model_switch, "load_model", load)
        served.engine.start()
        served.engine.add(request("begun", prompt, seed=1, max_tokens=200))
        until(lambda: served.ids("begun"))
        plan = served.switch.plan(NEW)
        assert plan.in_place
        # Swapping would mean that everybody waits for the loading: it drains.
        with served.switching(NEW, "swap"):
            served.engine.add(request("late", prompt, seed=2))
        served.switch.settle()
        until(lambda: not served.engine.has_requests)
        assert served.ids("begun") == old(prompt, seed=1, max_tokens=200)[0].token_ids
        assert served.ids("late") == new(prompt, seed=2)[0].token_ids
        assert was_there == [False]

    def test_a_failure_makes_the_old_ones_again(
        self, served: Served, old: Plain, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def load(files: Any, **options: Any) -> Any:
            if files.isq is not None:
                raise ModelFileError("broken: on purpose")
            return load_other_file(files, **options)

        monkeypatch.setattr(model_switch, "load_model", load)
        prompt = prompts(old, 1)[0]
        served.engine.start()
        served.engine.add(request("begun", prompt, seed=1, max_tokens=100))
        until(lambda: served.ids("begun"))
        with pytest.raises(ModelFileError, match="on purpose"), served.switching(NEW, "drain"):
            served.engine.add(request("late", prompt, seed=2))
        served.switch.undo()
        until(lambda: not served.engine.has_requests)
        assert served.reasons() == {"length"}
        assert served.ids("late") == old(prompt, seed=2)[0].token_ids
        assert served.switch.isq_type == "none"

    def test_it_can_be_undone(self, served: Served, old: Plain) -> None:
        served.engine.start()
        with served.switching(NEW, "drain"):
            pass
        assert served.switch.isq_type == NEW
        served.switch.undo()
        prompt = prompts(old, 1)[0]
        served.engine.add(request("r", prompt, seed=1))
        until(lambda: not served.engine.has_requests)
        assert served.ids("r") == old(prompt, seed=1)[0].token_ids

    def test_an_engine_that_has_no_weights_any_more_has_failed(
        self, served: Served, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def load(files: Any, **options: Any) -> Any:
            raise ModelFileError("broken: on purpose")

        monkeypatch.setattr(model_switch, "load_model", load)
        served.engine.start()
        with pytest.raises(ModelFileError, match="on purpose"), served.switching(NEW, "drain"):
            pass
        assert served.engine.is_failed

    def test_even_that_is_too_little(self, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(switch_plan, "free_bytes", lambda device: 1_000_000)
        with pytest.raises(Conflict, match=r"as F32 need \d{8} bytes .* 1000000 bytes are free, 4\d{6} would be"):
            served.switch.plan("F32")


def test_types_that_are_none_are_named(served: Served) -> None:
    for wrong in ("bogus", "IQ2_XS", "", "7"):
        with pytest.raises(InvalidRequest, match=r"Q4_0.*Q4_K_M.*widths 2") as caught:
            served.switch.plan(wrong)
        assert caught.value.param == "isq_type"
    assert [served.switch.plan(name).isq_type for name in ("q4k", 8, "Q4_K_M", "None", "hqq4")] == [
        "Q4_K",
        "Q8_0",
        "Q4_K_M",
        "none",
        "HQQ4",
    ]


def test_the_source_must_be_what_it_was(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    copy(EMBEDDED_MODEL, file)
    served = Served(source=ModelSource(model=str(file)))
    try:
        assert not served.switch.plan("Q4_0").in_place
        copy(FILES["Q6_K"], file)
        with pytest.raises(Conflict, match=r"model\.gguf has changed"):
            served.switch.plan("Q4_0")
        file.unlink()
        with pytest.raises(Conflict, match=r"model\.gguf cannot be read any more \(No such file"):
            served.switch.plan("Q4_0")
    finally:
        served.close()


def test_another_model_under_the_same_name_is_refused(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(files: Any, **options: Any) -> Any:
        loaded = load_other_file(files, **options)
        return replace(loaded, args=replace(loaded.args, n_layers=3))

    monkeypatch.setattr(model_switch, "load_model", load)
    with pytest.raises(EngineFailed, match="another model"):
        served.switch.prepare(served.switch.plan(NEW), lambda done: None)


def test_memory_follows_the_type(served: Served, old: Plain) -> None:
    """Ten changes: the heavy type takes what its weights take, and what they took comes back."""

    def anonymous_bytes() -> int:
        gc.collect()
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) << 10  # type: ignore[index]

    served.engine.start()
    taken: dict[str, list[int]] = {"F32": [], "Q4_0": []}
    for _ in range(6):
        for isq_type in taken:
            with served.switching(isq_type, "swap"):
                served.engine.add(request(f"r{len(served.deltas)}", prompts(old, 1)[0], max_tokens=3))
            served.switch.settle()
            until(lambda: not served.engine.has_requests)
            taken[isq_type].append(anonymous_bytes())
    heavy, light = (taken[name][1:] for name in ("F32", "Q4_0"))
    weights = {name: FILES[name].stat().st_size for name in ("F32", "Q4_0")}
    assert min(heavy) - max(light) > 0.7 * (weights["F32"] - weights["Q4_0"])
    assert max(light) - min(light) < 2 << 20
    assert max(heavy) - min(heavy) < 2 << 20


def test_with_the_real_loader(old: Plain) -> None:
    """Weights made anew while serving are those of a start with that type, and so is the model's identity."""
    served, plain = Served(), Plain("none", IsqOptions(type=NEW))
    try:
        with served.switching("q4-0", "drain"):
            served.step()
        for i, prompt in enumerate(prompts(old, 3)):
            served.engine.add(request(f"r{i}", prompt, seed=i))
            served.finish()
            assert served.ids(f"r{i}") == plain(prompt, seed=i)[0].token_ids
        assert served.switch.isq_type == plain.isq_type == NEW
    finally:
        served.close()
        plain.close()


@pytest.fixture
def calibration_text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(DEFAULT_TEXT.read_text(encoding="utf-8")[:4000], encoding="utf-8")
    return path


def test_a_calibration_text_is_read_once_for_each_making(
    calibration_text: Path, old: Plain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the model as it is, on the engine's own threads; the weights are those of a start with that type and text."""
    isq = IsqOptions(type="Q4_K", calibration_file=str(calibration_text))
    seen: list[tuple[IsqOptions | None, str]] = []

    def measured(files: ModelFiles, text: str) -> Any:
        seen.append((files.isq, text))
        return measure_inputs(files, text)

    monkeypatch.setattr(calibration, "measure_inputs", measured)
    plain = Plain("none", replace(isq, type="Q3_K"))
    served = Served(source=ModelSource(isq=isq))
    assert seen == [(None, calibration_text.read_text())] * 2
    try:
        with monkeypatch.context() as patch:
            patch.setattr(torch, "set_num_threads", lambda count: pytest.fail("the process has other threads now"))
            with served.switching("Q3_K", "drain"):
                served.step()
        assert seen == [(None, calibration_text.read_text())] * 3
        prompt = prompts(old, 1)[0]
        served.engine.add(request("r", prompt, seed=1))
        served.finish()
        assert served.ids("r") == plain(prompt, seed=1)[0].token_ids
        runner: Any = served.engine.parts.runner
        assert same(runner.model, plain.model)
    finally:
        served.close()
        plain.close()


def test_replicas_on_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    served = Served(source=ModelSource())
    try:
        needed = served.switch.plan("Q8_0").needed
        monkeypatch.setattr(switch_plan, "free_bytes", lambda device: 3 * needed - 1)
        assert not served.switch.plan("Q8_0", 2).in_place
        assert served.switch.plan("Q8_0", 3).in_place
        with pytest.raises(Conflict, match=rf"; {(3 * needed - 1) // 4} bytes are free for each of 4 replicas, "):
            served.switch.plan("Q8_0", 4)
        # A GPU's memory is the replica's own.
        monkeypatch.setattr(switch_plan, "gpu_memory", lambda device: (1, 1))
        assert not served.switch.plan("Q8_0", 4).in_place
    finally:
        served.close()


def test_a_calibration_takes_memory_too(calibration_text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = Served(source=ModelSource(isq=IsqOptions(type="Q4_K", calibration_file=str(calibration_text))))
    try:
        plan, needed = served.switch.plan("Q3_K"), memory_bytes(resolve(ModelSource())) + switch_plan.MARGIN_BYTES
        assert plan.needed == needed > served.switch.plan("none").needed
        monkeypatch.setattr(switch_plan, "free_bytes", lambda device: needed - 1)
        assert served.switch.plan("Q3_K").in_place
        assert not served.switch.plan("none").in_place
        monkeypatch.setattr(switch_plan, "free_bytes", lambda device: needed - 10_000_000)
        with pytest.raises(Conflict, match=f"as Q3_K need {needed} bytes"):
            served.switch.plan("Q3_K")
        # On a GPU it is the host's memory that the text's reading takes.
        monkeypatch.setattr(switch_plan, "free_bytes", lambda device: needed)
        monkeypatch.setattr(switch_plan, "gpu_memory", lambda device: (1, 1))
        assert served.switch.plan("Q3_K").needed < needed
        monkeypatch.setattr(switch_plan, "free_memory_bytes", lambda: needed - 1)
        with pytest.raises(Conflict, match=f"read on the CPU, which needs {needed} bytes; {needed - 1} bytes are free"):
            served.switch.plan("Q3_K")
        assert served.switch.plan("none").isq is None
    finally:
        served.close()


def test_preparing_gives_way(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that makes weights has a lower priority, and leaves the team of threads to the engine."""
    import os

    niceness: list[int] = []

    def load(files: Any, **options: Any) -> Any:
        niceness.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        return load_other_file(files, **options)

    monkeypatch.setattr(model_switch, "load_model", load)
    served.switch.prepare(served.switch.plan(NEW), lambda done: None)
    mine = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    assert niceness == [min(19, mine + 10)]
    served.switch.undo()


def test_angles_by_length_are_those_of_the_new_weights(tmp_path: Path) -> None:
    """Dynamic rope keeps angles for each length beyond the original one: they belong to a model."""
    CASES["here"] = ("Llama", {"vocab_size": 512, "num_hidden_layers": 2} | ROPES["dynamic"][1])
    hf_model("here").save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        copy(MODELS / "hf" / name, tmp_path / name)
    prompt, short = list(range(20, 80)), list(range(20, 50))
    served = Served(source=ModelSource(model=str(tmp_path)))
    try:
        served.engine.add(request("before", list(range(120, 180)), temperature=0.0, max_tokens=8))
        served.finish()
        served.engine.add(request("short", short, temperature=0.0, max_tokens=30))
        served.step(4)
        served.engine.add(request("during", prompt, temperature=0.0, max_tokens=30))
        served.step()
        assert not served.ids("during")
        known = len(served.ids("short"))
        assert 0 < known < 10
        with served.switching("Q8_0", "swap"):
            served.step()
        served.switch.settle()
        served.finish()
    finally:
        served.close()
    with LLM(ModelSource(model=str(tmp_path), isq=IsqOptions("Q8_0")), config=CONFIG) as plain:
        greedy = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in (30, 30 - known)]
        during, after = plain.generate([prompt, short + served.ids("short")[:known]], greedy)
    assert served.ids("during") == during.token_ids
    assert served.ids("short")[known:] == after.token_ids


def test_a_prompt_half_computed_has_log_probabilities_of_one_model(served: Served, new: Plain) -> None:
    """It was preempted in its middle: what it knew of the old weights goes."""
    prompt = new.encode("Once upon a time there was a little girl named Lily who lived in a house by the sea and " * 2)
    served.engine.add(request("a", prompt, logprobs=1, prompt_logprobs=True, max_tokens=1))
    served.step()
    scheduler = served.engine.parts.scheduler
    (running,) = scheduler.running
    assert running.prompt_logprobs
    scheduler.preempt(running)
    with served.switching(NEW, "swap"):
        served.step()
    served.switch.settle()
    served.finish()
    (found,) = [d.prompt_logprobs for d in served.deltas["a", 0] if d.prompt_logprobs]
    expected = new.prompt_logprobs(prompt, logprobs=1, prompt_logprobs=True, max_tokens=1)
    assert [p.token_id for p in found] == [p.token_id for p in expected]
    assert [p.logprob for p in found[1:]] == pytest.approx([p.logprob for p in expected[1:]])
