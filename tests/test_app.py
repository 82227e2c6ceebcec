"""The real application: `sirocco` as a process, on two CPUs, with the embedded model."""

import json
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from serve_app import app
from serve_app.config import AppConfig, DeploymentConfig, HttpConfig, IsqConfig, ModelConfig, SpeculationConfig
from serve_app.errors import LaunchError, ModelFileError
from serve_app.options import IsqOptions, ModelSource
from tests.server_process import Server, free_port


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    started = Server()
    yield started.wait()
    started.kill()


def story(client: openai.OpenAI, **more: object) -> str:
    options = {"prompt": "Once upon a time", "max_tokens": 24, "temperature": 0, **more}
    return client.completions.create(model="default", **options).choices[0].text  # type: ignore[call-overload, no-any-return]


@pytest.mark.ray
class TestRunning:
    """Against one server for all; the last test of the class ends it."""

    def test_health_told_of_the_loading(self, server):
        assert 503 in server.health_seen
        assert server.health_seen[-1] == 200

    def test_nothing_listens_but_on_the_host_asked_for(self, server):
        story(server.client())
        pids = {process.pid for process in server.processes()}
        lines = subprocess.run(["ss", "-Hltunp"], capture_output=True, text=True, check=True).stdout.splitlines()
        ours = [line.split() for line in lines if any(f"pid={pid}," in line for pid in pids)]
        addresses = {fields[4].rsplit(":", 1)[0] for fields in ours}
        assert len(ours) > 3
        assert addresses <= {"127.0.0.1", "[::ffff:127.0.0.1]", "[::1]"}
        assert any(fields[4].endswith(f":{server.port}") for fields in ours)

    def test_one_text_streamed_or_not_alone_or_among_others(self, server):
        client = server.client()
        whole = story(client)
        assert len(whole) > 20
        chunks = client.completions.create(
            model="default", prompt="Once upon a time", max_tokens=24, temperature=0, stream=True
        )
        assert "".join(chunk.choices[0].text for chunk in chunks) == whole
        with ThreadPoolExecutor(32) as pool:
            assert set(pool.map(lambda _: story(client), range(32))) == {whole}

    def test_errors_of_every_replica_arrive_in_openais_form(self, server):
        client = server.client()
        with pytest.raises(openai.BadRequestError) as caught:
            story(client, prompt="word " * 3000)
        assert caught.value.code == "context_length_exceeded"
        with pytest.raises(openai.BadRequestError) as caught:
            story(client, logit_bias={"99999999": 1})
        assert caught.value.param == "logit_bias"

    def test_a_client_that_leaves_frees_its_blocks(self, server):
        client = server.client()
        total = server.metric("sirocco_kv_blocks_total")
        for is_early in (True, False):
            stream = client.completions.create(
                model="default", prompt="Once", max_tokens=480, n=4, stream=True, extra_body={"ignore_eos": True}
            )
            if not is_early:
                for _ in range(20):
                    next(iter(stream))
            stream.close()
            server.until("sirocco_requests_running", 0.0)
            assert server.metric("sirocco_kv_blocks_used") == 0.0
        assert server.metric("sirocco_kv_blocks_total") == total
        assert server.metric("sirocco_targets") == 1.0

    def test_no_replica_without_need_has_torch(self, server):
        for process in server.processes():
            maps = Path(f"/proc/{process.pid}/maps").read_text(encoding="utf-8", errors="replace")
            has_torch = "libtorch" in maps
            assert has_torch == ("Target" in process.name()), process.name()

    def test_ctrl_c_tells_open_streams_and_leaves_nothing(self, server):
        stream = server.client().completions.create(
            model="default", prompt="Once", max_tokens=500, n=8, stream=True, extra_body={"ignore_eos": True}
        )
        errors: list[Exception] = []
        has_begun = threading.Event()

        def read() -> None:
            try:
                for _ in stream:
                    has_begun.set()
            except Exception as error:
                errors.append(error)

        reader = threading.Thread(target=read)
        reader.start()
        assert has_begun.wait(10)
        directories = [p for p in Path("/tmp").glob("sirocco-*") if (p / "log").exists()]
        assert server.end(signal.SIGINT) == 0, "".join(server.output)
        reader.join(5)
        assert "shutting down" in str(errors[0])
        assert isinstance(errors[0], openai.APIError)
        assert not isinstance(errors[0], openai.APIConnectionError)
        assert "Traceback" not in "".join(server.output)
        assert f"http://127.0.0.1:{server.port}/v1" in "".join(server.output)
        assert any(not p.exists() for p in directories)


@pytest.mark.ray
@pytest.mark.nightly
@pytest.mark.parametrize("proxy", ["haproxy", "python"])
def test_the_other_edges_serve_too(proxy):
    server = Server("--proxy", proxy).wait()
    try:
        TestRunning().test_nothing_listens_but_on_the_host_asked_for(server)
        TestRunning().test_a_client_that_leaves_frees_its_blocks(server)
        assert server.end(signal.SIGTERM) == 0
    finally:
        server.kill()


@pytest.mark.ray
@pytest.mark.nightly
def test_a_target_that_dies_is_an_error_event_and_is_replaced():
    server = Server().wait()
    try:
        client = server.client()
        stream = client.completions.create(
            model="default", prompt="Once", max_tokens=500, n=8, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        next(p for p in server.processes() if "Target" in p.name()).kill()
        with pytest.raises(openai.APIError, match="lost"):
            list(stream)
        assert server.get("/health")[0] == 503
        server.wait()
        assert story(client)
        assert server.end() == 0
    finally:
        server.kill()


@pytest.mark.ray
@pytest.mark.nightly
def test_a_signal_while_starting_leaves_nothing():
    server = Server()
    try:
        time.sleep(8)
        assert server.end(signal.SIGINT) == app.EXIT_INTERRUPTED
    finally:
        server.kill()


@pytest.mark.ray
def test_a_missing_tensor_is_found_before_anything_listens(tmp_path):
    asset = Path(app.__file__).parent / "assets" / "stories3M-Q8_0.gguf"
    file = tmp_path / "bad.gguf"
    file.write_bytes(asset.read_bytes().replace(b"blk.0.attn_q.weight", b"blk.0.attn_X.weight"))
    server = Server("gguf", "-m", str(tmp_path), "-f", file.name)
    try:
        assert server.process.wait(120) == app.EXIT_USAGE
        assert server.all_output() == f"sirocco: {file}: tensor 'blk.0.attn_q.weight' is missing\n"
        assert server.get("/health")[0] == 0
    finally:
        server.kill()


def test_a_taken_port_ends_the_start_before_anything_runs():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(LaunchError, match=f"cannot listen on 127.0.0.1:{port}"):
            app.run(AppConfig(http=HttpConfig(port=port)))


def test_the_port_is_kept_for_as_long_as_the_server_runs(monkeypatch):
    port = free_port()

    class Runs:
        def __init__(self, *_: object) -> None: ...

        def run(self) -> int:
            with socket.socket() as other, pytest.raises(OSError, match="in use"):
                other.bind(("127.0.0.1", port))
            return 7

    monkeypatch.setattr(app, "_Server", Runs)
    monkeypatch.setattr(app, "HeaderCheck", Runs)
    assert app.run(AppConfig(http=HttpConfig(port=port))) == 7
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))


def test_a_bad_file_ends_the_start_before_anything_runs(tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF but no more")
    model = ModelConfig(kind="gguf", model=str(tmp_path), files=("bad.gguf",))
    with pytest.raises(ModelFileError, match=r"bad\.gguf"):
        app.run(AppConfig(model=model, http=HttpConfig(port=free_port())))


def test_a_key_that_is_not_there_ends_the_start(monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(LaunchError, match="NO_SUCH_KEY"):
        app.run(AppConfig(http=HttpConfig(port=free_port(), api_keys=("env:NO_SUCH_KEY",))))


def test_names_of_local_files_are_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "token").write_text("t")
    config = AppConfig(
        model=ModelConfig(model="model", token_source="path:token", chat_template="{{ messages }}" * 400),
        http=HttpConfig(request_logging_file="requests.jsonl"),
    )
    absolute = app.with_absolute_paths(config)
    assert absolute.model.model == str(tmp_path / "model")
    assert absolute.model.token_source == f"path:{tmp_path / 'token'}"
    assert absolute.model.chat_template == config.model.chat_template
    assert absolute.http.request_logging_file == str(tmp_path / "requests.jsonl")
    assert app.with_absolute_paths(AppConfig(model=ModelConfig(model="org/name"))).model.model == "org/name"
    speculation = SpeculationConfig(use="auto", draft=ModelConfig(model="model", isq=IsqConfig(topology="t.yml")))
    draft = app.with_absolute_paths(AppConfig(speculation=speculation)).speculation.draft
    assert draft == ModelConfig(model=str(tmp_path / "model"), isq=IsqConfig(topology=str(tmp_path / "t.yml")))


def test_the_files_of_in_situ_quantization_are_named_in_full(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    isq = IsqConfig(type="Q4K", imatrix="i.dat", topology="t.yml", cache="not-there-yet")
    found = app.with_absolute_paths(AppConfig(model=ModelConfig(model="org/name", isq=isq))).model.isq
    assert found == IsqConfig(
        type="Q4K",
        imatrix=str(tmp_path / "i.dat"),
        topology=str(tmp_path / "t.yml"),
        cache=str(tmp_path / "not-there-yet"),
    )


@pytest.mark.parametrize("before", [[], [ModelSource()]])
def test_the_header_check_looks_at_the_quantisation_of_both_models(tmp_path, before):
    source = ModelSource(isq=IsqOptions(type="Q4K", imatrix=str(tmp_path / "i.dat")))
    check = app.HeaderCheck(*before, source)
    with pytest.raises(ModelFileError, match=r"i\.dat: cannot be read"):
        check.wait()


def test_a_draft_model_that_is_not_there_ends_the_start(tmp_path):
    draft = ModelConfig(kind="gguf", model=str(tmp_path), files=("draft.gguf",))
    config = AppConfig(speculation=SpeculationConfig(use="draft", draft=draft), http=HttpConfig(port=free_port()))
    with pytest.raises(ModelFileError, match=r"draft\.gguf"):
        app.run(config)


@pytest.mark.parametrize("as_data", [True, False])
def test_the_application_is_built_from_a_config_or_its_data(as_data):
    config = AppConfig(deployment=DeploymentConfig(ingress_replicas=2))
    application = app.build_app(json.loads(json.dumps(config.to_args())) if as_data else config)
    assert type(application).__name__ == "Application"
