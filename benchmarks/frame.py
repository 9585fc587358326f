"""The frame of every benchmark: settings, machine and versions, the table, what was asked against what was measured.

    @benchmark("A Krylov basis on disk", asked={"disk / memory": "<= 2"})
    def main(table: Table, steps: Annotated[int, "of Lanczos"] = 20) -> None:
        table.measured("disk / memory", 1.4)

The function's parameters are the options of ``python -m benchmarks.NAME``. Every row is printed, and written to
results/NAME.json and NAME.md at once: a benchmark that is ended by force keeps the rows that it has.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import inspect
import json
import os
import platform
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from benchmarks import tables
from hpc_hess.system import ask_for_large_pages

ask_for_large_pages(os.environ)  # as the program does, for this process and those that it starts

_LIMIT = re.compile(r"(<=|>=|<|>) *([-+.\de]+)")


@dataclass(frozen=True)
class Option:
    """How a parameter stands on the command line, where its type and name do not say it: in Annotated, as a text does.

    ``flag``: another one than --NAME; ``positional``: none at all.
    """

    help: str = ""
    choices: tuple[Any, ...] | None = None
    flag: str = ""
    positional: bool = False
    metavar: str | None = None


class Table:
    """Rows, and what they are rows of. A benchmark may set ``note``, ``name`` and ``title``, and add to ``settings``."""

    def __init__(self, frame: Benchmark, folder: Path, given: dict[str, Any]) -> None:
        self.name, self.title, self.note, self.folder = frame.name, frame.title, frame.note, folder
        self.settings = {
            key.replace("_", " "): value
            for key, value in given.items()
            if value not in (None, "", ()) and not isinstance(value, Path)
        }
        self.given = argparse.Namespace(**given)  # as the function gets them, to hand on
        self.command, self.rows, self._asked = frame.command(given), list[dict[str, Any]](), frame.asked
        self.machine: dict[str, Any] = {}  # another one than this
        if isinstance(frame.asked, str) and frame.asked:
            self.settings["asked"] = frame.asked

    def add(self, row: dict[str, Any]) -> None:
        """Print and keep a row; one that says ``what`` it is gets what was asked of it, and whether that was met."""
        if "what" in row and isinstance(self._asked, dict):
            limit = next((text for what, text in self._asked.items() if fnmatchcase(row["what"], what)), "")
            row = {"what": row["what"], "asked": limit, **row}
            if (met := meets(row.get("measured"), limit)) is not None:
                row["met"] = "yes" if met else "no"
        self.rows.append(row)
        print(", ".join(f"{key}: {tables.show(value)}" for key, value in row.items() if value != ""), flush=True)
        self._write(finished=False)

    def measured(self, what: str, value: Any) -> None:
        """Add what was measured."""
        self.add({"what": what, "measured": value})

    def earlier(self) -> list[dict[str, Any]]:
        """Return the rows that an earlier run has written."""
        path = self.folder / f"{self.name}.json"
        return list(json.loads(path.read_text())["rows"]) if path.exists() else []

    def finish(self) -> None:
        """Write the table and show it; rows that are added after it begin another, under another ``name``."""
        self._write(finished=True)
        print("\n" + tables.table(self.rows), f"\n\n{self.note}\n" if self.note else "", flush=True)
        self.rows = []

    def _write(self, *, finished: bool) -> None:
        note = self.note if finished else f"Not finished. {self.note}"
        record = {
            "title": self.title,
            "date": datetime.now(UTC).date().isoformat(),
            "machine": self.machine or machine(),
            "settings": self.settings,
            "note": note,
            "rows": self.rows,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"{self.name}.json").write_text(json.dumps(record, indent=1) + "\n")
        on = ", ".join(f"{key} {value}" for key, value in record["machine"].items() if value is not None)
        told = ", ".join(f"{key} = {_words(value)}" for key, value in self.settings.items())
        how = f"Repeat: `{self.command}`. Measured {record['date']} on {on}." + (f"\nSettings: {told}." if told else "")
        parts = [f"# {self.title}", how, tables.table(self.rows), *filter(None, [note])]
        (self.folder / f"{self.name}.md").write_text("\n\n".join(parts) + "\n")


@dataclass(frozen=True)
class Benchmark:
    """A function of a table and settings; called with the words of a command line, else with sys.argv's."""

    function: Callable[..., int | None]
    title: str
    asked: dict[str, str] | str
    note: str

    @property
    def name(self) -> str:
        """The module's, also where it is __main__."""
        return Path(inspect.getfile(self.function)).stem

    @functools.cached_property
    def _parameters(self) -> list[tuple[str, Any, Any, Option]]:
        """Name, type, default, option of each setting."""
        hints, found = get_type_hints(self.function, include_extras=True), []
        for name, parameter in list(inspect.signature(self.function).parameters.items())[1:]:
            kind, *more = get_args(hints[name]) if get_origin(hints[name]) is Annotated else (hints[name],)
            option = next(iter(more), Option())
            found.append((name, kind, parameter.default, Option(option) if isinstance(option, str) else option))
        return found

    def parser(self) -> argparse.ArgumentParser:
        """Return the parser of the command line."""
        parser = argparse.ArgumentParser(
            f"python -m benchmarks.{self.name}",
            description=inspect.getdoc(inspect.getmodule(self.function)),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for name, kind, default, option in self._parameters:
            said: dict[str, Any] = {"help": option.help or None, "metavar": option.metavar}
            if kind is bool:
                parser.add_argument(_flag(name, option), action="store_true", dest=name, help=option.help or None)
                continue
            if get_origin(kind) is tuple:
                said["nargs"], kind = "*", get_args(kind)[0]
                said["action"] = "store" if default else "extend"  # --set a --set b
            kind = next((each for each in get_args(kind) if NoneType in get_args(kind) and each is not NoneType), kind)
            choices, kind = (get_args(kind), str) if get_origin(kind) is Literal else (option.choices, kind)
            needed, given = default is inspect.Parameter.empty, list(default) if "nargs" in said else default
            if option.positional:
                said = {"nargs": "?", **said, "action": "store"}
                parser.add_argument(name, type=kind, choices=choices, default=given, **said)
            else:
                parser.add_argument(
                    _flag(name, option),
                    dest=name,
                    type=kind,
                    choices=choices,
                    required=needed,
                    default=None if needed else given,
                    **said,
                )
        parser.add_argument("--write-to", type=Path, default=tables.RESULTS, help="folder of the table (default: results/)")
        return parser

    def command(self, given: dict[str, Any]) -> str:
        """Return the command that repeats a run; paths are those of another machine there, and stand as names."""
        words = ["python", "-m", f"benchmarks.{self.name}"]
        for name, _, default, option in self._parameters:
            value = given[name]
            if value != default and value is not None:
                words += [] if option.positional else [_flag(name, option)]
                if isinstance(value, Path):
                    words.append(name.upper())
                elif value is not True:
                    words += map(str, value) if isinstance(value, tuple) else [str(value)]
        return shlex.join(words)

    def __call__(self, words: Sequence[str] | None = None) -> None:
        """Measure and write the table. Raises SystemExit where the function returns a code that is not 0."""
        given = vars(self.parser().parse_args(words))
        folder = given.pop("write_to")
        given = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
        table = Table(self, folder, given)
        code = self.function(table, **given)
        if table.rows:
            table.finish()
        if code:
            raise SystemExit(code)


def benchmark(
    title: str, *, asked: dict[str, str] | str = "", note: str = ""
) -> Callable[[Callable[..., int | None]], Benchmark]:
    """Make a benchmark of a function.

    ``asked``: limits by what rows say that they are (``*`` for anything), such as "<= 2"; or a sentence about the table.
    """
    return lambda function: Benchmark(function, title, asked, note)


def meets(measured: Any, limit: str) -> bool | None:
    """Whether a number is within a limit; None where that cannot be told. A text counts by its first number."""
    asked = _LIMIT.match(limit)
    if asked is None or measured is None:
        return None
    try:
        value, bound = float(str(measured).split()[0]), float(asked[2])
    except (ValueError, IndexError):
        return None
    return {"<=": value <= bound, ">=": value >= bound, "<": value < bound, ">": value > bound}[asked[1]]


@functools.cache
def machine() -> dict[str, Any]:
    """Return processor, cores, memory and versions."""
    import psutil
    import torch

    cpu = next(
        (line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.machine(),
    )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy", "h5py")}
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "gpu": gpu,
        "python": platform.python_version(),
        **versions,
    }


def _flag(name: str, option: Option) -> str:
    return option.flag or f"--{name.replace('_', '-')}"


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
