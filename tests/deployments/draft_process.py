"""A draft replica's process without Ray: a model that counts, and the real thread behind a real socket.

Takes the socket's folder, the model's class, and whether it spins; prints the socket's path, then waits to be killed.
"""

import sys
import threading
import time
from collections.abc import Hashable, Sequence

import numpy as np

from deployments.draft_channel import DraftThread
from serve_app.engine.speculation.draft_call import DraftCall, Drafted, SampledTokens


def sampled(token_ids: list[int], width: int) -> SampledTokens:
    """Tokens that were sampled from themselves and those after them, each as likely as its number says."""
    candidates = np.array(token_ids, np.int32)[:, None] + np.arange(width, dtype=np.int32)
    return SampledTokens(token_ids, candidates, (np.arange(1, width + 1) / candidates).astype(np.float32))


class CountingModel:
    """See DraftModel: proposes numbers that depend on all of the text. After a token SLOW + n it takes n ms."""

    SLOW = 1_000_000

    def __init__(self) -> None:
        self.texts: dict[Hashable, list[int]] = {}

    def propose(self, calls: Sequence[DraftCall], until_s: float | None = None) -> list[Drafted]:
        return [self._answer(call) for call in calls]

    def _answer(self, call: DraftCall) -> Drafted:
        text = self.texts.setdefault(call.sequence, []) if not call.base else self.texts.get(call.sequence)
        if text is None or len(text) < call.base:
            return None
        text[call.base :] = call.token_ids
        if text[-1] >= self.SLOW:
            time.sleep((text[-1] - self.SLOW) / 1000)
        return expected(text, call.max_tokens)

    def feed(self, sequence: Hashable, token_ids: Sequence[int], offset: int) -> None:
        text = self.texts.setdefault(sequence, [])
        if len(text) >= offset:
            text[offset:] = token_ids

    def advance(self) -> bool:
        return False

    def forget(self, sequence: Hashable) -> None:
        self.texts.pop(sequence, None)

    def close(self) -> None:
        self.texts.clear()


class EmptyModel(CountingModel):
    """Takes no time: the way alone is measured."""

    def _answer(self, call: DraftCall) -> Drafted:
        return list(range(call.max_tokens))


class BusyModel(CountingModel):
    """Always has something to do that nobody waits for."""

    def advance(self) -> bool:
        time.sleep(0.02)
        return True


def expected(text: Sequence[int], max_tokens: int) -> list[int]:
    """What CountingModel proposes: each token follows from all before it, drafted ones included."""
    total, drafted = sum(text), []
    for _ in range(max_tokens):
        drafted.append((7 * total + 3) % 500)
        total += drafted[-1]
    return drafted


if __name__ == "__main__":
    sys.setswitchinterval(0.0005)
    model = {"counting": CountingModel, "empty": EmptyModel, "busy": BusyModel}[sys.argv[2]]()
    thread = DraftThread(model, sys.argv[1], spins=sys.argv[3] == "True")
    thread.start()
    print(thread.path, flush=True)
    threading.Event().wait()
