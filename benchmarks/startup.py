"""CPU seconds, user and system, of short commands and of a toy run; the files that they open; the largest imports."""

from __future__ import annotations

import re
import resource
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

from benchmarks.frame import Table, benchmark
from benchmarks.processes import run
from benchmarks.tables import ROOT

_TOY = ["run", "--toy", "--set=lanczos.steps=2", "--set=lanczos.probes=1"]
_OPENED = """import sys
opened = [0]
def count(event, _): opened[0] += event == "open"
sys.addaudithook(count)
import hpc_hess.cli
try: hpc_hess.cli.main({words!r})
except SystemExit: pass
print("opened", opened[0], flush=True)
__import__("os")._exit(0)"""
_IMPORT = re.compile(r"import time: +(\d+) \| +\d+ \| +(\w+)")


def program(words: list[str], tree: Path, ranks: int = 1) -> list[str]:
    """Return the command that runs ``tree``'s program: -P keeps the working directory out of the search for modules."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    return [sys.executable, "-P", *launcher, "-m", "hpc_hess", *words]


def cpu_s(command: list[str], tree: Path) -> float:
    """Run a command to its end and return what it took, its children included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run(*command, threads=1, PYTHONPATH=str(tree))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def files_opened(words: list[str], tree: Path) -> int:
    """Return how many files a command opens in Python, modules included; libraries that the linker opens do not count."""
    said = run(sys.executable, "-P", "-c", _OPENED.format(words=words), threads=1, PYTHONPATH=str(tree))
    return int(said.split()[-1])


def imports(words: list[str], tree: Path) -> dict[str, tuple[float, int]]:
    """Return seconds and number of modules that a command imports, by package, the slowest first."""
    code = f"import hpc_hess.cli, os, sys; hpc_hess.cli.main({words!r}); sys.stderr.flush(); os._exit(0)"
    with tempfile.NamedTemporaryFile("r") as log:
        command = f'exec {sys.executable} -P -X importtime -c "$0" 2>{log.name}'
        run("sh", "-c", command, code, threads=1, PYTHONPATH=str(tree))
        found = defaultdict[str, list[int]](list)
        for microseconds, package in _IMPORT.findall(log.read()):
            found[package].append(int(microseconds))
    return dict(sorted(((k, (sum(v) / 1e6, len(v))) for k, v in found.items()), key=lambda item: -item[1][0]))


@benchmark(
    "Start-up and small runs, in CPU seconds",
    asked={"--help": "<= 0.3", "toy run of 2 steps": "<= 5"},
    note=(
        "Medians, user and system time, of a process and its children; the program begins anew each time. Files: those that "
        "Python opens, of the program's own process. Imports: time within the modules of a package, not of those that they "
        "import."
    ),
)
def main(
    table: Table,
    repeats: int = 5,
    before: Annotated[Path | None, "another checkout, measured in turn with this one"] = None,
    packages: Annotated[int, "so many of the imports"] = 8,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        outs = {tree: Path(folder) / name for name, tree in (("here", ROOT), ("before", before)) if tree}
        for tree in outs:
            run(sys.executable, "-m", "compileall", "-q", tree / "hpc_hess")

        def toy(tree: Path) -> list[str]:
            return [*_TOY, f"--set=run.out={outs[tree]}/run"]

        def anew(tree: Path) -> list[str]:
            return [*toy(tree), "--resume=never"]

        measured: dict[str, Any] = {
            "--help": (lambda tree: ["--help"], 1),
            "--version": (lambda tree: ["--version"], 1),
            "config": (lambda tree: ["config"], 1),
            "toy run of 2 steps": (anew, 1),
            "the same again: it is finished": (toy, 1),
            "inspect": (lambda tree: ["inspect", f"{outs[tree]}/run"], 1),
            "report": (lambda tree: ["report", f"{outs[tree]}/run"], 1),
            "toy run of 2 steps on 2 ranks, with torchrun": (anew, 2),
        }
        for what, (words, ranks) in measured.items():
            files = {tree: files_opened(words(tree), tree) for tree in outs if ranks == 1}
            taken: dict[Path, list[float]] = {tree: [] for tree in outs}
            for _ in range(repeats):
                for tree, seconds in taken.items():
                    seconds.append(cpu_s(program(words(tree), tree, ranks), tree))
            row: dict[str, Any] = {"what": what, "measured": statistics.median(taken[ROOT]), "files": files.get(ROOT)}
            if before:
                row["before"] = statistics.median(taken[before])
                row["of before"] = row["measured"] / row["before"]
                row["files before"] = files.get(before)
            table.add(row)
        found = {tree: imports(anew(tree), tree) for tree in outs}
        for package, (seconds, modules) in list(found[ROOT].items())[:packages]:
            row = {"what": f"imports of that toy run: {package}", "measured": seconds, "modules": modules}
            if before:
                row["before"] = found[before].get(package, (0.0, 0))[0]
            table.add(row)


if __name__ == "__main__":
    main()
