"""What Serve is told, and what Ray finds in its environment."""

import subprocess
import tempfile

import pytest
from pydantic import ValidationError
from ray import serve

from deployments import actor_options, draft_plan
from deployments.actor_options import (
    check_private,
    deployment_names,
    draft_options,
    ingress_options,
    node_environment,
    preprocessor_options,
    target_engine,
    target_options,
)
from deployments.edge import Edge, choose_edge, private_directory, private_environment
from serve_app import gpu_info
from serve_app.config import AppConfig, DeploymentConfig, EngineSettings, ModelConfig, SpeculationConfig
from serve_app.errors import LaunchError

ALL = (ingress_options, preprocessor_options, target_options)

DRAFTED = AppConfig(speculation=SpeculationConfig(use="draft", draft=ModelConfig(model="draft")))


@pytest.mark.parametrize("options_of", ALL)
@pytest.mark.parametrize("is_private", [True, False])
def test_nothing_is_left_to_serves_defaults(options_of, is_private):
    options = options_of(AppConfig(), is_private=is_private)
    assert options["max_ongoing_requests"] > 1000
    assert options["ray_actor_options"]["num_cpus"] == 0
    serve.deployment(lambda: None).options(**options)


@pytest.mark.parametrize("options_of", ALL)
def test_threads_are_stated_where_others_started_the_node(options_of):
    variables = options_of(AppConfig(), is_private=False)["ray_actor_options"]["runtime_env"]["env_vars"]
    assert int(variables["OMP_NUM_THREADS"]) >= 1


def test_the_target_takes_what_the_engine_takes():
    config = AppConfig(engine=EngineSettings(max_seqs=7, max_waiting=5))
    options = target_options(config, is_private=True)
    assert options["max_ongoing_requests"] >= 12
    assert options["num_replicas"] == 1


@pytest.mark.parametrize(
    ("engine", "deployment", "is_private", "threads", "shares"),
    [
        ({}, {}, True, 8, False),
        ({}, {"target_replicas": 3}, True, 2, False),
        ({}, {"target_replicas": 1, "max_target_replicas": 4}, True, 2, False),
        ({}, {"target_replicas": 20}, True, 1, True),
        ({"num_threads": 5}, {"target_replicas": 2}, True, 5, True),
        ({"num_threads": 4}, {"target_replicas": 2}, True, 4, False),
        ({}, {"target_replicas": 3}, False, 8, False),
        ({}, {"target_replicas": 3, "target_cpus": 2.5}, False, 2, False),
        ({"shares_cores": True}, {}, True, 8, True),
    ],
)
def test_replicas_of_one_machine_divide_its_cores(monkeypatch, engine, deployment, is_private, threads, shares):
    monkeypatch.setattr(actor_options, "num_physical_cores", lambda: 8)
    config = AppConfig(engine=EngineSettings(**engine), deployment=DeploymentConfig(**deployment))
    made = target_engine(config, is_private=is_private)
    assert (made.num_threads, made.shares_cores) == (threads, shares)


@pytest.mark.parametrize(
    ("device", "gpus", "is_private", "asked"),
    [
        ("auto", 0, True, None), ("auto", 2, True, 1), ("auto", 2, False, None), ("cpu", 2, True, None),
        ("cuda", 1, True, 1), ("cuda", 0, False, 1),
    ],
)  # fmt: skip
def test_a_target_takes_a_gpu(monkeypatch, device, gpus, is_private, asked):
    monkeypatch.setattr(gpu_info, "num_gpus", lambda: gpus)
    config = AppConfig(engine=EngineSettings(device=device))
    assert target_options(config, is_private=is_private)["ray_actor_options"].get("num_gpus") == asked


def test_more_targets_than_gpus_are_refused(monkeypatch):
    for module in (gpu_info, actor_options):
        monkeypatch.setattr(module, "num_gpus", lambda: 2)
    check_private(AppConfig(deployment=DeploymentConfig(target_replicas=2)))
    check_private(AppConfig(engine=EngineSettings(device="cpu"), deployment=DeploymentConfig(target_replicas=3)))
    with pytest.raises(LaunchError, match=r"--num-targets 3 takes a GPU for each target, this machine has 2"):
        check_private(AppConfig(deployment=DeploymentConfig(target_replicas=3)))


def test_targets_are_scaled_by_open_requests():
    config = AppConfig(deployment=DeploymentConfig(target_replicas=1, max_target_replicas=3))
    scaling = target_options(config, is_private=False)["autoscaling_config"]
    assert (scaling["min_replicas"], scaling["max_replicas"]) == (1, 3)
    assert scaling["target_ongoing_requests"] == config.engine.max_seqs


def test_names_are_those_of_the_deployments():
    from deployments.draft import Draft
    from deployments.ingress import Ingress
    from deployments.preprocessor import Preprocessor
    from deployments.target import Target

    assert deployment_names(AppConfig()) == (Ingress.name, Preprocessor.name, Target.name)
    assert deployment_names(DRAFTED) == (Ingress.name, Preprocessor.name, Target.name, Draft.name)


@pytest.mark.parametrize("is_private", [True, False])
def test_nothing_of_a_draft_is_left_to_serves_defaults(is_private):
    options = draft_options(DRAFTED, is_private=is_private)
    assert options["num_replicas"] == 1
    assert options["ray_actor_options"]["num_cpus"] == 0
    serve.deployment(lambda: None).options(**options)


@pytest.mark.parametrize(("cores", "threads", "works_ahead"), [(8, 0, False), (8, 4, True), (8, 5, False)])
def test_a_draft_on_the_cpu_computes_between_its_targets_steps(monkeypatch, cores, threads, works_ahead):
    monkeypatch.setattr(actor_options, "num_physical_cores", lambda: cores)
    config = DRAFTED.model_copy(update={"engine": EngineSettings(device="cpu", num_threads=threads, pool_mb=100)})
    target, plan = target_engine(config, is_private=True), draft_plan.draft_plan(config, is_private=True)
    assert target.shares_cores == plan.engine.shares_cores == (not works_ahead)
    assert plan.engine.num_threads == target.num_threads == (threads or cores)
    assert (target.pool_mb, plan.engine.pool_mb) == (100, None)
    assert plan.works_ahead == plan.spins == works_ahead
    assert (plan.source.model, plan.target.model) == ("draft", None)


@pytest.mark.parametrize(
    ("gpus", "is_private", "of_target", "of_draft", "fraction"),
    [(1, True, 0.9, 0.1, 0.75), (2, True, 1, 1, None), (0, False, 1, 1, None)],
)
def test_a_draft_shares_the_only_gpu(monkeypatch, gpus, is_private, of_target, of_draft, fraction):
    for module in (gpu_info, actor_options):
        monkeypatch.setattr(module, "num_gpus", lambda: gpus)
    config = DRAFTED.model_copy(update={"engine": EngineSettings(device="cuda")})
    asked = [
        options(config, is_private=is_private)["ray_actor_options"]["num_gpus"]
        for options in (target_options, draft_options)
    ]
    assert asked == [of_target, of_draft]
    assert target_engine(config, is_private=is_private).pool_fraction == fraction
    plan = draft_plan.draft_plan(config, is_private=is_private)
    assert plan.engine.pool_tokens == 2048 * config.engine.max_seqs
    assert plan.works_ahead == (fraction is None)


@pytest.mark.parametrize(
    ("reserved", "num_threads", "threads", "has_cores"),
    [((3.0, 2.5), 0, 2, True), ((3.0, 0.5), 0, 3, False), ((0.0, 2.0), 0, 2, False), ((3.0, 2.0), 4, 4, True)],
)
def test_a_draft_that_reserves_processors_computes_on_them(monkeypatch, reserved, num_threads, threads, has_cores):
    monkeypatch.setattr(actor_options, "num_physical_cores", lambda: 4)
    deployment = DeploymentConfig(target_cpus=reserved[0], draft_cpus=reserved[1])
    config = DRAFTED.model_copy(
        update={"deployment": deployment, "engine": EngineSettings(device="cpu", num_threads=num_threads)}
    )
    plan = draft_plan.draft_plan(config, is_private=False)
    assert (plan.engine.num_threads, plan.spins) == (threads, has_cores)
    assert target_engine(config, is_private=False).shares_cores == (not has_cores)
    actor = draft_options(config, is_private=False)["ray_actor_options"]
    assert actor["num_cpus"] == reserved[1]
    assert actor["runtime_env"]["env_vars"]["OMP_NUM_THREADS"] == str(threads)


@pytest.mark.parametrize(
    ("gpu", "is_private", "gpus", "asked"),
    [
        ("own", True, 1, [1, 1]), ("shared", True, 2, [0.9, 0.1]), ("auto", True, 2, [1, 1]),
        ("shared", False, 0, [0.9, 0.1]), ("own", False, 0, [1, 1]), ("auto", False, 0, [1, 1]),
    ],
)  # fmt: skip
def test_whose_gpu_a_draft_takes(monkeypatch, gpu, is_private, gpus, asked):
    for module in (gpu_info, actor_options):
        monkeypatch.setattr(module, "num_gpus", lambda: gpus)
    deployment, engine = DeploymentConfig(draft_gpu=gpu), EngineSettings(device="cuda")
    config = DRAFTED.model_copy(update={"deployment": deployment, "engine": engine})
    options = [
        options(config, is_private=is_private)["ray_actor_options"] for options in (target_options, draft_options)
    ]
    assert [actor["num_gpus"] for actor in options] == asked
    if is_private and sum(asked) > gpus:
        with pytest.raises(LaunchError, match="--draft-gpu own one for the draft, this machine has 1"):
            check_private(config)
    # On the CPU nobody takes one.
    on_cpu = config.model_copy(update={"engine": EngineSettings(device="cpu")})
    assert "num_gpus" not in draft_options(on_cpu, is_private=is_private)["ray_actor_options"]


def test_models_run_on_nodes_with_labels():
    deployment = DeploymentConfig(model_nodes=("sirocco/models=yes", "zone=a"))
    config = DRAFTED.model_copy(update={"deployment": deployment})
    for options in (target_options, draft_options):
        made = options(config, is_private=False)
        assert made["ray_actor_options"]["label_selector"] == {"sirocco/models": "yes", "zone": "a"}
        serve.deployment(lambda: None).options(**made)
    for options in (ingress_options, preprocessor_options):
        assert "label_selector" not in options(config, is_private=False)["ray_actor_options"]
    with pytest.raises(LaunchError, match="--model-nodes names nodes of a cluster: --ray-address says which"):
        check_private(config)
    for label in ("", "a", "=b", "a=", "a=b=c", "a=!b", "a=in(b)", "a b=c", "a=" + 64 * "b"):
        with pytest.raises(ValidationError, match="model_nodes"):
            DeploymentConfig(model_nodes=(label,))
    with pytest.raises(ValidationError, match="--model-nodes gives a label two values"):
        DeploymentConfig(model_nodes=("a=b", "a=c"))


def test_the_edge_of_a_private_cluster():
    assert choose_edge(DeploymentConfig()) is Edge.DIRECT
    assert choose_edge(DeploymentConfig(proxy="haproxy")) is Edge.HAPROXY
    assert "RAY_SERVE_ENABLE_HA_PROXY" not in node_environment(AppConfig(deployment=DeploymentConfig(proxy="python")))


def test_two_servers_of_one_machine_share_no_secret_and_no_port(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    one, other = (private_environment(AppConfig(), Edge.HAPROXY, private_directory()) for _ in range(2))
    for name in ("RAY_AUTH_TOKEN", "RAY_SERVE_HAPROXY_METRICS_PORT", "RAY_SERVE_HAPROXY_SOCKET_PATH"):
        assert one[name] != other[name]
    assert one["RAY_AUTH_MODE"] == "token"
    assert len(one["RAY_AUTH_TOKEN"]) >= 32


def test_haproxy_is_given_no_other_address_than_loopback(tmp_path):
    environment = private_environment(AppConfig(), Edge.HAPROXY, tmp_path)
    metrics, stats = (environment[f"RAY_SERVE_HAPROXY_{n}_PORT"] for n in ("METRICS", "STATS"))
    config = tmp_path / "haproxy.cfg"
    config.write_text(f"frontend a\n    bind :{metrics}\nlisten b\n  bind *:{stats}\nfrontend c\n    bind *:1234\n")
    wrapper = environment["RAY_SERVE_HAPROXY_BINARY_PATH"]
    subprocess.run([wrapper, "-f", str(config), "-v"], check=True, capture_output=True, timeout=20)
    binds = [line.split()[1] for line in config.read_text().splitlines() if "bind" in line]
    assert binds == [f"127.0.0.1:{metrics}", f"127.0.0.1:{stats}", "*:1234"]
