"""Functions are given what belongs together as one thing: at most seven parameters, with few exceptions."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "hpc_hess"
MOST = 7
EXCEPTIONS = {
    "api/operators.py": {"hessian"},  # settings that people write by name in notebooks
    "api/sketches.py": {"gradient_sketches"},
    "api/spectra.py": {"eigenpairs", "slq"},
    "curvature/exact/tangents.py": {"pull_again", "push_keeping"},  # a function, its point, its direction
    "model/blocks/attention.py": {"scaled_dot_product_attention"},  # torch's own
    "model/blocks/attention_chunks.py": {"pulls"},  # what stands in its formula
    "model/blocks/eager.py": {"_attend", "_ours", "_same"},  # as transformers' own
    "report/comparison.py": {"write_comparison"},  # what a page holds, by name
    "storage/build.py": {"build"},  # how a store lies on disk, by name
    "storage/opening.py": {"rebuild"},
    "storage/store.py": {"create", "open"},
}


def many(text: str) -> set[str]:
    """Return the functions with more parameters, self and cls aside."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            a = node.args
            names = [x.arg for x in [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, [a.vararg, a.kwarg])]]
            if len([name for name in names if name not in ("self", "cls")]) > MOST:
                found.add(node.name)
    return found


def test_no_function_takes_more_than_seven_parameters() -> None:
    found = {str(path.relative_to(PACKAGE)): many(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
    assert {file: names for file, names in found.items() if names} == EXCEPTIONS


def test_an_eighth_parameter_is_seen() -> None:
    assert many("def f(self, a, b, c, d, e, /, f, *, g): ...") == set()
    assert many("class A:\n    def f(self, a, b, c, d, e, /, f, *g, **h): ...") == {"f"}
