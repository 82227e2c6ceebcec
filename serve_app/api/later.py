"""Routes of OpenAI's API and of the seed that this server does not have yet: they answer 501, not 404."""

from collections.abc import Sequence

_METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")

# Prefixes: what lies below them is not there either.
LATER_TREES: Sequence[str] = (
    "/v1/assistants",
    "/v1/audio",
    "/v1/batches",
    "/v1/containers",
    "/v1/conversations",
    "/v1/embeddings",
    "/v1/evals",
    "/v1/files",
    "/v1/fine_tuning",
    "/v1/images",
    "/v1/messages",
    "/v1/moderations",
    "/v1/realtime",
    "/v1/responses",
    "/v1/sessions",
    "/v1/skills",
    "/v1/threads",
    "/v1/uploads",
    "/v1/vector_stores",
    "/v1/videos",
    "/v1/system",
    "/v1/agent",
    "/calibration",
)

LATER_ROUTES: Sequence[str] = (
    "/activate_adapters",
    "/v1/lora_adapters",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
)

# POST only: GET /v1/models/{id} is there.
LATER_MODEL_ACTIONS: Sequence[str] = ("/v1/models/unload", "/v1/models/reload", "/v1/models/status", "/v1/models/tune")


def later_routes() -> list[tuple[str, list[str]]]:
    """Path pattern and methods of each."""
    anything = list(_METHODS)
    trees = [(pattern, anything) for tree in LATER_TREES for pattern in (tree, tree + "/{rest:path}")]
    return [
        *trees,
        *((path, anything) for path in LATER_ROUTES),
        *((path, ["POST"]) for path in LATER_MODEL_ACTIONS),
        ("/v1/chat/completions/{rest:path}", anything),
    ]
