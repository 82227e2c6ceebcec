"""k8s/Dockerfile and k8s/compose.yaml."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app import __version__, cli

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "k8s" / "Dockerfile").read_text(encoding="utf-8")


@pytest.fixture
def service() -> dict[str, Any]:
    compose = yaml.safe_load((ROOT / "k8s" / "compose.yaml").read_text(encoding="utf-8"))
    [service] = compose["services"].values()
    return dict(service)


def test_the_command_is_one_that_the_program_takes(service: dict[str, Any]) -> None:
    invocation = cli.parse(service["command"])
    assert invocation is not None
    http = invocation.config.http
    assert invocation.command == "serve"
    assert http.host == "0.0.0.0"
    assert f"127.0.0.1:{http.port}:{http.port}" in service["ports"]
    assert f":{http.port}/health" in service["healthcheck"]["test"][-1]


def test_secrets_come_from_the_environment(service: dict[str, Any]) -> None:
    invocation = cli.parse(service["command"])
    assert invocation is not None
    references = (*invocation.config.http.api_keys, invocation.config.model.token_source)
    for reference in references:
        name = reference.removeprefix("env:")
        assert service["environment"][name].startswith(f"${{{name}:?")


def test_the_image_is_the_one_built_here(service: dict[str, Any]) -> None:
    assert service["build"]["dockerfile"] == "k8s/Dockerfile"
    assert (ROOT / "k8s" / service["build"]["context"]).resolve() == ROOT
    [ray] = re.findall(r"^ARG RAY_VERSION=(.*)$", DOCKERFILE, re.MULTILINE)
    assert service["image"] == f"sirocco:{__version__}-ray{ray}"
    assert service["image"] in DOCKERFILE


def test_everything_copied_into_the_image_exists_and_is_let_through() -> None:
    ignore = (ROOT / "k8s" / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE)
    for name in " ".join(copied).split():
        assert (ROOT / name).exists()
        assert f"!{name}" in ignore
    assert ignore[0] == "*"


def test_the_image_installs_normally_as_another_user() -> None:
    assert "--editable" not in DOCKERFILE
    assert re.search(r"^USER 1000$", DOCKERFILE, re.MULTILINE)
    assert ":latest" not in DOCKERFILE
    [torch] = re.findall(r"^ARG TORCH_VERSION=(.*)$", DOCKERFILE, re.MULTILINE)
    assert f"torch=={torch}" in (ROOT / "Makefile").read_text(encoding="utf-8")
