"""k8s/rayservice.yaml, checked without a cluster."""

import copy
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from pydantic import BaseModel
from ray.serve.schema import ServeDeploySchema

from deployments import actor_options
from serve_app import cli
from serve_app.commands.config import render
from serve_app.config import AppConfig

ROOT = Path(__file__).resolve().parents[2]
MANIFEST = ROOT / "k8s" / "rayservice.yaml"
OUR_SCHEMA = ROOT / "tests" / "data" / "k8s" / "rayservice_schema.yaml"


# Prints the names of an application's deployments: argv is its import path and arguments.
BUILD = """
import json, sys
from ray._common.utils import import_attr
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve._private.build_app import build_app

application = call_user_app_builder_with_args_if_necessary(import_attr(sys.argv[1]), json.loads(sys.argv[2]))
print(*(deployment.name for deployment in build_app(application, name="sirocco").deployments))
"""


@cache
def _manifest_text() -> str:
    return MANIFEST.read_text(encoding="utf-8")


@pytest.fixture
def manifest() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(_manifest_text())
    return loaded


@pytest.fixture
def serve_config(manifest: dict[str, Any]) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    return loaded


def strict(schema: Any) -> Any:
    """A structural schema as JSON Schema: unknown keys refused wherever Kubernetes would drop them in silence."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    result = {key: strict(value) for key, value in schema.items()}
    properties = result.get("properties")
    if isinstance(properties, dict) and "x-kubernetes-preserve-unknown-fields" not in result:
        if isinstance(properties.get("metadata"), dict):
            properties["metadata"] = {"type": "object"}
        result["additionalProperties"] = False
    return result


@cache
def rayservice_schema() -> Any:
    path = os.environ.get("SIROCCO_RAYSERVICE_CRD") or OUR_SCHEMA
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    definition = yaml.load(Path(path).read_text(encoding="utf-8"), loader)
    [version] = [version for version in definition["spec"]["versions"] if version["name"] == "v1"]
    return strict(version["schema"]["openAPIV3Schema"])


def faults(document: dict[str, Any]) -> list[str]:
    """What the RayService schema finds wrong."""
    errors = jsonschema.Draft7Validator(rayservice_schema()).iter_errors(document)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in errors]


def unknown_keys(data: Any, model: Any, path: str = "") -> Iterator[str]:
    """Keys that a pydantic model would take without a word although it has no such field."""
    if isinstance(data, list):
        for i, item in enumerate(data):
            yield from unknown_keys(item, model, f"{path}[{i}]")
    elif isinstance(data, dict) and isinstance(model, type) and issubclass(model, BaseModel):
        for key, value in data.items():
            field = model.model_fields.get(key)
            if field is None:
                yield f"{path}.{key}"
                continue
            for part in _models_in(field.annotation):
                yield from unknown_keys(value, part, f"{path}.{key}")


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in getattr(annotation, "__args__", ()):
        yield from _models_in(part)


def groups(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The pod specs of head and workers, the head first."""
    cluster = manifest["spec"]["rayClusterConfig"]
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def test_the_manifest_fits_the_schema(manifest: dict[str, Any]) -> None:
    assert faults(manifest) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.rayClusterConfig.workerGroupSpecs.0.replicas", "two"),
        ("spec.rayClusterConfig.workerGroupSpecs.0.minReplica", 1),
        ("spec.rayClusterConfig.headGroupSpecs", {}),
        ("spec.rayClusterConfig.headGroupSpec.template.spec.container", []),
        ("spec.rayClusterConfig.headGroupSpec.rayStartParams", {"num-cpus": 0}),
        ("spec.rayClusterConfig.headGroupSpec.template.spec.containers.0.env", [{"name": "A", "value": 1}]),
        ("spec.rayClusterConfig.headGroupSpec.template.spec.containers.0.ports", [{"containerPort": "8000"}]),
        ("spec.rayClusterConfig.authOptions.mode", "tokens"),
        ("spec.serveConfig", ""),
        ("spec.serveConfigV2", {"applications": []}),
    ],
)
def test_the_schema_finds_mistakes(manifest: dict[str, Any], path: str, value: Any) -> None:
    document = copy.deepcopy(manifest)
    place: Any = document
    *parents, last = path.split(".")
    for key in parents:
        place = place[int(key)] if isinstance(place, list) else place[key]
    place[last] = value
    assert len(faults(document)) == 1


def test_the_serve_config_fits_rays_schema_without_unknown_keys(serve_config: dict[str, Any]) -> None:
    ServeDeploySchema.model_validate(serve_config)
    assert list(unknown_keys(serve_config, ServeDeploySchema)) == []


def test_unknown_keys_are_found() -> None:
    """Ray itself takes them."""
    typo = {"applications": [{"import_path": "a:b", "deployments": [{"name": "T", "num_replica": 2}]}], "proxy": 1}
    ServeDeploySchema.model_validate(typo)
    assert list(unknown_keys(typo, ServeDeploySchema)) == [".applications[0].deployments[0].num_replica", ".proxy"]


def test_the_serve_config_is_what_the_command_prints(manifest: dict[str, Any]) -> None:
    comments = re.findall(r"^# {2,}(.*)$", _manifest_text(), re.MULTILINE)
    program, command, *words = shlex.split(" ".join(comments))
    assert (program, command) == ("sirocco", "config")
    invocation = cli.parse([command, *words])
    assert invocation is not None
    printed = [line for line in render(invocation.config).splitlines() if not line.startswith("#")]
    assert manifest["spec"]["serveConfigV2"].splitlines() == printed


def test_the_arguments_are_a_configuration_and_the_names_are_those_of_the_application(
    serve_config: dict[str, Any],
) -> None:
    [application] = serve_config["applications"]
    names = [deployment["name"] for deployment in application["deployments"]]
    assert names == list(actor_options.deployment_names(AppConfig.model_validate(application["args"])))
    # As Serve does it on the cluster. A name that is not built would only be found there.
    done = subprocess.run(
        [sys.executable, "-c", BUILD, application["import_path"], json.dumps(application["args"])],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(done.stdout.split()) == sorted(names)


def test_every_node_has_the_environment_that_the_command_names(
    manifest: dict[str, Any], serve_config: dict[str, Any]
) -> None:
    config = AppConfig.model_validate(serve_config["applications"][0]["args"])
    secrets = {"SIROCCO_API_KEY", "HF_TOKEN"}
    for spec in groups(manifest):
        environment = {variable["name"]: variable for variable in spec["containers"][0]["env"]}
        plain = {name: variable["value"] for name, variable in environment.items() if name not in secrets}
        assert plain == actor_options.node_environment(config)
        for name in secrets:
            assert "value" not in environment[name]
            assert environment[name]["valueFrom"]["secretKeyRef"]["name"] == "sirocco-secrets"


def test_one_version_of_ray_everywhere(manifest: dict[str, Any]) -> None:
    ray = manifest["spec"]["rayClusterConfig"]["rayVersion"]
    images = {container["image"] for spec in groups(manifest) for container in spec["containers"]}
    assert len(images) == 1
    assert images.pop().endswith(f"-ray{ray}")
    dockerfile = (ROOT / "k8s" / "Dockerfile").read_text(encoding="utf-8")
    assert f"ARG RAY_VERSION={ray}\n" in dockerfile
    # Older ones let a web page send commands to the dashboard.
    assert tuple(map(int, ray.split("."))) >= (2, 54, 0)


def test_replicas_fit_into_the_workers_and_stay_off_the_head(
    manifest: dict[str, Any], serve_config: dict[str, Any]
) -> None:
    deployment = AppConfig.model_validate(serve_config["applications"][0]["args"]).deployment
    cluster = manifest["spec"]["rayClusterConfig"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    each = (deployment.ingress_cpus, deployment.preprocessor_cpus, deployment.target_cpus)
    assert all(each)
    wanted = (
        each[0] * deployment.ingress_replicas
        + each[1] * deployment.preprocessor_replicas
        + each[2] * (deployment.max_target_replicas or deployment.target_replicas)
    )
    [workers] = cluster["workerGroupSpecs"]
    cpus = int(workers["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
    assert wanted <= cpus * workers["maxReplicas"]
    assert each[2] <= cpus
    assert workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]


def test_pods_are_confined(manifest: dict[str, Any]) -> None:
    for spec in groups(manifest):
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["terminationGracePeriodSeconds"] > 30
        shared = {volume["name"] for volume in spec["volumes"] if volume.get("emptyDir", {}).get("medium") == "Memory"}
        for container in spec["containers"]:
            assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["resources"]["limits"] == container["resources"]["requests"]
            # KubeRay puts its own there.
            assert not {"livenessProbe", "readinessProbe"} & set(container)
            assert {m["name"] for m in container["volumeMounts"] if m["mountPath"] == "/dev/shm"} <= shared
    assert manifest["spec"]["rayClusterConfig"]["authOptions"]["mode"] == "token"


def test_the_serve_port_is_the_containers(manifest: dict[str, Any], serve_config: dict[str, Any]) -> None:
    port = serve_config["http_options"]["port"]
    for spec in groups(manifest):
        assert {"containerPort": port, "name": "serve"} in spec["containers"][0]["ports"]
    # A pod's own loopback is of no use to the proxy of another.
    assert serve_config["http_options"]["host"] == "0.0.0.0"


def test_volumes_policy_and_budget_name_what_the_manifest_has(manifest: dict[str, Any]) -> None:
    claim = yaml.safe_load((ROOT / "k8s" / "pvc.yaml").read_text(encoding="utf-8"))
    policy = yaml.safe_load((ROOT / "k8s" / "networkpolicy.yaml").read_text(encoding="utf-8"))
    budget = yaml.safe_load((ROOT / "k8s" / "disruptionbudget.yaml").read_text(encoding="utf-8"))
    cluster = manifest["spec"]["rayClusterConfig"]
    [workers] = cluster["workerGroupSpecs"]
    for group in (cluster["headGroupSpec"], workers):
        labels = group["template"]["metadata"]["labels"]
        assert policy["spec"]["podSelector"]["matchLabels"].items() <= labels.items()
        claims = [v["persistentVolumeClaim"]["claimName"] for v in group["template"]["spec"]["volumes"] if len(v) == 2
                  and "persistentVolumeClaim" in v]  # fmt: skip
        assert claims == [claim["metadata"]["name"]]
    assert budget["spec"]["minAvailable"] < workers["replicas"]
    open_ports = [
        port["port"] for rule in policy["spec"]["ingress"] if "from" not in rule for port in rule.get("ports", [None])
    ]
    assert open_ports == [8000]
