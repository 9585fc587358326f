"""The floors of the house, kept by reading every import: arrows point down, and algorithms see no processes or files."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from benchmarks.house import Graph, count, graph, imported, modules, table

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "hpc_hess"

# Rooms from the ground up. An import goes to a room of a lower floor, or stays in its own.
FLOORS: list[set[str]] = [
    {"__init__", "errors", "console", "profiling", "registry", "system"},
    {"config", "parallel"},
    {"intake", "linalg", "storage"},
    {"model", "sketch", "report"},
    {"curvature"},
    {"session"},
    {"planning", "studies"},
    {"commands", "api"},
    {"cli"},
    {"__main__"},
]
# The same within a room: folders of one floor do not know each other, and loose modules may know all that stand here.
INNER: dict[str, list[set[str]]] = {
    "model": [{"sources"}, {"sharded"}, {"blocks", "data"}],
    "curvature": [{"record"}, {"differences", "exact"}],
}
# Studies and commands know no sisters, but for these. What is loose in studies/ holds them together.
SISTERS: dict[str, dict[str, set[str]]] = {
    "studies": {},
    "commands": {"dynamics": {"finetune", "run"}, "intrinsic_dimension": {"finetune"}},
}
# Room -> libraries that it must not know
FORBIDDEN: dict[str, set[str]] = {
    "errors": {"torch", "numpy", "transformers", "h5py", "mpi4py"},
    "config": {"torch", "transformers", "h5py", "mpi4py"},
    "console": {"torch", "numpy", "transformers", "h5py", "mpi4py"},
    "system": {"torch", "numpy", "transformers", "h5py", "mpi4py"},
    "profiling": {"transformers", "h5py", "mpi4py"},
    "registry": {"torch", "numpy", "transformers", "h5py", "mpi4py"},
    "parallel": {"transformers", "h5py"},
    "linalg": {"torch.distributed", "h5py", "transformers", "mpi4py", "safetensors"},
    "model": {"h5py", "mpi4py"},
    "storage": {"transformers", "safetensors"},
    "curvature": {"h5py", "mpi4py", "transformers"},
    "report": {"torch.distributed", "transformers", "mpi4py"},
}
DRAWS = re.compile(r"hpc_hess\.(report\..*|.*\.(\w+_)?(views?|figures|page)|studies\.quadrature\.cumulative)")

Import = tuple[str, int, str]  # file, line, what is imported


def place_of(module: str) -> tuple[str, str]:
    """Return a module's room, and the folder or module within it."""
    names = [*module.split(".")[1:], "", ""]
    return names[0] or "__init__", names[1]


def imports(text: str, file: str, module: str, *, is_package: bool = False) -> Iterator[Import]:
    """Every import of a module, and every use of torch.distributed through torch."""
    tree = ast.parse(text)
    yield from ((file, line, target) for line, target in imported(tree, module, is_package=is_package))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "distributed" and ast.unparse(node) == "torch.distributed":
            yield file, node.lineno, "torch.distributed"


@functools.cache
def package() -> dict[str, list[Import]]:
    """Return the imports of each module of the package."""
    return {
        module: list(imports(path.read_text(), str(path.relative_to(ROOT)), module, is_package=path.stem == "__init__"))
        for module, path in modules(PACKAGE).items()
    }


def floor_of(room: str, floors: list[set[str]]) -> int | None:
    return next((k for k, rooms in enumerate(floors) if room in rooms), None)


def wrong(module: str, target: str) -> str:
    """Say what is wrong with a module of the package that imports another; "" where nothing is."""
    (room, part), (other, below) = place_of(module), place_of(target)
    if room != other:
        mine, theirs = floor_of(room, FLOORS), floor_of(other, FLOORS)
        if mine is None or theirs is None:
            return f"{room if mine is None else other} has no floor"
        return "" if theirs < mine else f"{room} stands no higher than {other}"
    if part == below or not below:
        return ""
    if room in INNER:
        mine, theirs = floor_of(part, INNER[room]), floor_of(below, INNER[room])
        return "" if mine is None or (theirs is not None and theirs < mine) else f"{part} stands no higher than {below}"
    folders = {path.name for path in (PACKAGE / room).iterdir() if path.is_dir()} if room in SISTERS else set()
    sisters = part in folders and below in folders and below not in SISTERS[room].get(part, ())
    return f"{part} knows its sister {below}" if sisters else ""


def wrong_arrows(found: dict[str, list[Import]]) -> list[str]:
    """Return one line per import that points up or sideways."""
    return [
        f"{file}:{line}: {module} imports {target}: {reason}"
        for module, targets in found.items()
        for file, line, target in targets
        if target.startswith("hpc_hess.") and (reason := wrong(module, target))
    ]


def wrong_libraries(found: dict[str, list[Import]]) -> list[str]:
    """Return one line per library that a room must not know; only what draws knows matplotlib."""
    return [
        f"{file}:{line}: {module} imports {target}"
        for module, targets in found.items()
        for file, line, target in targets
        for library in [*FORBIDDEN.get(place_of(module)[0], ()), *([] if DRAWS.fullmatch(module) else ["matplotlib"])]
        if target == library or target.startswith(f"{library}.")
    ]


def circle(found: Graph) -> str:
    try:
        list(TopologicalSorter(found).static_order())
    except CycleError as error:
        return " -> ".join(error.args[1])
    return ""


def test_arrows_point_down() -> None:
    assert wrong_arrows(package()) == []


def test_rooms_do_not_know_what_is_not_theirs() -> None:
    assert wrong_libraries(package()) == []


def test_every_module_has_a_floor_and_every_floor_a_module() -> None:
    assert {place_of(module)[0] for module in package()} == set().union(*FLOORS)
    for room, floors in INNER.items():
        assert set().union(*floors) <= {path.stem for path in (PACKAGE / room).iterdir()}


@pytest.mark.parametrize("folder", ["hpc_hess", "benchmarks"])
def test_there_is_no_circle(folder: str) -> None:
    assert circle(graph(ROOT / folder)) == ""


def test_no_test_knows_another() -> None:
    """What tests and benchmarks import of tests/ stands in tests/support; the golden numbers also know what made them."""
    found = [
        (module, line, target)
        for folder in ("tests", "benchmarks")
        for module, path in modules(ROOT / folder).items()
        for line, target in imported(ast.parse(path.read_text()), module, is_package=path.stem == "__init__")
        if target.startswith("tests.")
    ]
    assert len({module for module, _, _ in found}) > 80
    known = ("tests.support", "tests.golden.record")
    assert [each for each in found if not each[2].startswith(known)] == []


def test_the_house_stays_small() -> None:
    house = count()
    assert house.rooms <= 24
    assert house.floors is not None
    assert house.floors <= 10
    assert house.arrows <= 100


def test_the_package_was_found() -> None:
    found = package()
    assert len(found) > 200
    assert "torch.distributed" in {t for _, _, t in found["hpc_hess.parallel.world"]}


@pytest.mark.parametrize(
    ("module", "source", "count"),
    [
        ("hpc_hess.linalg.x", "from hpc_hess.model.sharded.shard import ShardedModel", 2),
        ("hpc_hess.linalg.x", "def f():\n    from ..storage import blocks", 2),
        ("hpc_hess.storage.x", "import hpc_hess.model.sharded.loss", 1),
        ("hpc_hess.parallel.x", "from hpc_hess.linalg import probes", 2),
        ("hpc_hess.model.data.x", "from hpc_hess.curvature.differences.step_size import scaled_step", 2),
        ("hpc_hess.model.sharded.x", "from hpc_hess.model.data.documents import Text", 2),
        ("hpc_hess.model.data.x", "from hpc_hess.model.blocks.splice import splice", 2),
        ("hpc_hess.model.sources.x", "from hpc_hess.model.loose import a", 2),
        ("hpc_hess.studies.trace.x", "from hpc_hess.studies.eigenpairs.compute import pairs_found", 2),
        ("hpc_hess.commands.check.x", "import hpc_hess.commands.run.work", 1),
        ("hpc_hess.session.x", "from hpc_hess.cli import main", 2),
        ("hpc_hess.attic", "from hpc_hess.errors import HpcHessError", 2),
        ("hpc_hess.cli", "from hpc_hess.attic import box", 2),
        ("hpc_hess.studies.trace.compute", "from matplotlib.figure import Figure", 2),
        ("hpc_hess.linalg.x", "import torch\ntorch.distributed.barrier()", 1),
        ("hpc_hess.linalg.x", "import torch.distributed as dist", 1),
        ("hpc_hess.linalg.x", "from torch import distributed", 1),
        ("hpc_hess.curvature.x", "from hpc_hess.model.sharded.gradient import Gradient", 0),
        ("hpc_hess.report.x", "from hpc_hess.linalg.quadrature import ritz", 0),
        ("hpc_hess.commands.dynamics.work", "from hpc_hess.commands.run.work import run", 0),
        ("hpc_hess.studies.trace.view", "from matplotlib.figure import Figure", 0),
    ],
)
def test_a_wrong_arrow_is_seen(module: str, source: str, count: int) -> None:
    found = {module: list(imports(source, "x.py", module))}
    assert len(wrong_arrows(found) + wrong_libraries(found)) == count


def test_the_page_lists_the_rooms_as_they_stand() -> None:
    """``python -m benchmarks.house`` prints the table."""
    assert table() in (ROOT / "docs" / "architecture.md").read_text()
