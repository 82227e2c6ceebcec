"""What the sources of GPU kernels may not say, because it means another thing to another Triton."""

import ast
from collections.abc import Iterator

from tests.architecture.source_tree import modules


def negations(tree: ast.AST) -> Iterator[ast.UnaryOp]:
    """Of what may be a tensor: constants and compile-time parameters, all in capitals, are numbers of Python's."""
    for node in ast.walk(tree):
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            operand = node.operand
            if not isinstance(operand, ast.Constant) and not (isinstance(operand, ast.Name) and operand.id.isupper()):
                yield node


def is_kernel(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef) and any(
        ast.unparse(decorator).startswith("triton.jit") for decorator in node.decorator_list
    )


def test_no_tensor_is_negated() -> None:
    """Before 3.9 Triton computes 0 - x, which makes 0 of 0 and not -0: kernels say -1.0 * x."""
    num_kernels, found = 0, []
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if is_kernel(node):
                num_kernels += 1
                found += [f"{name}:{negation.lineno}" for negation in negations(node)]
    assert num_kernels > 20
    assert found == []
