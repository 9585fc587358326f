"""report.html: one file that opens offline, with every number, figure and setting of a run."""

from __future__ import annotations

import base64
import shlex
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from hpc_hess.config import IN_PROGRAM
from hpc_hess.console.words import (
    ERROR_TERMS,
    NONE,
    count,
    duration,
    minus,
    number,
    plural,
    rates,
    size,
    spread_text,
    trace_text,
)
from hpc_hess.errors import ConfigError
from hpc_hess.linalg.measure import Interval
from hpc_hess.registry.operators import OPERATORS
from hpc_hess.report.spectrum import (
    extreme_residuals,
    extremes,
    interval_text,
    model_name,
    quadratures,
    sketch_text,
    story,
    warnings,
)
from hpc_hess.report.template import render_template
from hpc_hess.storage.run_files import WRITE_ANEW, RunFiles, read_run, step_events, write_aside
from hpc_hess.studies import views
from hpc_hess.studies.quadrature import cumulative
from hpc_hess.studies.run_figures import Plot, write_figures


class Row(NamedTuple):
    """One line of a table: what, how much, and what it means."""

    label: str
    value: str
    meaning: str = ""


def write_report(run_dir: str | Path) -> Path:
    """Write ``figures/*`` and ``report.html`` into a finished run and return the page's path. Local, one rank only.

    Raises
    ------
    ConfigError : no such run directory, or it holds no readable result.json.

    """
    run = read_run(run_dir)
    plots = write_figures(run.result, run.events, run.path / "figures")
    page = run.path / "report.html"
    write_aside(page, render(run, plots))
    return page


def rewrite_report(run_dir: str | Path) -> Path:
    """As :func:`write_report`, for what another process or version wrote: what it does not hold is a ConfigError."""
    try:
        return write_report(run_dir)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{Path(run_dir) / 'result.json'} does not hold what a report shows ({type(error).__name__}: {error}): "
            f"{WRITE_ANEW}"
        ) from error


def render(run: RunFiles, plots: Sequence[Plot]) -> str:
    """Return the page as text; everything taken from the run is escaped by the template."""
    result = run.result
    return render_template(
        "page.html",
        title=f"{_kind(result)} spectrum of {model_name(result.get('model'))}",
        story=minus_signs(story(result)),
        cautions=[minus_signs(text) for text in warnings(result)],
        intake=_intake(result.get("intake")),
        cards=_cards(result),
        plots=[(plot, _inline(plot.svg)) for plot in plots],
        probes=_probe_tables(result),
        studies=[
            (view.TITLE, minus_signs(view.facts(found)), view.HEADERS, view.table(found))
            for _, view, found in views.parts(result)
        ],
        errors=_errors(result.get("errors")),
        facts=[(name, rows) for name, rows in _facts(run) if rows],
        settings=_settings(run.config_text),
        commands=_commands(run),
        run_name=_run_name(run),
    )


def minus_signs(text: str) -> str:
    """Use true minus signs before digits, and leave hyphens in words alone."""
    return "".join(minus(c) if c == "-" and text[i + 1 : i + 2].isdigit() else c for i, c in enumerate(text))


def _run_name(run: RunFiles) -> str:
    """Return the directory's name, with the time of the last event where one is known."""
    times = [e["time"] for e in run.events if isinstance(e.get("time"), int | float)]
    when = f", {datetime.fromtimestamp(times[-1], UTC):%Y-%m-%d %H:%M} UTC" if times else ""
    return f"Run {run.path.resolve().name}{when}"


def _kind(result: Mapping[str, Any]) -> str:
    name = str(_table(result.get("operator")).get("name") or "hessian")
    return OPERATORS[name].title if name in OPERATORS else name.replace("_", " ").capitalize()


def _table(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _inline(svg: Path) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.read_bytes()).decode("ascii")


def _cards(result: Mapping[str, Any]) -> list[Row]:
    low, high = extremes(result)
    below, above = extreme_residuals(result)
    scale = max(abs(low or 0.0), abs(high or 0.0))
    trace, sketch = _table(result.get("trace")), sketch_text(result)
    num_params = result.get("num_params_model" if sketch else "num_params")
    meaning = sketch or (f"{num_params:,}" if (num_params or 0) >= 1e6 else "")
    spread = ""
    if trace.get("mean") is not None:
        spread = spread_text(trace) or "one probe: no error estimate"
    cards = [
        Row("λ max", number(high), interval_text(result, high, above, scale)),
        Row("λ min", number(low), interval_text(result, low, below, scale)),
        Row("Trace", number(trace.get("mean")), spread),
        Row("Parameters", count(num_params).split(" (")[-1].rstrip(")"), meaning),
        Row("Lanczos", plural(result.get("steps"), "step"), plural(len(result.get("probes") or []), "probe")),
    ]
    hvp_s = _table(result.get("timing")).get("hvp_s")
    if hvp_s is not None:
        cards.append(Row("One product", duration(hvp_s), plural(result.get("world_size"), "rank")))
    return [Row(c.label, minus_signs(c.value), minus_signs(c.meaning)) for c in cards]


def _probe_tables(result: Mapping[str, Any]) -> list[tuple[str, list[list[str]]]]:
    """Return (heading, rows of value, weight, residual), from the largest to the smallest Ritz value."""
    tables = []
    for k, part in enumerate(quadratures(result)):
        order = part.values.argsort()[::-1]
        columns = (part.values, part.weights, part.residuals)
        rows = [[minus_signs(number(float(c[i]), d)) for c, d in zip(columns, (7, 4, 3), strict=True)] for i in order]
        seed = (result["probes"][k] or {}).get("seed") if len(quadratures(result)) == len(result["probes"]) else None
        tables.append((f"Probe {k + 1}" + (f", seed {seed}" if seed is not None else ""), rows))
    return tables


def _quantity(key: str, value: Any) -> str:
    """Format by the unit that the key's ending names."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        if key.endswith("_s"):
            return duration(value)
        if key.endswith("bytes"):
            return size(value)
        if isinstance(value, int):
            return f"{value:,}"
        return number(value)
    if isinstance(value, list | tuple):
        shown = ", ".join(_quantity(key, v) for v in value[:8])
        return shown + (f", … ({len(value)} in all)" if len(value) > 8 else "")
    return NONE if value is None else "yes" if value is True else "no" if value is False else str(value)


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Walk nested dictionaries: ("realised_step.worst", 0.91)."""
    for key, item in _table(value).items():
        name = f"{prefix}{key}"
        if isinstance(item, Mapping):
            yield from _flat(item, f"{name}.")
        else:
            yield name, item


def _label(key: str) -> str:
    """``peak_bytes`` -> "Peak", ``hvp_s`` -> "HVP"; dots become commas."""
    words = []
    for part in key.split("."):
        part = part.removesuffix("_s").removesuffix("_bytes").replace("_", " ")
        words.append({"hvp": "HVP", "cpu": "CPU", "world size": "ranks"}.get(part, part))
    text = ", ".join(words)
    return text[:1].upper() + text[1:]


def _rows(table: Any) -> list[Row]:
    return [Row(_label(key), minus_signs(_quantity(key, value))) for key, value in _flat(table)]


def _errors(errors: Any) -> list[Row]:
    """Explain the errors that are known, and show the others as they are."""
    rows = []
    for key, value in _flat(errors):
        head, _, rest = key.partition(".")
        if head == "ritz" and "ritz_ends" in _table(errors):
            continue  # it is one of them
        if head == "ritz_ends":
            end, _, rest = rest.partition(".")
            head += f".{end}"
        label, meaning = ERROR_TERMS.get(head, (_label(head), ""))
        shown = minus_signs("not measured" if value is None else _quantity(key, value))
        rows.append(Row(label + (f", {_label(rest).lower()}" if rest else ""), shown, meaning))
    return rows


def _intake(findings: Any) -> list[Row]:
    """Return what the checks of everything that came in found: name, verdict, sentence."""
    verdicts = {"noted": "note"}
    return [
        Row(str(f.get("check")), verdicts.get(f.get("verdict"), str(f.get("verdict"))), str(f.get("text")))
        for f in findings or []
    ]


def _facts(run: RunFiles) -> list[tuple[str, list[Row]]]:
    result = run.result
    model = result.get("model")
    steps = step_events(run.events)
    times = _table(result.get("timing"))
    timing = _rows({key: value for key, value in times.items() if key != "phases" and not key.endswith("per_s")})
    timing += [Row(name.capitalize(), share, "by a rank, on this machine") for name, share in rates(times)]
    if steps:
        resumed = sum(e.get("event") == "resume" for e in run.events)
        timing += [
            Row("Steps timed", str(len(steps))),
            Row("Resumed", {0: "never", 1: "once"}.get(resumed, f"{resumed} times")),
        ]
    return [
        ("Operator", _rows(result.get("operator"))),
        ("Model", (_rows(model) if isinstance(model, Mapping) else [Row("Source", str(model))]) if model else []),
        ("Data", _rows(result.get("data"))),
        ("Trace", [Row("Estimate", minus_signs(trace_text(result.get("trace"))))] if result.get("trace") else []),
        ("Share of the eigenvalues", [Row(name, _interval(share)) for name, share in cumulative.shares(result)]),
        ("Time", timing),
        ("Memory", _rows(result.get("memory"))),
        ("Hardware", _rows({"world_size": result.get("world_size"), **_table(result.get("hardware"))})),
        ("Versions", [Row(name, str(version)) for name, version in _flat(result.get("versions"))]),
    ]


def _interval(share: Interval) -> str:
    """Show a share with its bounds, in per cent."""
    low, mean, high = (number(100 * value, 3) for value in (share.low, share.mean, share.high))
    return f"{mean} % ({low} to {high} %)"


def _settings(config_text: str) -> list[tuple[str, list[Row]]]:
    try:
        config = tomllib.loads(config_text)
    except tomllib.TOMLDecodeError:
        return []
    return [
        (name, [Row(key, _setting(value)) for key, value in _flat(section)])
        for name, section in config.items()
        if isinstance(section, Mapping)
    ]


def _setting(value: Any) -> str:
    """Show a value as TOML writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(_setting(v) for v in value) + "]"
    return f'"{value}"' if isinstance(value, str) else str(value)


def _commands(run: RunFiles) -> list[str]:
    """Return the command that repeats the run into a new directory, as it was launched where that is known."""
    if call := _call(run):
        return [call]
    config = shlex.quote(str(run.path / "config.toml"))
    again = shlex.quote(f"run.out={run.path}-again")
    python = f"-m hpc_hess run {config} --set {again}"
    ranks = run.result.get("world_size") or 1
    command = f"python {python}" if ranks == 1 else f"torchrun --nproc-per-node {ranks} {python}"
    return [command]


def _call(run: RunFiles) -> str:
    """Return the call by which a program repeats its run, "" of runs that no program made."""
    try:
        config = tomllib.loads(run.config_text)
        if config.get("problem", {}).get("build") != IN_PROGRAM:
            return ""
        asked = {key: config["lanczos"][key] for key in ("steps", "probes", "seed", "distribution", "reorthogonalise")}
    except (tomllib.TOMLDecodeError, AttributeError, LookupError, TypeError):
        return ""
    arguments = [f"{key}={value!r}" for key, value in (asked | {"out": f"{run.path}-again"}).items()]
    return f"{IN_PROGRAM}(operator, {', '.join(arguments)})"
