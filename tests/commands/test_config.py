import subprocess
import sys

import pytest
import yaml

from deployments import actor_options
from serve_app import __main__, cli
from serve_app.commands.config import render
from serve_app.config import AppConfig


def printed(line: str) -> str:
    invocation = cli.parse(["config", *line.split()])
    assert invocation is not None
    return render(invocation.config)


def test_the_file_builds_the_same_configuration() -> None:
    text = printed("--port 8080 --max-seqs 16 --num-targets 2 --log warn gguf -m REPO -f a.gguf;b.gguf")
    config = yaml.safe_load(text)
    [application] = config["applications"]
    assert application["import_path"] == "serve_app.app:build_app"
    assert config["http_options"] == {"host": "127.0.0.1", "port": 8080}
    assert config["logging_config"] == {"log_level": "WARNING"}
    rebuilt = AppConfig.model_validate(application["args"])
    assert rebuilt.model.files == ("a.gguf", "b.gguf")
    assert rebuilt.engine.max_seqs == 16
    assert rebuilt.deployment.target_replicas == 2


def test_only_what_differs_from_the_defaults_is_written() -> None:
    [application] = yaml.safe_load(printed("--ray-address ray.example:6379"))["applications"]
    assert application["args"] == {}


def test_secrets_are_never_printed(capsys: pytest.CaptureFixture[str]) -> None:
    line = "config --api-key sk-one --api-key env:MINE --api-key literal:sk-two --token-source literal:hf_three -m x"
    assert __main__.main(line.split()) == 0
    text = capsys.readouterr().out
    for secret in ("sk-one", "sk-two", "hf_three"):
        assert secret not in text
    args = yaml.safe_load(text)["applications"][0]["args"]
    assert args["http"]["api_keys"] == ["env:SIROCCO_API_KEY", "env:MINE", "env:SIROCCO_API_KEY_2"]
    assert args["model"]["token_source"] == "env:HF_TOKEN"
    for name in ("SIROCCO_API_KEY", "MINE", "SIROCCO_API_KEY_2", "HF_TOKEN"):
        assert f"#   {name}: " in text


def test_the_token_of_a_draft_model_is_no_less_secret() -> None:
    text = printed("--token-source literal:hf_three -m x -d y --draft-file z.gguf")
    assert "hf_three" not in text
    args = yaml.safe_load(text)["applications"][0]["args"]
    assert args["speculation"]["draft"] == {
        "model": "y", "kind": "gguf", "files": ["z.gguf"], "token_source": "env:HF_TOKEN",
    }  # fmt: skip


def test_keys_in_files_stay_there() -> None:
    args = yaml.safe_load(printed("--api-key path:/run/keys"))["applications"][0]["args"]
    assert args["http"]["api_keys"] == ["path:/run/keys"]


def test_the_nodes_environment_is_named() -> None:
    text = printed("--proxy python")
    config = AppConfig.model_validate(yaml.safe_load(text)["applications"][0]["args"])
    environment = actor_options.node_environment(config)
    assert environment
    for name, value in environment.items():
        assert f"#   {name}={value}" in text


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m serve_app config | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stderr == ""
