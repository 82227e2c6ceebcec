"""The command line's options of the server; see cli_options."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated

from typer import Option

from serve_app.config import DeploymentConfig, DraftGpu, HttpConfig, IngressMode, ProxyMode

# What the help shows as the type of an option that takes no value.
_FLAG = ""

_HTTP = HttpConfig()
_DEPLOYMENT = DeploymentConfig()

_http_option = partial(Option, rich_help_panel="HTTP")
_limits_option = partial(Option, rich_help_panel="Limits of a request")
_ray_option = partial(Option, rich_help_panel="Ray Serve")


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpOptions:
    """Address, names, keys and limits."""

    host: Annotated[
        str,
        _http_option("--host", help="Address to listen on; 0.0.0.0: all of them.", metavar="ADDRESS"),
    ] = _HTTP.host
    port: Annotated[int, _http_option("--port", "-p", help="Port to listen on.")] = _HTTP.port
    api_keys: Annotated[
        list[str] | None,
        _http_option(
            "--api-key",
            help="Key that clients must send, on every route but /health; may be repeated. env:NAME and path:FILE "
            "(a key on each line) keep it out of the process list. Left out: no key is asked for.",
            metavar="KEY",
        ),
    ] = None
    served_model_name: Annotated[
        str | None,
        _http_option(
            "--served-model-name", help="Name of the model in the API. Left out: the model's own.", metavar="NAME"
        ),
    ] = _HTTP.served_model_name
    strict_model_name: Annotated[
        bool,
        _http_option(
            "--strict-model-name",
            metavar=_FLAG,
            help="Refuse requests that name another model than the served one (or default).",
        ),
    ] = _HTTP.strict_model_name
    request_logging_file: Annotated[
        str | None,
        _http_option(
            "--request-logging-file",
            help="Append each request and its answer, tokens and times to this file, as JSON lines.",
            metavar="FILE",
        ),
    ] = _HTTP.request_logging_file
    first_token_timeout_s: Annotated[
        float, _http_option("--first-token-timeout", help="Longest wait of a request for its first token, in seconds.")
    ] = _HTTP.first_token_timeout_s
    idle_stream_timeout_s: Annotated[
        float,
        _http_option("--idle-stream-timeout", help="Longest wait of a stream for its next token, in seconds."),
    ] = _HTTP.idle_stream_timeout_s
    slow_client_timeout_s: Annotated[
        float,
        _http_option("--slow-client-timeout", help="How long a client may take nothing of its stream, in seconds."),
    ] = _HTTP.slow_client_timeout_s
    max_body_bytes: Annotated[int, _limits_option("--max-body-bytes", help="Size of a request's body.")] = (
        _HTTP.max_body_bytes
    )
    max_header_bytes: Annotated[int, _limits_option("--max-header-bytes", help="Size of its headers together.")] = (
        _HTTP.max_header_bytes
    )
    max_messages: Annotated[int, _limits_option("--max-messages", help="Messages of a chat.")] = _HTTP.max_messages
    max_prompts: Annotated[int, _limits_option("--max-prompts", help="Prompts of a completion.")] = _HTTP.max_prompts
    max_n: Annotated[int, _limits_option("--max-n", help="Choices of a request (n).")] = _HTTP.max_n
    max_choices: Annotated[int, _limits_option("--max-choices", help="Prompts times choices of a request.")] = (
        _HTTP.max_choices
    )
    max_stop: Annotated[int, _limits_option("--max-stop", help="Stop strings of a request.")] = _HTTP.max_stop
    max_logit_bias: Annotated[int, _limits_option("--max-logit-bias", help="Entries of logit_bias.")] = (
        _HTTP.max_logit_bias
    )
    max_logprobs: Annotated[int, _limits_option("--max-logprobs", help="Alternatives to each token.")] = (
        _HTTP.max_logprobs
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentOptions:
    """How the application is spread over Ray's actors."""

    ray_address: Annotated[
        str | None,
        _ray_option(
            "--ray-address",
            help="Join the Ray cluster at this address (auto: the one of this machine). Left out: a private one is "
            "started, and ended with the server.",
            metavar="ADDRESS",
        ),
    ] = _DEPLOYMENT.ray_address
    ingress_replicas: Annotated[int, _ray_option("--num-ingress", help="Replicas that speak HTTP.")] = (
        _DEPLOYMENT.ingress_replicas
    )
    preprocessor_replicas: Annotated[
        int,
        _ray_option("--num-preprocessors", help="Replicas that render templates and tokenise."),
    ] = _DEPLOYMENT.preprocessor_replicas
    target_replicas: Annotated[int, _ray_option("--num-targets", help="Replicas with the model.")] = (
        _DEPLOYMENT.target_replicas
    )
    max_target_replicas: Annotated[
        int | None,
        _ray_option(
            "--max-targets",
            help="Let Serve start up to so many replicas of the model under load. Left out: their number is fixed.",
        ),
    ] = _DEPLOYMENT.max_target_replicas
    ingress_cpus: Annotated[
        float, _ray_option("--ingress-cpus", help="Processors that a replica for HTTP reserves on its node; 0: none.")
    ] = _DEPLOYMENT.ingress_cpus
    preprocessor_cpus: Annotated[
        float, _ray_option("--preprocessor-cpus", help="The same for a replica that tokenises.")
    ] = _DEPLOYMENT.preprocessor_cpus
    target_cpus: Annotated[
        float,
        _ray_option("--target-cpus", help="The same for a replica with the model; --threads says how many it uses."),
    ] = _DEPLOYMENT.target_cpus
    draft_cpus: Annotated[float, _ray_option("--draft-cpus", help="The same for the replica with the draft model.")] = (
        _DEPLOYMENT.draft_cpus
    )
    draft_gpu: Annotated[
        DraftGpu,
        _ray_option(
            "--draft-gpu",
            help="own: the draft model takes a GPU to itself; shared: it lives on a target's, of nodes with one GPU; "
            "auto: shared where a private cluster has none to spare.",
        ),
    ] = _DEPLOYMENT.draft_gpu
    model_nodes: Annotated[
        list[str] | None,
        _ray_option(
            "--model-nodes",
            help="Label of the nodes on which targets and the draft model may run; may be repeated. Left out: any.",
            metavar="KEY=VALUE",
        ),
    ] = None
    ingress: Annotated[
        IngressMode,
        _ray_option(
            "--ingress",
            help="How tokens come back: pump, one message a step for all requests; handle, one Serve stream each.",
        ),
    ] = _DEPLOYMENT.ingress
    proxy: Annotated[
        ProxyMode,
        _ray_option(
            "--proxy",
            help="Who faces the clients; auto: the ingress replicas themselves on a private cluster, else HAProxy.",
        ),
    ] = _DEPLOYMENT.proxy
    startup_timeout_s: Annotated[
        float, _ray_option("--startup-timeout", help="Longest wait for the application to be ready, in seconds.")
    ] = _DEPLOYMENT.startup_timeout_s
