"""The life of one generation request: run the backend, watch client and clocks, answer."""

import asyncio
import json
import time
from collections.abc import Coroutine, Sequence
from typing import Any

from starlette.responses import Response

from serve_app.api.backend import Backend, DeltaSink
from serve_app.api.call import Call
from serve_app.api.error_shape import ClientGone, as_serve_error, error_frame
from serve_app.api.frames import KEEP_ALIVE, closing_frames, frame_encoder
from serve_app.api.limits import Receive
from serve_app.api.responses import Head, Tally, answer, usage_object
from serve_app.api.sinks import Clock, StreamSink, WholeSink
from serve_app.api.stream import SseWriter
from serve_app.config import HttpConfig
from serve_app.errors import ServeError, Unavailable
from serve_app.messages import PromptInput
from serve_app.metrics import HttpMetrics

# How long a cancelled backend call may take to give up before it is left behind.
_CANCEL_GRACE_S = 5.0
_MAX_TICK_S = 1.0


class AlreadySent(Response):
    """Stands for a response that went out past the framework."""

    async def __call__(self, *_: Any) -> None:
        return


class Generation:
    """One generation request of one or more prompts."""

    def __init__(
        self,
        call: Call,
        head: Head,
        prompts: Sequence[PromptInput],
        backend: Backend,
        config: HttpConfig,
        metrics: HttpMetrics,
    ) -> None:
        self._call = call
        self._head = head
        self._backend = backend
        self._config = config
        self._metrics = metrics
        self._clock = Clock(metrics, call.arrived)
        self._prompts = prompts
        self._tallies: list[Tally] = []

    async def whole(self, receive: Receive) -> Response:
        """The answer in one piece. Raises ServeError, ClientGone."""
        self._tallies = self._new_tallies(keep_text=True)
        sinks = [WholeSink(tally, self._clock) for tally in self._tallies]
        try:
            await self._watched(self._generate(sinks), receive, None)
        finally:
            self._note_outcome()
        return Response(json.dumps(answer(self._head, self._tallies)), media_type="application/json")

    async def stream(self, receive: Receive) -> Response:
        """The answer as events. Raises ServeError only while nothing has been sent, ClientGone at any time."""
        writer = SseWriter(self._call.send, self._config.max_stream_backlog)
        self._tallies = self._new_tallies(keep_text=self._config.request_logging_file is not None)
        sinks = [StreamSink(tally, frame_encoder(self._head, tally), writer, self._clock) for tally in self._tallies]
        try:
            await self._watched(self._stream_to_end(sinks, writer), receive, writer)
        except Exception as error:
            if not writer.has_started or isinstance(error, ClientGone):
                raise
            await self._end_with_error(writer, error)
        finally:
            if writer.has_started:
                self._call.code = 200
            await writer.close()
            self._note_outcome()
        return AlreadySent()

    def _new_tallies(self, keep_text: bool) -> list[Tally]:
        tallies: list[Tally] = []
        num_choices = 0
        for prompt in self._prompts:
            tallies.append(Tally(prompt, num_choices, keep_text))
            num_choices += len(tallies[-1].outputs)
        return tallies

    async def _generate(self, sinks: Sequence[DeltaSink]) -> None:
        """Runs all prompts to their end; the first failure ends them all."""
        if len(sinks) == 1:
            await self._backend.generate(self._prompts[0], sinks[0])
        else:
            await _all_or_none(
                [self._backend.generate(prompt, sink) for prompt, sink in zip(self._prompts, sinks, strict=True)]
            )
        for tally in self._tallies:
            if (error := tally.failure()) is not None:
                raise error

    async def _stream_to_end(self, sinks: Sequence[StreamSink], writer: SseWriter) -> None:
        await self._generate(sinks)
        await writer.end(closing_frames(self._head, self._tallies))

    async def _end_with_error(self, writer: SseWriter, error: Exception) -> None:
        """A failure after the first token is an event; the stream then ends without [DONE]."""
        self._call.error = as_serve_error(error)
        try:
            async with asyncio.timeout(_CANCEL_GRACE_S):
                await writer.end(error_frame(self._call.error))
        except TimeoutError:
            raise ClientGone("client too slow") from None

    async def _watched(self, work: Coroutine[Any, Any, None], receive: Receive, writer: SseWriter | None) -> None:
        """Awaits `work`, and cancels it when the client leaves or a time limit is over."""
        watch = _Watch(self._clock, self._config, writer)
        task = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(_disconnected(receive))
        waiting: set[asyncio.Future[Any]] = {task, gone}
        if writer is not None:
            waiting.add(writer.failed)
        try:
            while True:
                done, _ = await asyncio.wait(waiting, timeout=watch.tick_s, return_when=asyncio.FIRST_COMPLETED)
                if task in done:
                    return task.result()
                if gone in done:
                    raise ClientGone("client left")
                if writer is not None and writer.failed in done:
                    raise writer.failed.result()
                watch.check()
        finally:
            gone.cancel()
            task.cancel()
            await asyncio.wait({task, gone}, timeout=_CANCEL_GRACE_S)

    def _note_outcome(self) -> None:
        """Tells metrics and request log how it went."""
        clock, outcome = self._clock, self._call.outcome
        self._metrics.duration.observe(time.monotonic() - clock.arrived)
        if clock.first_token is not None:
            outcome["first_token_s"] = round(clock.first_token - clock.arrived, 6)
            outcome["decode_s"] = round(clock.last_token - clock.first_token, 6)
        outcome["usage"] = usage_object(self._tallies)
        outcome["response"] = [
            {
                "index": tally.first_index + number,
                "text": "".join(output.text),
                "finish_reason": output.finish.reason if output.finish else None,
            }
            for tally in self._tallies
            for number, output in enumerate(tally.outputs)
        ]


class _Watch:
    """The clocks of one request: first token, next token, slow client, keep-alive."""

    def __init__(self, clock: Clock, config: HttpConfig, writer: SseWriter | None) -> None:
        self._clock = clock
        self._config = config
        self._writer = writer
        self._unstuck_at = clock.arrived
        shortest = min(
            config.first_token_timeout_s,
            config.idle_stream_timeout_s,
            config.slow_client_timeout_s,
            config.keep_alive_s,
        )
        self.tick_s = min(_MAX_TICK_S, shortest / 4)

    def check(self) -> None:
        """Raises Unavailable when the tokens, ClientGone when the client takes too long; else may send a comment."""
        now = time.monotonic()
        writer = self._writer
        if writer is not None and writer.stuck_since is not None:
            if now - writer.stuck_since > self._config.slow_client_timeout_s:
                raise ClientGone("client too slow")
            # A request is paused for a slow client: its silence is not the engine's fault.
            self._unstuck_at = now
            return
        if self._clock.first_token is None:
            if now - self._clock.arrived > self._config.first_token_timeout_s:
                raise self._waited("its first token", self._config.first_token_timeout_s)
        elif now - max(self._clock.last_token, self._unstuck_at) > self._config.idle_stream_timeout_s:
            raise self._waited("its next token", self._config.idle_stream_timeout_s)
        if writer is not None and now - writer.written_at >= self._config.keep_alive_s:
            writer.write(KEEP_ALIVE)

    def _waited(self, what: str, limit_s: float) -> ServeError:
        return Unavailable(f"The request waited longer than {limit_s:g} s for {what}.", retry_after_s=limit_s / 10)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _all_or_none(jobs: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Runs all jobs at once. The first exception cancels the others, and is raised."""
    tasks = [asyncio.ensure_future(job) for job in jobs]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
