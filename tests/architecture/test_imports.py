"""Who may import whom."""

import ast
from collections.abc import Iterator

import pytest
from source_tree import Import, imports, modules

LEAVES = {
    "batch",
    "config",
    "cpu_info",
    "errors",
    "ggml_file",
    "gguf_file",
    "gguf_strings",
    "gpu_info",
    "messages",
    "metrics",
    "options",
    "quant_names",
}

# What each area may import besides itself; an area not named here is a mistake.
_BELOW_LAYERS = {"kernels", "leaf", "quant", "kv_cache", "adapters", "attention"}
_BELOW_ENGINE = _BELOW_LAYERS | {"layers", "models", "loaders", "text", "vision"}
ALLOWED: dict[str, set[str]] = {
    "kernels": set(),
    "leaf": {"kernels.formats"},
    "quant": {"kernels", "leaf"},
    "kv_cache": {"kernels", "leaf"},
    "adapters": {"kernels", "leaf"},
    "attention": {"kernels", "leaf"},
    "layers": _BELOW_LAYERS,
    "models": _BELOW_LAYERS | {"layers"},
    "loaders": _BELOW_LAYERS | {"layers", "models"},
    "engine": _BELOW_ENGINE,
    "text": {"leaf"},
    "vision": {"leaf"},
    "api": {"leaf"},
    "deployments": {"leaf", "engine", "kv_cache", "api", "text", "vision", "model_files"},
    "program": _BELOW_ENGINE | {"engine", "api", "deployments"},
}

# Where alone another distribution may be imported.
ONLY_IN: dict[str, set[str]] = {
    "ray": {"deployments", "serve_app.app"},
    "fastapi": {"serve_app.api"},
    "starlette": {"serve_app.api"},
    "pydantic": {"serve_app.config", "serve_app.api.schema"},
    "triton": {"kernels.gpu"},
    "typer": {
        "serve_app.cli",
        "serve_app.cli_draft_options",
        "serve_app.cli_isq_options",
        "serve_app.cli_options",
        "serve_app.cli_quant_options",
        "serve_app.cli_server_options",
    },
    "rich": {"serve_app.commands"},
    "matplotlib": {"serve_app.commands.quality_plot"},
    "tokenizers": {"serve_app.text"},
    "jinja2": {"serve_app.text"},
    "huggingface_hub": {"serve_app.loaders"},
    "zmq": {"deployments"},
    "msgspec": {"deployments"},
    "prometheus_client": {"serve_app.metrics", "serve_app.api"},
}

NEVER = {"transformers", "gguf", "vllm"}

TORCH_FREE_AREAS = {"text", "vision", "api", "leaf", "deployments"}


def area(module: str) -> str:
    """The area of one of our modules."""
    first, *rest = module.split(".")
    if first != "serve_app":
        return first
    if not rest:
        return "leaf"
    if rest[0] in LEAVES:
        return "leaf"
    if rest[0] in ("app", "commands", "__main__") or rest[0].startswith("cli"):
        return "program"
    return rest[0]


def is_allowed(found: Import) -> bool:
    """Whether our own module may import our own other module."""
    here, there = area(found.importer), area(found.imported)
    if there == "program":
        return here == "program"
    if here == there or there in ALLOWED[here]:
        return True
    if found.imported in ("serve_app.loaders.model_files", "serve_app.loaders.hub"):
        return "model_files" in ALLOWED[here]
    return found.imported in ALLOWED[here]


def test_every_area_is_in_the_table() -> None:
    assert {area(module) for module in modules()} <= set(ALLOWED)


def test_imports_keep_to_the_table() -> None:
    wrong = [f"{found.importer} → {found.imported}" for found in imports() if found.is_ours and not is_allowed(found)]
    assert not wrong


def test_the_table_refuses_what_it_should() -> None:
    for importer, imported in [
        ("kernels.dispatch", "serve_app.options"),
        ("serve_app.quant.weight", "serve_app.attention.backend"),
        ("serve_app.layers.linear", "serve_app.models.llama"),
        ("serve_app.models.llama", "serve_app.loaders.load"),
        ("serve_app.text.tokenizer", "serve_app.engine.engine"),
        ("serve_app.api.routes", "serve_app.text.tokenizer"),
        ("deployments.ingress", "serve_app.models.llama"),
        ("deployments.target", "serve_app.loaders.load"),
        ("serve_app.engine.engine", "deployments.target"),
        ("serve_app.config", "serve_app.engine.engine"),
        ("deployments.ingress", "serve_app.app"),
    ]:
        assert not is_allowed(Import(importer, imported, True)), (importer, imported)


@pytest.mark.parametrize("distribution", ONLY_IN)
def test_other_distributions_stay_where_they_belong(distribution: str) -> None:
    places = ONLY_IN[distribution]
    wrong = {
        found.importer
        for found in imports()
        if found.imported == distribution
        and not any(found.importer == place or found.importer.startswith(f"{place}.") for place in places)
    }
    assert not wrong


def test_oracles_are_no_run_time_need() -> None:
    assert not {(found.importer, found.imported) for found in imports() if found.imported in NEVER}


def test_torch_stays_below_the_server() -> None:
    wrong = {
        found.importer for found in imports() if found.imported == "torch" and area(found.importer) in TORCH_FREE_AREAS
    }
    assert not wrong
    program = {found.importer for found in imports() if found.imported == "torch" and area(found.importer) == "program"}
    assert program <= {"serve_app.commands.doctor"}


def test_there_are_no_import_cycles() -> None:
    graph: dict[str, set[str]] = {module: set() for module in modules()}
    for found in imports():
        if found.is_ours and found.imported != found.importer:
            graph[found.importer].add(found.imported)
    assert not list(_cycles(graph))


def _cycles(graph: dict[str, set[str]]) -> Iterator[list[str]]:
    """Each module that can be reached again from itself, with the path."""
    done: set[str] = set()
    for start in graph:
        stack, path = [iter([start])], [""]
        while stack:
            module = next(stack[-1], None)
            if module is None:
                stack.pop()
                done.add(path.pop())
            elif module in path:
                yield [*path[path.index(module) :], module]
            elif module not in done:
                path.append(module)
                stack.append(iter(sorted(graph.get(module, ()))))


def test_ray_can_read_the_builders_annotation() -> None:
    """Ray looks at the raw annotation of build_app: a string, as that future import makes it, would not be a class."""
    path = modules().get("serve_app.app")
    assert path is not None
    futures = [
        alias.name
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module == "__future__"
        for alias in node.names
    ]
    assert "annotations" not in futures
