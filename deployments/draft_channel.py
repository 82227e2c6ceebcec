"""The draft's end of its channels: one thread that owns the draft model, and a socket for each target of this node."""

import logging
import os
import queue
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

from deployments.draft_messages import (
    FEED,
    FORGET,
    MOST_BYTES,
    PROPOSE,
    SAMPLE,
    BadMessage,
    Message,
    calls_of,
    pack_answer,
    unpack,
)
from serve_app.engine.speculation.draft_call import DraftCall, Drafted, DraftModel
from serve_app.engine.speculation.waiting import MOST_SPIN_S, Waiting
from serve_app.errors import Unavailable

log = logging.getLogger(__name__)

MAX_FAILURES_IN_A_ROW = 3


class DraftThread:
    """Computes for whoever asks, and what will be useful later while nobody does.

    A message is looked at between two forwards. Targets reach it by packets over a Unix socket, or by call() from any
    thread of this process. The names of a target's sequences are its own: they are kept apart, and forgotten with its
    socket.
    """

    def __init__(self, model: DraftModel, directory: str | None = None, *, spins: bool = False) -> None:
        """Owns the model. directory: where its socket lies, with others' files; None: a new one of its own. spins: see
        Waiting."""
        self._model = model
        self.num_failures = 0
        self._own_directory = None if directory else tempfile.TemporaryDirectory(prefix="sirocco-draft-")
        folder = directory or (self._own_directory.name if self._own_directory else "")
        self.path = str(Path(folder, f"draft-{os.getpid()}-{id(self):x}"))
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.setblocking(False)
        self._listener.bind(self.path)
        os.chmod(self.path, 0o600)
        self._listener.listen(16)
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._waiting = Waiting(spins=spins)
        for fd in (self._listener.fileno(), self._wake):
            self._waiting.add(fd)
        # Since when no target was answered.
        self._quiet_since_s = 0.0
        # The last packet, where it was one of calls.
        self._last_calls: memoryview | None = None
        # The last forward that nobody waited for: questions may have been on their way meanwhile.
        self._ahead_s = 0.0, 0.0
        self._sockets: dict[int, _Target] = {}
        self._num_accepted = 0
        self._posted: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._buffer = bytearray(MOST_BYTES)
        self._is_stopping = False
        self._is_broken = False
        # So that nobody writes into what has the wake's number next.
        self._posting = threading.Lock()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="draft", daemon=True)

    def start(self) -> None:
        """Begins to answer."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread and all channels, and frees the model."""
        self._post(self._stop)
        self._thread.join()

    @property
    def is_failed(self) -> bool:
        """Whether every forward fails."""
        return self._is_broken or self.num_failures >= MAX_FAILURES_IN_A_ROW or not self._thread.is_alive()

    def fail(self) -> None:
        """See DraftBorder."""
        self._is_broken = True

    def call(
        self, client: str, calls: Sequence[DraftCall], ended: Sequence[int], limit_s: float
    ) -> "Future[list[Drafted]]":
        """The same as by the channel, from any thread. client: whose sequences these are; ended: those to forget.

        Raises Unavailable after stop(), as between_calls."""
        future: Future[list[Drafted]] = Future()

        def run() -> None:
            for sequence in ended:
                self._model.forget((client, sequence))
            # A caller that gave up has cancelled it.
            if not future.set_running_or_notify_cancel():
                return
            named = [replace(call, sequence=(client, call.sequence)) for call in calls]
            future.set_result(self._propose(named, time.monotonic() + limit_s))

        self._post(run)
        return future

    def between_calls(self, run: Callable[[], None]) -> "Future[None]":
        """See DraftBorder. From any thread."""
        done: Future[None] = Future()

        def act() -> None:
            if not done.set_running_or_notify_cancel():
                return
            try:
                run()
            except BaseException as error:  # its owner's to judge
                done.set_exception(error)
            else:
                done.set_result(None)

        self._post(act)
        return done

    def _post(self, action: Callable[[], None]) -> None:
        with self._posting:
            if self._is_closed:
                raise Unavailable("The draft model's replica is shutting down.")
            self._posted.put(action)
            os.eventfd_write(self._wake, 1)

    # -- on the thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        is_busy = False
        while not self._is_stopping:
            readable = self._wait(is_busy)
            for fd in readable:
                if fd == self._wake:
                    self._take_posted()
                elif fd in self._sockets:
                    self._receive(self._sockets[fd])
                elif not self._is_stopping:
                    self._accept()
            is_busy = bool(readable) or self._advance()

    def _wait(self, is_busy: bool) -> list[int]:
        if is_busy:
            return self._waiting.wait(0.0, 0.0)
        self._rehearse()
        spin_s = self._quiet_since_s + MOST_SPIN_S - time.monotonic()
        return self._waiting.wait(None, spin_s)

    def _rehearse(self) -> None:
        """See ChannelLink: takes the last calls and packs an answer once more, for nobody."""
        if self._waiting.spins and self._last_calls is not None:
            message = unpack(self._last_calls)
            calls = calls_of(message, 0)
            pack_answer(0, 0.0, message.rows, [[0]] * len(calls))

    def _stop(self) -> None:
        self._is_stopping = True
        for target in list(self._sockets.values()):
            self._drop(target)
        self._listener.close()
        Path(self.path).unlink(missing_ok=True)
        if self._own_directory is not None:
            self._own_directory.cleanup()
        with self._posting:
            self._is_closed = True
            os.close(self._wake)
        self._model.close()

    def _take_posted(self) -> None:
        os.eventfd_read(self._wake)
        while not self._is_stopping:
            try:
                action = self._posted.get_nowait()
            except queue.Empty:
                return
            action()

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:  # gone again
            return
        connection.setblocking(False)
        self._num_accepted += 1
        self._sockets[connection.fileno()] = _Target(self._num_accepted, connection)
        self._waiting.add(connection.fileno())

    def _drop(self, target: "_Target") -> None:
        self._waiting.remove(target.connection.fileno())
        del self._sockets[target.connection.fileno()]
        target.connection.close()
        for sequence in target.sequences:
            self._model.forget((target.number, sequence))

    def _receive(self, target: "_Target") -> None:
        try:
            self._last_calls = None
            size = target.connection.recv_into(self._buffer)
            if not size:
                raise ConnectionResetError
            packet = memoryview(self._buffer)[:size]
            message = unpack(packet)
            self._take(target, message)
            self._last_calls = packet if message.kind == PROPOSE else None
        except BlockingIOError:
            return
        except (OSError, BadMessage) as error:
            log.debug("the channel to a target ends: %r", error)
            self._drop(target)

    def _take(self, target: "_Target", message: Message) -> None:
        number, rows = target.number, message.rows
        if message.kind in (PROPOSE, SAMPLE):
            until_s = time.monotonic() + message.seconds
            target.sequences.update([row[0] for row in rows])
            calls = calls_of(message, number)
            began_s = time.monotonic()
            answers = self._propose(calls, until_s)
            work_s = time.monotonic() - began_s + self._delay_s(message.sent_s)
            target.connection.send(pack_answer(message.epoch, work_s, rows, answers))
            self._quiet_since_s = time.monotonic()
        elif message.kind == FEED and len(rows) == 1:
            sequence, base, *_ = rows[0]
            target.sequences.add(sequence)
            self._model.feed((number, sequence), message.token_ids, base)
        elif message.kind == FORGET:
            for sequence, *_ in rows:
                target.sequences.discard(sequence)
                self._model.forget((number, sequence))
        else:
            raise BadMessage(f"kind {message.kind}")

    def _propose(self, calls: Sequence[DraftCall], until_s: float) -> list[Drafted]:
        try:
            answers = self._model.propose(calls, until_s)
        except Exception:  # a failing kernel: the targets go on without
            log.exception("a draft failed")
            self.num_failures += 1
            for call in calls:
                self._model.forget(call.sequence)
            return [None for _ in calls]
        self.num_failures = 0
        return answers

    def _advance(self) -> bool:
        began_s = time.monotonic()
        try:
            return self._model.advance()
        except Exception:  # nobody waits for it: the next call tells whether the model still works
            log.exception("drafting ahead failed")
            self.num_failures += 1
            return False
        finally:
            self._ahead_s = began_s, time.monotonic()

    def _delay_s(self, sent_s: float) -> float:
        """For how long a message waited for a forward that had begun."""
        began_s, ended_s = self._ahead_s
        return max(0.0, ended_s - max(began_s, sent_s))


class _Target:
    """A socket to a target, and the sequences that came through it."""

    def __init__(self, number: int, connection: socket.socket) -> None:
        self.number = number
        self.connection = connection
        self.sequences: set[int] = set()
