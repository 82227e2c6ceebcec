"""`sirocco config`: the Serve config file for the same arguments as `sirocco serve`."""

from typing import Any

import yaml

from serve_app.config import RAY_LOG_LEVELS, AppConfig, ModelConfig

APPLICATION = "sirocco"
IMPORT_PATH = "serve_app.app:build_app"
API_KEY_VARIABLE = "SIROCCO_API_KEY"
TOKEN_VARIABLE = "HF_TOKEN"


def run(config: AppConfig) -> int:
    """Prints the file to standard output."""
    print(render(config), end="")
    return 0


def render(config: AppConfig) -> str:
    """The file's text: what the nodes need as comments, then YAML that `serve deploy` takes."""
    from deployments.actor_options import node_environment

    open_config, secrets = without_secrets(config)
    lines = ["# Serve config of Sirocco, for `serve deploy` or a RayService's serveConfigV2."]
    lines += ["# Every node needs this environment before Ray starts on it:"]
    lines += [f"#   {name}={value}" for name, value in node_environment(config).items()]
    if secrets:
        lines += ["# and these secrets, which are not written here:"]
        lines += [f"#   {name}: {meaning}" for name, meaning in secrets.items()]
    text = yaml.safe_dump(serve_config(open_config), sort_keys=False, width=100, allow_unicode=True)
    return "\n".join(lines) + "\n" + text


def serve_config(config: AppConfig) -> dict[str, Any]:
    """The content of the file, in the form of Ray's ServeDeploySchema. config must hold no secrets."""
    from deployments.actor_options import deployment_names

    args = config.to_args()
    # The cluster is the one that the file is deployed to.
    args.get("deployment", {}).pop("ray_address", None)
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": config.http.host, "port": config.http.port},
        "logging_config": {"log_level": RAY_LOG_LEVELS[config.log]},
        "applications": [
            {
                "name": APPLICATION,
                "route_prefix": "/",
                "import_path": IMPORT_PATH,
                "args": {section: value for section, value in args.items() if value != {}},
                "deployments": [{"name": name} for name in deployment_names(config)],
            }
        ],
    }


def without_secrets(config: AppConfig) -> tuple[AppConfig, dict[str, str]]:
    """config with references to environment variables where secrets stood, and what each of those must hold."""
    variables: dict[str, str] = {}
    keys = tuple(_key_reference(key, variables) for key in config.http.api_keys)
    update: dict[str, Any] = {
        "http": config.http.model_copy(update={"api_keys": keys}),
        "model": _without_token(config.model, variables),
    }
    if config.speculation.draft is not None:
        draft = _without_token(config.speculation.draft, variables)
        update["speculation"] = config.speculation.model_copy(update={"draft": draft})
    return config.model_copy(update=update), variables


def _without_token(model: ModelConfig, variables: dict[str, str]) -> ModelConfig:
    """The model with a variable in the place of the hub's token; notes down the variable."""
    token_source = model.token_source
    if token_source.startswith("literal:"):
        token_source = f"env:{TOKEN_VARIABLE}"
    if token_source.startswith("env:"):
        variables[token_source.removeprefix("env:")] = "the access token of the model hub"
    return model.model_copy(update={"token_source": token_source})


def _key_reference(key: str, variables: dict[str, str]) -> str:
    """key, or a variable of its own in its place if it is the secret itself; notes down the variable."""
    if key.startswith("path:"):
        return key
    if key.startswith("env:"):
        name = key.removeprefix("env:")
    else:
        taken = sum(name.startswith(API_KEY_VARIABLE) for name in variables)
        name = API_KEY_VARIABLE if taken == 0 else f"{API_KEY_VARIABLE}_{taken + 1}"
    variables[name] = "an API key that clients send"
    return f"env:{name}"
