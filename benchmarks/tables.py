"""Rows of results/*.json as Markdown tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
Row = dict[str, Any]


def exists(name: str) -> bool:
    """Return whether results/NAME.json is there."""
    return (RESULTS / f"{name}.json").exists()


def rows(name: str) -> list[Row]:
    """Return the rows of results/NAME.json."""
    return list(json.loads((RESULTS / f"{name}.json").read_text())["rows"])


def settings(name: str) -> Row:
    """Return the settings of results/NAME.json."""
    return dict(json.loads((RESULTS / f"{name}.json").read_text())["settings"])


def cell(name: str, what: str, column: str = "measured") -> float:
    """Return the number in the row whose first column begins with ``what``."""
    found = [row for row in rows(name) if str(next(iter(row.values()))).startswith(what)]
    if len(found) != 1:
        raise KeyError(f"{name}: {len(found)} rows begin with '{what}'")
    return float(str(found[0][column]).split()[0])


def show(value: Any) -> str:
    """Return a cell: numbers in three digits, from 0.001 to 1,000,000 without an exponent."""
    if not isinstance(value, float):
        return "" if value is None else str(value).replace("|", r"\|")
    if value and not 1e-3 <= abs(value) < 1e6:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{float(f'{value:.3g}'):,g}"


def spread(values: Iterable[float]) -> str:
    """Return "least to most"."""
    found = list(values)
    return f"{show(min(found))} to {show(max(found))}"


def against(value: float, most: float, unit: str = "") -> str:
    """Return the value, and whether it is more than what was asked."""
    return show(float(value)) + unit + (": missed" if float(f"{value:.3g}") > most else "")


def table(found: list[Row]) -> str:
    """Return rows as Markdown."""
    columns = list(dict.fromkeys(key for row in found for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(show(row.get(c)) for c in columns) + " |" for row in found])


def chosen(name: str, columns: dict[str, str]) -> str:
    """Return some columns of results/NAME.json, by other names; those that it does not have are left out."""
    found = rows(name)
    held = {old: new for old, new in columns.items() if any(old in row for row in found)}
    return table([{new: row.get(old) for old, new in held.items()} for row in found])


def pivot(found: list[Row], keys: dict[str, str], entry: Callable[[Row], tuple[str, Any]]) -> str:
    """Return one row for each value of ``keys`` (by other names), with a column for each name that ``entry`` gives."""
    lines: dict[tuple[str, ...], Row] = {}
    for row in found:
        key = tuple(str(row.get(k) or "") for k in keys)
        column, value = entry(row)
        lines.setdefault(key, dict(zip(keys.values(), key, strict=True)))[column] = value
    return table(list(lines.values()))


def asked(*found: tuple[str, str, str, str]) -> str:
    """Return a table of (what, asked, measured, name of the results)."""
    return table(
        [
            {"what": what, "asked": limit, "measured": measured, "all numbers": f"[{name}](../benchmarks/results/{name}.md)"}
            for what, limit, measured, name in found
        ]
    )
