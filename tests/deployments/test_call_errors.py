"""Every way in which a call can fail has a place among OpenAI's errors."""

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, RayTaskError, TaskCancelledError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RequestCancelledError

from deployments.call_errors import ReplicaLost, to_serve_error
from serve_app.errors import ContextTooLong, EngineFailed, QueueFull, ServeError, Unavailable


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (BackPressureError(1, 1), QueueFull),
        (ActorDiedError(), ReplicaLost),
        (ActorUnavailableError("gone", b"x" * 16), ReplicaLost),
        (DeploymentUnavailableError(DeploymentID("Target")), Unavailable),
        (TaskCancelledError(), Unavailable),
        (RequestCancelledError("id"), Unavailable),
        (TimeoutError(), Unavailable),
        (GetTimeoutError("late"), Unavailable),
        (KeyError("secret"), EngineFailed),
    ],
)
def test_kinds(error, kind):
    mapped = to_serve_error(error, retry_after_s=9.0)
    assert isinstance(mapped, kind)
    assert "secret" not in mapped.message
    if mapped.status in (429, 503):
        assert mapped.retry_after_s is not None


def test_our_own_errors_come_out_as_they_went_in():
    inner = ContextTooLong("too long", param="prompt")
    wrapped = RayTaskError("f", "Traceback …", inner).as_instanceof_cause()
    assert to_serve_error(inner, retry_after_s=1) is inner
    mapped = to_serve_error(wrapped, retry_after_s=1)
    assert isinstance(mapped, ContextTooLong)
    assert not isinstance(mapped, RayTaskError)
    assert (mapped.message, mapped.param) == ("too long", "prompt")


def test_a_queue_tells_the_engines_estimate():
    mapped: ServeError = to_serve_error(BackPressureError(1, 1), retry_after_s=9.0)
    assert mapped.retry_after_s == 9.0
