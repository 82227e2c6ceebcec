"""The import graph of our three packages, read from the sources."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("serve_app", "deployments", "kernels")


@dataclass(frozen=True)
class Import:
    """importer imports imported: a module of ours, or the first word of another's name."""

    importer: str
    imported: str
    is_ours: bool


@cache
def modules() -> dict[str, Path]:
    """Every module of ours by its full name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports() -> tuple[Import, ...]:
    """All imports at run time, also those inside functions; those under TYPE_CHECKING are left out."""
    return tuple(found for name, path in modules().items() for found in _imports_of(name, path))


def _imports_of(importer: str, path: Path) -> Iterator[Import]:
    for node in _run_time_nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports of ours are written in full"
            assert node.module is not None
            names = [_module_of(node.module, alias.name) for alias in node.names]
        else:
            continue
        for name in names:
            is_ours = name.split(".")[0] in PACKAGES
            yield Import(importer, name if is_ours else name.split(".")[0], is_ours)


def _module_of(module: str, name: str) -> str:
    return f"{module}.{name}" if f"{module}.{name}" in modules() else module


def _run_time_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _run_time_nodes(node)
