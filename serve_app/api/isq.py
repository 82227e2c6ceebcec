"""Re-quantising while serving, as HTTP shows it."""

import json
from typing import Any

from starlette.responses import Response

from serve_app.api.backend import IsqJob, IsqState
from serve_app.api.error_shape import error_headers, error_object
from serve_app.api.schema import IsqRequest
from serve_app.errors import InvalidRequest

_FLAGS = {"true": True, "1": True, "": True, "false": False, "0": False}

DESCRIPTION: dict[str, Any] = {
    "parameters": [
        {
            "name": "wait",
            "in": "query",
            "schema": {"type": "boolean", "default": False},
            "description": "Answer when the job is over.",
        }
    ],
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": IsqRequest.model_json_schema()}},
    },
}
"""What FastAPI's schema cannot know of a route that reads its body by itself."""


def wanted_type(body: IsqRequest) -> str:
    """The type that is asked for, by the seed's name of the field or mistral.rs's. InvalidRequest without one."""
    given = {name: value for name in ("isq_type", "ggml_type") if (value := getattr(body, name)) is not None}
    if not given:
        raise InvalidRequest("isq_type is missing.", param="isq_type")
    if len({str(value) for value in given.values()}) > 1:
        raise InvalidRequest("isq_type and ggml_type mean the same: give one of them.", param="ggml_type")
    return str(next(iter(given.values())))


def wants_to_wait(value: str | None) -> bool:
    """The query parameter wait. InvalidRequest for what is neither true nor false."""
    if value is None:
        return False
    if value.lower() not in _FLAGS:
        raise InvalidRequest(f"wait must be true or false, not {value[:20]!r}.", param="wait")
    return _FLAGS[value.lower()]


def job_object(job: IsqJob) -> dict[str, Any]:
    """A job; an error is in OpenAI's shape."""
    return {
        "id": job.id,
        "object": "re_isq.job",
        "state": job.state,
        "isq_type": job.isq_type,
        "from_type": job.from_type,
        "mode": job.mode,
        "target": job.target,
        "in_place": job.in_place,
        "progress": round(job.progress, 4),
        "replicas": job.replicas,
        "created": job.created,
        "finished": job.finished,
        "error": None if job.error is None else error_object(job.error)["error"],
    }


def job_response(job: IsqJob) -> Response:
    """202 while it is at work, 200 when it is done, the status of its error where it failed."""
    status = 202 if not job.is_over else 200 if job.error is None else job.error.status
    headers = {} if job.error is None else error_headers(job.error)
    return Response(json.dumps(job_object(job)), status, headers=headers, media_type="application/json")


def state_object(state: IsqState) -> dict[str, Any]:
    """What is served, and the jobs."""
    draft = {} if state.draft_types is None else {"serving_draft": state.draft_types}
    return {"object": "list", "serving": state.isq_types, **draft, "data": [job_object(job) for job in state.jobs]}
