"""Sizes of the package: functions, parameters, modules, rooms and arrows; those of an earlier revision beside them."""

from __future__ import annotations

import ast
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from benchmarks.frame import Table, benchmark
from benchmarks.house import PACKAGE, count, modules
from benchmarks.processes import run


class Function(NamedTuple):
    """A function: its name with module and class, its lines (decorators apart), its parameters (self and cls apart)."""

    name: str
    lines: int
    parameters: int


def functions(tree: ast.AST, within: str) -> Iterator[Function]:
    """Yield every function in a module, those within classes and functions too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            a = node.args
            named = [each.arg for each in [*a.posonlyargs, *a.args, *a.kwonlyargs] if each.arg not in ("self", "cls")]
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            yield Function(f"{within}.{node.name}", lines, len(named) + bool(a.vararg) + bool(a.kwarg))
        name = getattr(node, "name", "")
        yield from functions(node, f"{within}.{name}" if isinstance(name, str) and name else within)


def sizes(package: Path) -> dict[str, Any]:
    """Return what is counted, by what it is."""
    files = {name: path.read_text() for name, path in modules(package).items()}
    found = [each for name, text in files.items() for each in functions(ast.parse(text), name.partition(".")[2] or name)]
    lines = {name.partition(".")[2] or name: len(text.splitlines()) for name, text in files.items()}
    longest, wide = max(found, key=lambda f: f.lines), max(found, key=lambda f: f.parameters)
    module, house = max(lines, key=lambda name: lines[name]), count(package)
    return {
        "lines": house.lines,
        "modules": house.modules,
        "functions": len(found),
        "longest function, lines": longest.lines,
        "which": f"`{longest.name}`",
        "functions over 60 lines": sum(f.lines > 60 for f in found),
        "most parameters": wide.parameters,
        "taken by": f"`{wide.name}`",
        "functions with over 7 parameters": sum(f.parameters > 7 for f in found),
        "longest module, lines": lines[module],
        "which module": f"`{module}`",
        "modules over 300 lines": sum(n > 300 for n in lines.values()),
        "modules over 350 lines": sum(n > 350 for n in lines.values()),
        "rooms": house.rooms,
        "floors": house.floors or "a circle",
        "arrows": house.arrows,
    }


def of_revision(revision: str) -> dict[str, Any]:
    """Return the sizes of the package in a revision."""
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "package.tar"
        run("git", "archive", "-o", archive, revision, PACKAGE.name)
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        return sizes(Path(folder) / PACKAGE.name)


@benchmark(
    "Sizes of the package, before and after it moved into its house",
    note="Parameters: without self and cls. Lines of a function: docstring included, decorators apart.",
)
def main(table: Table, before: Annotated[str, "a revision; else the last before the house"] = "ddf851d^") -> None:
    table.name = "house_sizes"
    table.settings["before"] = run("git", "log", "-1", "--format=%h, %cs", before).strip()
    old, new = of_revision(before), sizes(PACKAGE)
    for what, value in new.items():
        table.add({"what": what, "before": old[what], "after": value})


if __name__ == "__main__":
    main()
