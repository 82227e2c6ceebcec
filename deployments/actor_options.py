"""AppConfig → what Serve is told about each deployment, and the environment its processes need. Imports no Ray."""

from dataclasses import replace
from typing import Any

from serve_app.config import RAY_LOG_LEVELS, AppConfig
from serve_app.cpu_info import num_physical_cores
from serve_app.errors import LaunchError
from serve_app.gpu_info import num_gpus, wants_gpu
from serve_app.options import EngineConfig

INGRESS = "Ingress"
PREPROCESSOR = "Preprocessor"
TARGET = "Target"
DRAFT = "Draft"

# The ingress's own routes (health, models, metrics) must get through when every place for a request is taken.
_SPARE_REQUESTS = 64
# Of a GPU that a target and the draft model share, as Ray counts; and the part of its memory that the target fills.
_DRAFT_GPU = 0.1
_POOL_BESIDE_DRAFT = 0.75
# Open requests of a replica that Serve stops: let end on a cluster that goes on, cut with a server that ends.
_DRAIN_S = 300.0
_PRIVATE_DRAIN_S = 2.0

# Read by Serve in every replica.
REPLICA_ENVIRONMENT = {
    # Pixels and long prompts travel between replicas as one message; gRPC's default limit is 4 MiB.
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(256 * 2**20),
}


def deployment_names(config: AppConfig) -> tuple[str, ...]:
    """The deployments of the application, the ingress first."""
    names = (INGRESS, PREPROCESSOR, TARGET)
    return names if config.speculation.draft is None else (*names, DRAFT)


def ingress_options(config: AppConfig, *, is_private: bool) -> dict[str, Any]:
    """Serve's options of the HTTP replica: it holds every open request, so its limit is above all others."""
    deployment = config.deployment
    return {
        **_common(config, deployment.max_ongoing_requests + _SPARE_REQUESTS, is_private=is_private),
        "num_replicas": deployment.ingress_replicas,
        "ray_actor_options": _actor(deployment.ingress_cpus, 1, is_private=is_private),
    }


def preprocessor_options(config: AppConfig, *, is_private: bool) -> dict[str, Any]:
    """Serve's options of the tokenising replica."""
    deployment = config.deployment
    return {
        **_common(config, deployment.max_ongoing_requests, is_private=is_private),
        "num_replicas": deployment.preprocessor_replicas,
        "ray_actor_options": _actor(deployment.preprocessor_cpus, 1, is_private=is_private),
    }


def target_options(config: AppConfig, *, is_private: bool) -> dict[str, Any]:
    """Serve's options of the engine's replica: it takes all that the engine runs or lets wait."""
    deployment = config.deployment
    num_requests = config.engine.max_seqs + config.engine.max_waiting
    num_threads = target_threads(config, is_private=is_private)
    options: dict[str, Any] = {
        **_common(config, num_requests + _SPARE_REQUESTS, is_private=is_private),
        "ray_actor_options": _model_actor(config, deployment.target_cpus, num_threads, is_private=is_private),
    }
    if wants_gpu(config.engine.device, is_private=is_private):
        shares = draft_shares_gpu(config, is_private=is_private)
        options["ray_actor_options"]["num_gpus"] = 1 - _DRAFT_GPU if shares else 1
    most = deployment.max_target_replicas
    if most is None or most == deployment.target_replicas:
        options["num_replicas"] = deployment.target_replicas
    else:
        options["autoscaling_config"] = {
            "min_replicas": deployment.target_replicas,
            "max_replicas": most,
            "target_ongoing_requests": config.engine.max_seqs,
        }
    return options


def draft_options(config: AppConfig, *, is_private: bool) -> dict[str, Any]:
    """Serve's options of the draft model's replica. Targets of its node ask it by packets; calls come from others."""
    num_threads = draft_threads(config, is_private=is_private)
    options: dict[str, Any] = {
        **_common(config, _SPARE_REQUESTS, is_private=is_private),
        "num_replicas": 1,
        "ray_actor_options": _model_actor(config, config.deployment.draft_cpus, num_threads, is_private=is_private),
    }
    if wants_gpu(config.engine.device, is_private=is_private):
        shares = draft_shares_gpu(config, is_private=is_private)
        options["ray_actor_options"]["num_gpus"] = _DRAFT_GPU if shares else 1
    return options


def draft_shares_gpu(config: AppConfig, *, is_private: bool) -> bool:
    """Whether the draft model lives on a target's GPU: as told, else where a private cluster has none to spare."""
    if config.speculation.draft is None or not wants_gpu(config.engine.device, is_private=is_private):
        return False
    if config.deployment.draft_gpu != "auto":
        return config.deployment.draft_gpu == "shared"
    return is_private and num_gpus() <= _most_targets(config)


def target_threads(config: AppConfig, *, is_private: bool) -> int:
    """Computing threads of one engine, on the machine that asks.

    Unless told, the replicas of a private cluster divide the machine's cores; on a cluster of others an engine takes
    the whole processors that it reserves there, or all where it reserves less than one.
    """
    deployment, cores = config.deployment, num_physical_cores()
    if config.engine.num_threads:
        return config.engine.num_threads
    if is_private:
        return max(1, cores // _most_targets(config))
    return min(cores, int(deployment.target_cpus) or cores)


def draft_threads(config: AppConfig, *, is_private: bool) -> int:
    """Computing threads of the draft model: a target's, on its cores or as many, unless it reserves processors."""
    reserved = 0 if is_private or config.engine.num_threads else int(config.deployment.draft_cpus)
    return min(num_physical_cores(), reserved) or target_threads(config, is_private=is_private)


def target_engine(config: AppConfig, *, is_private: bool) -> EngineConfig:
    """The configuration of one engine on the machine that asks: its threads, and whether it shares its cores."""
    num_threads = target_threads(config, is_private=is_private)
    neighbours = _most_targets(config) if is_private else 1
    shares_cores = config.engine.shares_cores or num_threads * neighbours > num_physical_cores()
    engine = replace(config.engine.to_config(), num_threads=num_threads, shares_cores=shares_cores)
    if config.speculation.draft is None:
        return engine
    if not wants_gpu(engine.device, is_private=is_private):
        # The draft computes between the target's steps, on the same cores, unless it has others.
        shares_cores = shares_cores or not draft_has_cores(config, is_private=is_private)
        return replace(engine, shares_cores=shares_cores)
    is_sized = any(size is not None for size in (engine.pool_mb, engine.pool_fraction, engine.pool_tokens))
    if draft_shares_gpu(config, is_private=is_private) and not is_sized:
        return replace(engine, pool_fraction=_POOL_BESIDE_DRAFT)
    return engine


def draft_has_cores(config: AppConfig, *, is_private: bool) -> bool:
    """Whether the machine that asks has cores for a draft model on which no target computes: as many as a target takes
    where models compute on the CPU, else a few for threads that wait for one another; or those that both reserve."""
    deployment = config.deployment
    if not is_private and min(deployment.target_cpus, deployment.draft_cpus) >= 1:
        return True
    num_targets = _most_targets(config) if is_private else 1
    if wants_gpu(config.engine.device, is_private=is_private):
        return num_physical_cores() >= 4 * num_targets
    return num_physical_cores() >= (num_targets + 1) * target_threads(config, is_private=is_private)


def check_private(config: AppConfig) -> None:
    """Raises LaunchError for a placement that a private cluster on this machine cannot have."""
    deployment = config.deployment
    if deployment.model_nodes:
        raise LaunchError("--model-nodes names nodes of a cluster: --ray-address says which.")
    if not wants_gpu(config.engine.device, is_private=True):
        return
    targets, found = _most_targets(config), num_gpus()
    has_draft = config.speculation.draft is not None and deployment.draft_gpu == "own"
    if targets + has_draft > found:
        option = "--num-targets" if deployment.max_target_replicas is None else "--max-targets"
        draft = " and --draft-gpu own one for the draft" if has_draft else ""
        raise LaunchError(
            f"--device {config.engine.device}: {option} {targets} takes a GPU for each target{draft}, "
            f"this machine has {found}."
        )


def _most_targets(config: AppConfig) -> int:
    return config.deployment.max_target_replicas or config.deployment.target_replicas


def node_environment(config: AppConfig) -> dict[str, str]:
    """What must stand in the environment of every node before Ray starts on it, for a cluster of several nodes."""
    environment = {**REPLICA_ENVIRONMENT, "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
    if config.deployment.proxy != "python":
        environment["RAY_SERVE_ENABLE_HA_PROXY"] = "1"
    return environment


def _common(config: AppConfig, max_ongoing_requests: int, *, is_private: bool) -> dict[str, Any]:
    return {
        "max_ongoing_requests": max_ongoing_requests,
        "graceful_shutdown_timeout_s": _PRIVATE_DRAIN_S if is_private else _DRAIN_S,
        "graceful_shutdown_wait_loop_s": 0.5,
        "health_check_period_s": 1.0,
        "health_check_timeout_s": 30.0,
        "logging_config": logging_config(config),
    }


def thread_environment(num_threads: int) -> dict[str, str]:
    """How many threads the libraries of a process may start. Ray would derive it from num_cpus: 1 for 0."""
    return {
        "OMP_NUM_THREADS": str(num_threads),
        "RAYON_NUM_THREADS": str(num_threads),
        "TOKENIZERS_PARALLELISM": "false",
    }


def _actor(num_cpus: float, num_threads: int, *, is_private: bool) -> dict[str, Any]:
    # A private cluster has one environment for all, and the replicas limit their threads themselves.
    if is_private:
        return {"num_cpus": num_cpus}
    return {"num_cpus": num_cpus, "runtime_env": {"env_vars": thread_environment(num_threads)}}


def _model_actor(config: AppConfig, num_cpus: float, num_threads: int, *, is_private: bool) -> dict[str, Any]:
    actor = _actor(num_cpus, num_threads, is_private=is_private)
    if labels := config.deployment.model_nodes:
        actor["label_selector"] = dict(label.split("=") for label in labels)
    return actor


def logging_config(config: AppConfig) -> dict[str, Any]:
    """Serve's logging of its own processes: its news are for those who look for trouble."""
    level = "WARNING" if config.log == "info" else RAY_LOG_LEVELS[config.log]
    return {"log_level": level, "enable_access_log": config.log in ("debug", "trace")}
