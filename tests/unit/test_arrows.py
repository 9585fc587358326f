"""The map of the code, kept by reading every import: arrows point down, and algorithms see no processes or files.

cli, api -> run -> {report, scaling, analysis, sketch} -> {storage, curvature, model} -> linalg -> parallel ->
{config, errors}.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "hpc_hess"
_BASE = {"config", "errors"}
_LINALG = {"linalg", "parallel", *_BASE}

# Part of the package -> the parts it may import. A module of the top level that is not named here is "run".
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "config": {"errors"},
    "intake": {"parallel", *_BASE},
    "parallel": _BASE,
    "linalg": {"parallel", *_BASE},
    "model": {"intake", *_LINALG},
    "storage": _LINALG,
    "curvature": {"model", "intake", *_LINALG},
    "report": {"storage", *_LINALG},
    "scaling": {"storage", "curvature", "model", "intake", *_LINALG},
    "analysis": {"storage", "curvature", "model", "intake", *_LINALG},
    "sketch": {"storage", "curvature", "model", "intake", *_LINALG},
}
ALLOWED["run"] = {*ALLOWED}
ALLOWED["top"] = {*ALLOWED, "run"}

# Part -> libraries that it must not know
FORBIDDEN: dict[str, set[str]] = {
    "errors": {"torch", "numpy", "transformers", "h5py", "mpi4py"},
    "config": {"torch", "transformers", "h5py", "mpi4py"},
    "parallel": {"transformers", "h5py"},
    "linalg": {"torch.distributed", "h5py", "transformers", "mpi4py", "safetensors"},
    "model": {"h5py", "mpi4py"},
    "storage": {"transformers", "safetensors"},
    "curvature": {"h5py", "mpi4py", "transformers"},
    "report": {"torch.distributed", "transformers", "mpi4py"},
}

Import = tuple[str, int, str]  # file, line, what is imported


def part_of(module: str) -> str:
    """Return the part of the package that a dotted module name belongs to."""
    names = module.split(".")[1:]
    if names[:1] in (["cli"], ["api"], ["classifiers"], ["sketches"], ["__main__"]) or not names:
        return "top"
    return names[0] if names[0] in ALLOWED else "run"


def imports(tree: ast.Module, file: str, module: str) -> Iterator[Import]:
    """Every import of a module, also inside functions, and every use of torch.distributed through torch."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((file, node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*module.split(".")[: -node.level], *filter(None, [base])])
            yield file, node.lineno, base
            yield from ((file, node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            yield file, node.lineno, "torch.distributed"


def package() -> dict[str, list[Import]]:
    """Return the imports of each module of the package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE.parent)
        module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        found[module] = list(imports(ast.parse(path.read_text()), str(relative), f"{module}._"
                                     if path.name == "__init__.py" else module))  # fmt: skip
    return found


def wrong_arrows(modules: dict[str, list[Import]]) -> list[str]:
    """Return one line per import that points up or sideways."""
    wrong = []
    for module, found in modules.items():
        part = part_of(module)
        for file, line, target in found:
            if target.split(".")[0] != "hpc_hess" or target == "hpc_hess":
                continue
            other = part_of(target)
            if other != part and other not in ALLOWED[part]:
                wrong.append(f"{file}:{line}: {part} imports {target} ({other})")
    return wrong


def wrong_libraries(modules: dict[str, list[Import]]) -> list[str]:
    """Return one line per library that a part must not know."""
    return [
        f"{file}:{line}: {part_of(module)} imports {target}"
        for module, found in modules.items()
        for file, line, target in found
        for library in FORBIDDEN.get(part_of(module), ())
        if target == library or target.startswith(f"{library}.")
    ]


def test_arrows_point_down() -> None:
    assert wrong_arrows(package()) == []


def test_parts_do_not_know_what_is_not_theirs() -> None:
    assert wrong_libraries(package()) == []


def test_there_is_no_circle() -> None:
    modules = package()
    graph = {m: {t for _, _, t in found if t in modules and t != m} for m, found in modules.items()}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"modules import each other in a circle: {' -> '.join(error.args[1])}")


def test_the_package_was_found() -> None:
    modules = package()
    assert {part_of(m) for m in modules} >= {"errors", "config", "parallel", "linalg", "model", "storage", "curvature"}
    assert "torch.distributed" in {t for _, _, t in modules["hpc_hess.parallel.world"]}


@pytest.mark.parametrize(
    ("module", "source", "count"),
    [
        ("hpc_hess.linalg.x", "from hpc_hess.model.shard import ShardedModel", 2),
        ("hpc_hess.linalg.x", "def f():\n    from ..storage import blocks", 2),
        ("hpc_hess.storage.x", "import hpc_hess.model.loss", 1),
        ("hpc_hess.parallel.x", "from hpc_hess.linalg import probes", 2),
        ("hpc_hess.model.x", "from hpc_hess.curvature.step_size import scaled_step", 2),
        ("hpc_hess.model.x", "from hpc_hess.run import run", 2),
        ("hpc_hess.run", "from hpc_hess.cli import main", 2),
        ("hpc_hess.linalg.x", "import torch\ntorch.distributed.barrier()", 1),
        ("hpc_hess.linalg.x", "import torch.distributed as dist", 1),
        ("hpc_hess.linalg.x", "from torch import distributed", 1),
        ("hpc_hess.curvature.x", "from hpc_hess.model.gradient import Gradient", 0),
        ("hpc_hess.report.x", "from hpc_hess.linalg.quadrature import ritz", 0),
    ],
)
def test_a_wrong_arrow_is_seen(module: str, source: str, count: int) -> None:
    modules = {module: list(imports(ast.parse(source), "x.py", module))}
    assert len(wrong_arrows(modules) + wrong_libraries(modules)) == count
