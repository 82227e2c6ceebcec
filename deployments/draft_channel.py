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
    MOST_BYTES,
    BadMessage,
    Calls,
    Feed,
    Forget,
    Ring,
    answers_to,
    draft_calls,
    pack,
    read_by_draft,
)
from serve_app.engine.speculation.draft_call import DraftCall, Drafted, DraftModel
from serve_app.engine.speculation.waiting import MOST_SPIN_S, Mailbox, Waiting
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
        spin_s = self._quiet_since_s + MOST_SPIN_S - time.monotonic()
        return self._waiting.wait(None, spin_s)

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
            posted = None if target.mailbox is None else target.mailbox.take(target.num_packets)
            message = read_by_draft(self._packet(target) if posted is None else posted)
            if isinstance(message, Calls):
                self._answer(target, message, is_posted=posted is not None)
            elif isinstance(message, Feed):
                target.sequences.add(message.sequence)
                self._model.feed((target.number, message.sequence), message.token_ids, message.base)
            elif isinstance(message, Forget):
                for sequence in message.sequences:
                    target.sequences.discard(sequence)
                    self._model.forget((target.number, sequence))
        except (OSError, ValueError, BadMessage) as error:
            log.debug("the channel to a target ends: %r", error)
            self._drop(target)

    def _packet(self, target: "_Target") -> memoryview:
        connection = target.connection
        if target.num_packets:
            size = connection.recv_into(self._buffer)
        else:
            # Its first one may come with memory for a mailbox.
            first, memories, *_ = socket.recv_fds(connection, MOST_BYTES, 1)
            size = len(first)
            self._buffer[:size] = first
            for memory in memories:
                try:
                    target.mailbox = self._waiting.open_mailbox(memory, connection.fileno(), is_first=False)
                finally:
                    os.close(memory)
        if not size:
            raise ConnectionResetError
        target.num_packets += 1
        return memoryview(self._buffer)[:size]

    def _answer(self, target: "_Target", message: Calls, *, is_posted: bool) -> None:
        calls = draft_calls(message.calls, target.number)
        began_s = time.monotonic()
        drafts = self._propose(calls, began_s + message.limit_s)
        work_s = time.monotonic() - began_s + self._delay_s(message.sent_s)
        target.sequences.update([call.sequence for call in message.calls])
        target.send(pack(answers_to(message.calls, message.epoch, work_s, drafts)), is_posted)
        self._quiet_since_s = time.monotonic()

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
    """A socket to a target, the sequences that came through it, and the mailbox beside it, if there is one."""

    def __init__(self, number: int, connection: socket.socket) -> None:
        self.number = number
        self.connection = connection
        self.sequences: set[int] = set()
        self.mailbox: Mailbox | None = None
        self.num_packets = 0

    def send(self, answer: bytes, is_posted: bool) -> None:
        """By the way on which the calls came."""
        if not is_posted or self.mailbox is None:
            self.connection.send(answer)
        elif self.mailbox.post(answer, 0):
            self.connection.send(pack(Ring()))
