"""Every benchmark stands in the one frame, is listed, and says its settings; the frame writes what was measured."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Annotated, Literal

import pytest

from benchmarks.frame import Benchmark, Option, Table, benchmark, meets
from benchmarks.processes import FailedError, apart, module, run

ROOT = Path(__file__).resolve().parents[2]
# what others are made of, and what another program starts in an environment of its own
PARTS = {
    "__init__",
    "frame",
    "llamas",
    "peer_eigsh",
    "peer_products",
    "processes",
    "regimes_curves",
    "regimes_emulated",
    "regimes_figures",
    "regimes_formats",
    "results_page",
    "tables",
    "tiny_models",
}
NAMES = sorted({path.stem for path in (ROOT / "benchmarks").glob("*.py")} - PARTS)
PAGE = (ROOT / "benchmarks" / "README.md").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_each_is_declared_and_listed(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = importlib.import_module(f"benchmarks.{name}")
    assert isinstance(found.main, Benchmark)
    assert found.main.name == name
    if not name.startswith("regimes_"):  # part of another that has a page
        commands = re.findall(rf"^\| `python -m benchmarks\.{name}\b([^`]*)` \|", PAGE, re.MULTILINE)
        assert commands
    with pytest.raises(SystemExit) as ended:
        found.main(["--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert (found.__doc__ or "").split("\n")[0] in said
    assert "--write-to" in said


@pytest.mark.parametrize("line", re.findall(r"^\| `python -m benchmarks\.([^`]*)` \|", PAGE, re.MULTILINE))
def test_each_command_of_the_page_is_understood(line: str) -> None:
    import shlex

    name, *words = shlex.split(re.sub(r"\[([^]]*)\]", r"\1", line))
    if name not in PARTS:
        given = importlib.import_module(f"benchmarks.{name}").main.parser().parse_args(words)
        assert given.write_to == ROOT / "benchmarks" / "results"


def test_nothing_starts_processes_in_its_own_way() -> None:
    users = [
        name
        for name in NAMES
        if re.search(r"subprocess|multiprocessing|ProcessPool|Popen\(", (ROOT / "benchmarks" / f"{name}.py").read_text())
    ]
    assert not users


@benchmark("A toy", asked={"a / b": "<= 2", "time*": "< 1 %", "spread": "small"}, note="Words.")
def toy(
    table: Table,
    place: Annotated[Path, "of an environment"],
    steps: Annotated[int, "how many"] = 3,
    fast: bool = False,
    kinds: tuple[str, ...] = ("a", "b"),
    more: Annotated[tuple[str, ...], Option(flag="--set")] = (),
    scheme: Literal["central", "forward"] = "central",
    limit: float | None = None,
    only: Literal["this", "that"] | None = None,
    names: Annotated[tuple[str, ...], Option("of models", positional=True)] = (),
) -> int:
    table.settings["given"] = [place.name, steps, fast, kinds, more, scheme, limit, only, names]
    table.measured("a / b", 1.23456)
    table.measured("time of it", "2 % of all")
    table.measured("spread", 3.0)
    table.add({"what": "a pair", "first": 1, "second": 2})
    return len(names)


def written(folder: Path) -> tuple[dict, str]:
    (page,) = folder.glob("*.md")
    return json.loads(page.with_suffix(".json").read_text()), page.read_text()


def test_the_frame_writes_what_was_asked_and_measured(tmp_path: Path) -> None:
    toy(["--place", "/anywhere/python", "--write-to", str(tmp_path)])
    found, page = written(tmp_path)
    assert [list(row.values()) for row in found["rows"]] == [
        ["a / b", "<= 2", 1.23456, "yes"],
        ["time of it", "< 1 %", "2 % of all", "no"],
        ["spread", "small", 3.0],
        ["a pair", "", 1, 2],
    ]
    assert "| a / b | <= 2 | 1.23 | yes |" in page
    assert found["settings"]["steps"] == 3
    assert found["note"] == "Words."
    assert {"cpu", "cores", "torch", "numpy"} <= found["machine"].keys()
    assert found["settings"]["given"] == ["python", 3, False, ["a", "b"], [], "central", None, None, []]
    assert "`python -m benchmarks.test_benchmarks --place PLACE`" in page
    assert "anywhere" not in page + json.dumps(found)


def test_settings_come_from_the_command_line_and_are_repeated(tmp_path: Path) -> None:
    words = [
        "x y",
        "--steps",
        "7",
        "--fast",
        "--kinds",
        "c",
        "d",
        "--set",
        "p=1",
        "--set",
        "q=2",
        "--scheme",
        "forward",
        "--limit",
        "0.5",
        "--only",
        "that",
    ]
    with pytest.raises(SystemExit) as ended:
        toy([*words, "--place", "P", "--write-to", str(tmp_path)])
    assert ended.value.code == 1  # what the function returned
    found, page = written(tmp_path)
    assert found["settings"]["given"] == ["P", 7, True, ["c", "d"], ["p=1", "q=2"], "forward", 0.5, "that", ["x y"]]
    assert "--place PLACE --steps 7 --fast --kinds c d --set p=1 q=2 --scheme forward --limit 0.5 --only that 'x y'`" in page


@pytest.mark.parametrize(
    "words",
    [[], ["--place", "P", "--steps", "many"], ["--place", "P", "--scheme", "fourth"], ["--place", "P", "--only", "those"]],
)
def test_wrong_settings_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        toy(words)
    assert ended.value.code == 2
    assert "error:" in capsys.readouterr().err


@benchmark("Ended by force")
def breaks(table: Table) -> None:
    table.add({"row": 1})
    raise KeyboardInterrupt


def test_what_was_measured_before_an_end_by_force_is_kept(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        breaks(["--write-to", str(tmp_path)])
    found, page = written(tmp_path)
    assert found["rows"] == [{"row": 1}]
    assert "Not finished." in page


@benchmark("First")
def two(table: Table) -> None:
    table.add({"row": 1})
    table.finish()
    table.name, table.title = "other", "Second"
    assert table.earlier() == []
    table.add({"row": 2})


def test_a_benchmark_may_write_two_tables(tmp_path: Path) -> None:
    two(["--write-to", str(tmp_path)])
    rows = {path.stem: json.loads(path.read_text())["rows"] for path in tmp_path.glob("*.json")}
    assert rows == {"test_benchmarks": [{"row": 1}], "other": [{"row": 2}]}


@pytest.mark.parametrize(
    ("measured", "limit", "met"),
    [
        (1.0, "<= 1", True),
        (1.1, "<= 1", False),
        (1.0, "< 1", False),
        ("0.8 %", "<= 1.5 %", True),
        (3, ">= 0.6", True),
        (2.0, "about 2", None),
        ("none", "<= 1", None),
        ("", "<= 1", None),
        (None, "<= 1", None),
        (1e-9, "<= 1e-5", True),
    ],
)
def test_limits(measured: object, limit: str, met: bool | None) -> None:
    assert meets(measured, limit) is met


def test_processes_return_what_they_say_and_fail_with_a_reason() -> None:
    assert run("echo", "a", 1) == "a 1\n"
    with pytest.raises(FailedError, match="failed") as failed:
        run("bash", "-c", "echo first >&2; echo the reason >&2; exit 3")
    assert failed.value.why == "the reason"
    assert module("hpc_hess", "--version").startswith("hpc-hess")


def test_functions_on_ranks_of_their_own() -> None:
    from benchmarks.house import floors_of

    assert apart(floors_of, {"a": ["b"], "b": []}, threads=1) == [{"b": 1, "a": 2}]
