"""AppConfig, the whole configuration of a server: every default, every check and every environment read of ours.

pydantic stops here: the engine is given the dataclasses of serve_app.options. A config is never changed once built; it
travels to the replicas as it is, and `to_args` gives the plain data that builds it again from a Serve config file.
"""

import logging
import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from serve_app.errors import LaunchError
from serve_app.options import (
    MAX_DRAFT_TOKENS,
    DraftSampling,
    DType,
    EngineConfig,
    IsqOptions,
    KvDType,
    ModelKind,
    ModelSource,
    PaCacheType,
    Speculate,
    SpeculationOptions,
)
from serve_app.quant_names import recipe_name

LogLevel = Literal["off", "error", "warn", "info", "debug", "trace"]
IngressMode = Literal["pump", "handle"]
ProxyMode = Literal["auto", "direct", "haproxy", "python"]
DraftGpu = Literal["auto", "own", "shared"]

LOG_LEVELS: dict[LogLevel, int] = {
    "off": logging.CRITICAL + 10,
    "error": logging.ERROR,
    "warn": logging.WARNING,
    "info": logging.INFO,
    "debug": logging.DEBUG,
    "trace": 5,
}

# Ray knows the standard names only.
RAY_LOG_LEVELS: dict[LogLevel, str] = {
    "off": "CRITICAL",
    "error": "ERROR",
    "warn": "WARNING",
    "info": "INFO",
    "debug": "DEBUG",
    "trace": "DEBUG",
}

Positive = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Milliseconds = Annotated[float, Field(gt=0, le=10_000, allow_inf_nan=False)]
Cpus = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Text = Annotated[str, StringConstraints(min_length=1)]
_LABEL = "[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
NodeLabel = Annotated[str, StringConstraints(pattern=rf"^([A-Za-z0-9.-]+/)?{_LABEL}={_LABEL}$")]


class Section(BaseModel):
    """A frozen part of the configuration that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), validate_default=True)


def _known_recipe(name: str) -> str:
    try:
        recipe_name(name)
    except ValueError as error:
        raise ValueError(f"names no type that weights can be quantised to: {error}") from None
    return name


class IsqConfig(Section):
    """In-situ quantization: the fields of options.IsqOptions. type may be a number of bits in a config file."""

    type: Annotated[Text, AfterValidator(_known_recipe)] | None = None
    is_pure: bool = False
    experts_only: bool = False
    imatrix: Text | None = None
    calibration_file: Text | None = None
    topology: Text | None = None
    cache: Text | None = None

    @field_validator("type", mode="before")
    @classmethod
    def _width(cls, value: Any) -> Any:
        return str(value) if type(value) is int else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.type is None and self.topology is None:
            raise ValueError("in-situ quantization needs a type (--isq) or a topology (--topology)")
        if self.imatrix is not None and self.calibration_file is not None:
            raise ValueError("--imatrix and --calibration-file each give the importance of columns: give one of them")
        if self.is_pure and self.experts_only:
            raise ValueError("the organisations pure and moqe exclude each other")
        if self.experts_only and self.type is None:
            raise ValueError("--isq-organization moqe needs a type for the experts: give it with --isq")
        if self.type is not None:
            recipe_name(self.type, promotes=not self.is_pure)
        return self

    def to_options(self) -> IsqOptions:
        return IsqOptions(**dict(self))


class ModelConfig(Section):
    """Which model, and from where: the fields of options.ModelSource."""

    model: Text | None = None
    kind: ModelKind = "auto"
    arch: Text | None = None
    gqa: Positive | None = None
    files: tuple[Text, ...] = ()
    tokenizer: Text | None = None
    revision: Text | None = None
    token_source: Annotated[str, Field(pattern=r"^(cache|none|(literal|env|path):.+)$", repr=False)] = "cache"
    hf_cache: Text | None = None
    offline: bool = False
    chat_template: Text | None = None
    jinja_explicit: Text | None = None
    dtype: DType = "auto"
    max_seq_len: Positive | None = None
    isq: IsqConfig | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.files and self.kind == "plain":
            raise ValueError("file names (-f) belong to the kind gguf; a plain model is a folder or a hub id (-m)")
        if self.files and self.model is None:
            raise ValueError("file names (-f) need the folder or hub id they are in (-m)")
        if self.gqa is not None and self.kind not in ("auto", "ggml"):
            raise ValueError(f"--gqa belongs to the kind ggml; a {self.kind} model says its key heads itself")
        if self.model is None and self.kind != "auto":
            raise ValueError(f"the kind {self.kind} needs a model (-m)")
        return self

    def to_source(self) -> ModelSource:
        return ModelSource(**{**dict(self), "isq": None if self.isq is None else self.isq.to_options()})


class EngineSettings(Section):
    """Sizes and limits of one engine: the fields of options.EngineConfig, checked."""

    max_seqs: Annotated[int, Field(gt=0, le=4096)] = 32
    max_batched_tokens: Positive = 2048
    prefill_chunk_tokens: Positive = 512
    block_size: Annotated[int, Field(ge=16, le=512, multiple_of=16)] = 32
    paged_attention: bool = True
    prefix_cache_n: Annotated[int, Field(ge=0)] = 1024
    pool_mb: Positive | None = None
    pool_fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    pool_tokens: Positive | None = None
    max_waiting: Annotated[int, Field(ge=0)] = 1024
    queue_timeout_s: Seconds = 300.0
    device: Text = "auto"
    kv_cache_dtype: KvDType = "auto"
    pa_cache_type: PaCacheType = "auto"
    cpu_exact: bool = False
    num_threads: Annotated[int, Field(ge=0, le=1024)] = 0
    shares_cores: bool = False
    attention_backend: Text = "auto"
    cuda_graphs: bool = True
    overlap: bool = True
    seed: Annotated[int, Field(ge=0, lt=2**64)] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        pools = {
            "--pa-gpu-mem": self.pool_mb,
            "--pa-gpu-mem-usage": self.pool_fraction,
            "--pa-ctxt-len": self.pool_tokens,
        }
        given = [name for name, value in pools.items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} each set the size of the KV pool: give one of them")
        if self.pa_cache_type != "auto" and self.kv_cache_dtype not in ("auto", self.pa_cache_type):
            raise ValueError(
                f"--pa-cache-type {self.pa_cache_type} and --kv-cache-dtype {self.kv_cache_dtype} contradict each "
                "other: give one of them"
            )
        if self.max_batched_tokens < self.max_seqs:
            raise ValueError(
                f"a step of {self.max_batched_tokens} tokens (--max-batched-tokens) cannot hold one token for each of "
                f"{self.max_seqs} requests (--max-seqs)"
            )
        return self

    def to_config(self) -> EngineConfig:
        return EngineConfig(**dict(self))


class SpeculationConfig(Section):
    """Speculative decoding: the fields of options.SpeculationOptions, and the draft model where there is one."""

    use: Speculate = "off"
    max_tokens: Annotated[int, Field(ge=1, le=MAX_DRAFT_TOKENS)] = 5
    is_fixed: bool = False
    deadline_ms: Milliseconds = 100.0
    maps_text: bool = False
    draft_sampling: DraftSampling = "greedy"
    draft: ModelConfig | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.draft is None:
            if self.use == "draft":
                raise ValueError("--speculation draft needs a draft model: give it with -d")
            if self.maps_text:
                raise ValueError("--draft-vocab text belongs to a draft model: give one with -d")
            if self.draft_sampling != "greedy":
                raise ValueError(f"--draft-sampling {self.draft_sampling} belongs to a draft model: give one with -d")
            return self
        if self.draft.model is None:
            raise ValueError("the draft model needs a hub id, folder or file (-d)")
        if self.use not in ("auto", "draft"):
            raise ValueError(
                f"a draft model (-d) is for --speculation auto or draft; with {self.use} nobody would ask it: "
                "leave one of them out"
            )
        if self.maps_text and self.draft_sampling == "sampled":
            raise ValueError(
                "--draft-sampling sampled does not go with --draft-vocab text: what goes through text has lost the "
                "probabilities that it was sampled with"
            )
        return self

    def to_options(self) -> SpeculationOptions:
        return SpeculationOptions(**{name: value for name, value in self if name != "draft"})


class HttpConfig(Section):
    """The HTTP side: address, names, keys, limits. Sizes are bytes, times seconds.

    api_keys are literal keys, or references env:NAME and path:FILE that each ingress replica resolves for itself
    (resolve_api_keys), so that a key need not stand in a process list or a config file. None of them: no key needed.
    max_choices bounds prompts times n. A request waits first_token_timeout_s for its first token (503) and
    idle_stream_timeout_s between two; a client that takes nothing for slow_client_timeout_s, or leaves more than
    max_stream_backlog deltas lying, is dropped. A stream without a token for keep_alive_s gets a comment line.
    """

    host: Text = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 1234
    api_keys: Annotated[tuple[Text, ...], Field(repr=False)] = ()
    served_model_name: Text | None = None
    strict_model_name: bool = False
    request_logging_file: Text | None = None
    max_body_bytes: Positive = 20 * 2**20
    max_header_bytes: Positive = 32 * 2**10
    max_json_depth: Positive = 64
    max_messages: Positive = 2048
    max_prompts: Positive = 128
    max_n: Positive = 16
    max_stop: Positive = 16
    max_stop_chars: Positive = 256
    max_logit_bias: Positive = 1024
    max_logprobs: Annotated[int, Field(ge=0)] = 20
    max_choices: Positive = 256
    body_timeout_s: Seconds = 60.0
    first_token_timeout_s: Seconds = 600.0
    idle_stream_timeout_s: Seconds = 300.0
    slow_client_timeout_s: Seconds = 60.0
    keep_alive_s: Seconds = 10.0
    max_stream_backlog: Positive = 4096

    def resolve_api_keys(self) -> tuple[str, ...]:
        """The keys themselves. Raises LaunchError if a reference leads nowhere."""
        return tuple(key for reference in self.api_keys for key in _keys_at(reference))


class DeploymentConfig(Section):
    """How the application is spread over actors.

    ray_address None starts a private cluster on this machine. max_target_replicas above target_replicas lets Serve
    scale the targets between the two. The *_cpus are what a replica reserves of its node (0: nothing), not its number
    of threads. ingress: how tokens come back, by the pump or by one handle stream a request. model_nodes: labels,
    KEY=VALUE, that the nodes of targets and draft have. draft_gpu: where models compute on GPUs, whether the draft
    takes one of its own or shares a target's; auto: its own, unless a private cluster has none to spare.
    """

    ray_address: Text | None = None
    ingress: IngressMode = "pump"
    proxy: ProxyMode = "auto"
    ingress_replicas: Positive = 1
    preprocessor_replicas: Positive = 1
    target_replicas: Positive = 1
    max_target_replicas: Positive | None = None
    ingress_cpus: Cpus = 0.0
    preprocessor_cpus: Cpus = 0.0
    target_cpus: Cpus = 0.0
    draft_cpus: Cpus = 0.0
    draft_gpu: DraftGpu = "auto"
    model_nodes: tuple[NodeLabel, ...] = ()
    max_ongoing_requests: Positive = 4096
    startup_timeout_s: Seconds = 600.0
    shutdown_timeout_s: Seconds = 8.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_target_replicas is not None and self.max_target_replicas < self.target_replicas:
            raise ValueError(
                f"at most {self.max_target_replicas} targets (--max-targets) is less than the {self.target_replicas} "
                "to start with (--num-targets)"
            )
        keys = [label.partition("=")[0] for label in self.model_nodes]
        if len(set(keys)) < len(keys):
            raise ValueError("--model-nodes gives a label two values, and a node has one")
        return self


class AppConfig(Section):
    """Everything `sirocco serve` was told. The argument of serve_app.app:build_app."""

    model: ModelConfig = ModelConfig()
    engine: EngineSettings = EngineSettings()
    http: HttpConfig = HttpConfig()
    deployment: DeploymentConfig = DeploymentConfig()
    speculation: SpeculationConfig = SpeculationConfig()
    log: LogLevel = "info"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.engine.seed is not None and self.speculation.draft_sampling == "sampled":
            raise ValueError(
                "--draft-sampling sampled is for requests without a seed, and --seed gives one to all: leave one out"
            )
        return self

    def to_args(self) -> dict[str, Any]:
        """This configuration as plain data without defaults; AppConfig.model_validate takes it back."""
        return self.model_dump(mode="json", exclude_defaults=True)


class SettingError(LaunchError):
    """A setting is wrong. section and name say which where it is a single one; the message then begins with a verb.

    The sections isq, draft and draft.isq are the parts of those names in the sections model and speculation.
    """

    def __init__(self, message: str, section: str | None = None, name: str | None = None) -> None:
        super().__init__(message)
        self.section = section
        self.name = name


def build_config(data: dict[str, Any]) -> AppConfig:
    """A configuration from plain data; raises SettingError for the first fault, without repeating the value."""
    try:
        return AppConfig.model_validate(data)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
    message = fault["msg"].removeprefix("Value error, ").removeprefix("Input ")
    message = _PLAINER_FAULTS.get(fault["type"], message)
    match fault["loc"]:
        case ("speculation", "draft") | ("speculation", "draft", "isq"):
            raise SettingError(f"The draft model: {message}.")
        case ("speculation", "draft", "isq", str(name), *_):
            raise SettingError(message, "draft.isq", name)
        case ("speculation", "draft", str(name), *_):
            raise SettingError(message, "draft", name)
        case ("model", "isq"):
            raise SettingError(message[:1].upper() + message[1:] + ".")
        case ("model", "isq", str(name), *_):
            raise SettingError(message, "isq", name)
        case (str(section), str(name), *_):
            raise SettingError(message, section, name)
        case _:
            raise SettingError(message[:1].upper() + message[1:] + ".")


_PLAINER_FAULTS = {
    "string_pattern_mismatch": "has none of the forms that its help lists",
    "string_too_short": "must not be empty",
    "extra_forbidden": "does not exist",
}


def resolve_reference(reference: str) -> str:
    """What `literal:TEXT`, `env:NAME` or `path:FILE` stands for; other text stands for itself.

    Raises LaunchError if the variable is not set, the file cannot be read, or there is nothing in it.
    """
    kind, _, rest = reference.partition(":")
    if kind == "literal":
        return rest
    if kind == "env":
        value = os.environ.get(rest, "").strip()
        if not value:
            raise LaunchError(f"The environment variable {rest} is not set, or empty.")
        return value
    if kind == "path":
        try:
            value = Path(rest).expanduser().read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
            raise LaunchError(f"The file {rest} cannot be read: {reason}.") from error
        if not value:
            raise LaunchError(f"The file {rest} is empty.")
        return value
    return reference


def _keys_at(reference: str) -> list[str]:
    """A file may hold several keys, one a line; a variable or a literal is one key."""
    value = resolve_reference(reference)
    if reference.startswith("path:"):
        return [line.strip() for line in value.splitlines() if line.strip()]
    return [value]


def apply_log_level(log: LogLevel) -> None:
    """Sets the level of our loggers in this process; called once by the program and by each replica.

    Where nobody has set up logging, messages go to standard error; other libraries' from warnings upward.
    """
    level = LOG_LEVELS[log]
    logging.addLevelName(LOG_LEVELS["trace"], "TRACE")
    logging.basicConfig(level=max(level, logging.WARNING), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for name in ("serve_app", "deployments", "kernels"):
        logging.getLogger(name).setLevel(level)
