"""Count the rooms, floors and arrows of the package, and list them.

A folder of the package's root, with all that lies in it, is a room; so is a loose module of the root. An arrow goes from a
room to another that it imports, anywhere in its modules, once for each pair. The floors are the longest chain of rooms.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Annotated, NamedTuple

from benchmarks.frame import Option, Table, benchmark

PACKAGE = Path(__file__).parents[1] / "hpc_hess"
Graph = dict[str, set[str]]


class House(NamedTuple):
    """``floors``: None where rooms stand in a circle, which is then named."""

    lines: int
    modules: int
    rooms: int
    floors: int | None
    arrows: int
    circle: list[str]


def modules(package: Path) -> dict[str, Path]:
    """Return the file of each module, by its dotted name."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        name = ".".join(path.relative_to(package.parent).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


def imported(tree: ast.Module, module: str, *, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of every import, also within functions: ``from a import b`` gives a and a.b."""
    within = module.split(".") + ["_"] * is_package
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*within[: -node.level], *filter(None, [node.module])]) if node.level else node.module or ""
            yield node.lineno, base
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def graph(package: Path) -> Graph:
    """Return the modules of the package that each of its modules imports."""
    files = modules(package)
    found: Graph = {}
    for name, path in files.items():
        inits = path.name == "__init__.py"
        targets = {target for _, target in imported(ast.parse(path.read_text()), name, is_package=inits)}
        found[name] = {target for target in targets if target in files} - {name}
    return found


def room_of(module: str) -> str:
    """Return the room of a module: the folder of the root that it lies in, or itself where it is loose."""
    return [*module.split("."), "__init__"][1]


def rooms_of(package: Path) -> Graph:
    """Return the rooms that each room imports."""
    rooms: Graph = {}
    for name, targets in graph(package).items():
        rooms.setdefault(room_of(name), set()).update({room_of(target) for target in targets} - {room_of(name)})
    return rooms


def floors_of(rooms: Graph) -> dict[str, int]:
    """Return the floor of each room: one above the highest that it imports. Raises CycleError."""
    floors: dict[str, int] = {}
    for room in TopologicalSorter(rooms).static_order():
        floors[room] = 1 + max((floors[below] for below in rooms[room]), default=0)
    return floors


def count(package: Path = PACKAGE) -> House:
    """Count the house."""
    files, rooms = modules(package), rooms_of(package)
    floors, circle = None, []
    try:
        floors = max(floors_of(rooms).values())
    except CycleError as error:
        circle = error.args[1]
    lines = sum(len(path.read_text().splitlines()) for path in files.values())
    return House(lines, len(files), len(rooms), floors, sum(map(len, rooms.values())), circle)


def table(package: Path = PACKAGE) -> str:
    """Return the rooms as Markdown, from the highest floor down, with what each says of itself."""
    files, floors = modules(package), floors_of(rooms_of(package))
    rows = []
    for room, floor in sorted(floors.items(), key=lambda item: (-item[1], item[0])):
        module = package.name if room == "__init__" else f"{package.name}.{room}"
        said = (ast.get_docstring(ast.parse(files[module].read_text())) or "").split("\n\n")[0].split(". ")[0]
        rows.append(f"| {floor} | `{room}` | {' '.join(said.split()).rstrip('.').replace('``', '`')} |")
    return "\n".join(["| floor | room | what it is |", "|---|---|---|", *rows]) + "\n"


@benchmark("The house: rooms, floors and arrows")
def main(_: Table, folder: Annotated[Path, Option("of a package", positional=True)] = PACKAGE) -> None:
    """Print them; the table of results is that of benchmarks.sizes."""
    found = count(folder.resolve())
    print(", ".join(f"{value} {name}" for name, value in found._asdict().items() if name != "circle"))
    print("a circle: " + " -> ".join(found.circle) if found.circle else "no circle")
    if not found.circle:
        print("\n" + table(folder.resolve()), end="")


if __name__ == "__main__":
    main()
