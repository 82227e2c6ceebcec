"""What is done between two steps of an engine, when no request is being computed."""

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from serve_app.engine.scheduler import Scheduler


@dataclass(slots=True)
class _Action:
    """drains: only once nothing runs. holds_after: new requests go on waiting when it is done."""

    run: Callable[[], None]
    drains: bool
    holds_after: bool
    done: "Future[None]" = field(default_factory=Future)


class Border:
    """Actions for the stepping thread, in the order in which they were posted.

    post and withdraw may be called from any thread; cross only between two steps, when none is under way.
    """

    def __init__(self, scheduler: Scheduler, wake: threading.Event) -> None:
        self._scheduler = scheduler
        self._wake = wake
        self._actions: deque[_Action] = deque()
        self._lock = threading.Lock()
        self._held_since_s: float | None = None
        # The last action that was run wanted it so.
        self._stays_held = False

    @property
    def is_due(self) -> bool:
        """Whether an action waits."""
        return bool(self._actions)

    def post(self, run: Callable[[], None], *, drains: bool, holds_after: bool = False) -> "Future[None]":
        """Has run called between two steps; the future has its exception, which the engine never sees.

        drains: requests that run end first, new ones wait meanwhile. holds_after: these wait on, until another action
        was run without an error.
        """
        action = _Action(run, drains, holds_after)
        with self._lock:
            self._actions.append(action)
        self._wake.set()
        return action.done

    def withdraw(self, done: "Future[None]") -> bool:
        """Takes an action back; False if it was run already. Requests that waited for it alone go on."""
        with self._lock:
            found = next((action for action in self._actions if action.done is done), None)
            if found is None:
                return False
            self._actions.remove(found)
            done.cancel()
            done.set_running_or_notify_cancel()
            # The stepping thread lets waiting requests go on, as after any action.
            self._actions.append(_Action(lambda: None, drains=False, holds_after=self._stays_held))
        self._wake.set()
        return True

    def may_be_crossed(self) -> bool:
        """Whether an action could run as soon as no step is under way. One that waits for requests to end does not let
        new ones begin from here on. On the stepping thread."""
        if not self._actions:
            return False
        with self._lock:
            action = self._actions[0] if self._actions else None
        if action is None or not action.drains:
            return action is not None
        self._hold()
        return is_drained(self._scheduler)

    def cross(self) -> None:
        """Runs what is due. On the stepping thread."""
        while self._actions:
            with self._lock:
                if not self._actions:
                    return
                action = self._actions[0]
                if action.drains:
                    self._hold()
                    if not is_drained(self._scheduler):
                        return
                self._actions.popleft()
            self._run(action)

    def _run(self, action: _Action) -> None:
        error: BaseException | None = None
        try:
            action.run()
            self._stays_held = action.holds_after
        except BaseException as raised:  # its owner's to judge
            error = raised
        if not self._stays_held:
            self._release()
        if error is None:
            action.done.set_result(None)
        else:
            action.done.set_exception(error)

    def _hold(self) -> None:
        if self._held_since_s is None:
            self._held_since_s = time.monotonic()
            self._scheduler.holds_new = True

    def _release(self) -> None:
        """Lets new requests run. The time for which they were held does not count as waiting."""
        if self._held_since_s is None:
            return
        now = time.monotonic()
        for request in self._scheduler.waiting:
            request.arrival_s += now - max(request.arrival_s, self._held_since_s)
        self._held_since_s = None
        self._scheduler.holds_new = False


def is_drained(scheduler: Scheduler) -> bool:
    """Whether no request has begun that has not ended: none runs, and none waits to run again."""
    return not scheduler.running and not any(request.has_begun for request in scheduler.waiting)
