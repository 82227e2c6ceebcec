import json
import stat

import pytest

from serve_app.api.request_log import RequestLog
from serve_app.errors import EngineFailed, LaunchError


@pytest.mark.parametrize("stream", [False, True])
def test_a_line_tells_request_response_tokens_and_times(serve, backend, tmp_path, stream):
    path = tmp_path / "requests.jsonl"
    server = serve(backend, request_logging_file=str(path), api_keys=("very-secret",))
    answer = server.client("very-secret").chat.completions.create(model="x", messages="hi", n=2, stream=stream)
    list(answer)
    server.stop()
    (line,) = path.read_text().splitlines()
    record = json.loads(line)
    assert record["endpoint"] == "/v1/chat/completions"
    assert record["code"] == 200
    assert record["request"]["messages"] == "hi"
    assert [choice["index"] for choice in record["response"]] == [0, 1]
    assert record["response"][1]["text"].startswith("Once upon a time")
    assert record["response"][1]["finish_reason"] == "length"
    assert record["usage"]["completion_tokens"] == 22
    assert 0 < record["first_token_s"] <= record["total_s"]
    assert "very-secret" not in line
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_failures_are_logged_too(serve, backend, tmp_path):
    path = tmp_path / "requests.jsonl"
    server = serve(backend, request_logging_file=str(path))
    with server.client().with_options(max_retries=0) as client:
        for fields in ({"temperature": 9}, {}):
            backend.refusal = EngineFailed("Broke.")
            with pytest.raises(Exception, match=r"temperature|Broke"):
                client.chat.completions.create(model="x", messages="hi", **fields)
    server.stop()
    first, second = [json.loads(line) for line in path.read_text().splitlines()]
    assert (first["code"], second["code"]) == (400, 500)
    assert second["error"]["code"] == "engine_failed"


def test_a_log_that_cannot_be_opened_is_said_at_start(tmp_path):
    with pytest.raises(LaunchError, match="cannot be opened"):
        RequestLog(str(tmp_path / "no" / "such"))


def test_several_writers_share_a_file_line_by_line(tmp_path):
    path = str(tmp_path / "log")
    logs = [RequestLog(path), RequestLog(path)]
    for index in range(200):
        logs[index % 2].write({"index": index, "text": "x" * 1000})
    for log in logs:
        log.close()
        log.close()
    indices = [json.loads(line)["index"] for line in (tmp_path / "log").read_text().splitlines()]
    assert sorted(indices) == list(range(200))
