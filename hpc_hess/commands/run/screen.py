"""What the terminal shows at the end of a run, and what ``hpc-hess inspect RUN`` says about a run directory."""

from __future__ import annotations

import shutil
import sys
import textwrap
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from hpc_hess.console.words import count, duration, number, plural, printable, rates, size, trace_text
from hpc_hess.linalg.quadrature import ritz
from hpc_hess.report.spectrum import (
    caution_count,
    extreme_residuals,
    extremes,
    interval_text,
    model_name,
    size_text,
    story,
    warnings,
)
from hpc_hess.storage.disk import allocated
from hpc_hess.storage.examples import NAME as SKETCHES
from hpc_hess.storage.examples import Examples
from hpc_hess.storage.reader import StoreView, read_store
from hpc_hess.storage.run_files import WRITE_ANEW, RunFiles, read_run
from hpc_hess.storage.schema import FILE

_WIDTH = 12


def _line(label: str, text: str) -> str:
    return f"{label:<{_WIDTH}} {text}"


def _study_lines(result: Mapping[str, Any]) -> list[str]:
    if not (result.get("studies") or result.get("eigenpairs")):
        return []  # nor is matplotlib imported, which takes a second
    from hpc_hess.studies import views

    lines = []
    for name, view, found in views.parts(result):
        label = {"block_diagonal": "blocks", "class_structure": "classes", "sub_block": "entries"}.get(name, name)
        lines += [_line(label if not k else "", text) for k, text in enumerate(view.lines(found))]
    return lines


def summary_text(result: Mapping[str, Any], run_dir: str | Path, report_path: str | Path | None) -> str:
    """Return the lines that end a run: extreme eigenvalues, trace, timing, where the report is."""
    low, high = extremes(result)
    below, above = extreme_residuals(result)
    scale = max(abs(low or 0.0), abs(high or 0.0))
    data, timing = result.get("data") or {}, result.get("timing") or {}
    head = f"{model_name(result.get('model'))}: {size_text(result)}"
    for unit in ("tokens", "labels", "batches"):
        if data.get(unit):
            head += f", {data[unit]:,} {unit}"
    head += f", {plural(result.get('steps'), 'step')}, {plural(len(result.get('probes') or []), 'probe')}"
    lines = [head, *_computes(result)]
    for label, value, residual in (("lambda max", high, above), ("lambda min", low, below)):
        text = interval_text(result, value, residual, scale)
        lines.append(_line(label, number(value, 6) + (f"  ({text})" if text else "")))
    lines.append(_line("trace", trace_text(result.get("trace"))))
    lines.append(_line("spectrum", story(result)))
    lines += _study_lines(result)
    cautions = warnings(result)
    lines += [_line("caution", text) for text in cautions]
    parts = (("hvp_s", "product"), ("lanczos_s", "Lanczos"), ("checkpoint_s", "checkpoint"))
    times = [f"{name} {duration(timing[key])}" for key, name in parts if timing.get(key) is not None]
    if timing.get("gradient_s") is not None:
        times.append(f"(one gradient {duration(timing['gradient_s'])})")
    if times:
        if (timing.get("lock_step") or 1) > 1:
            times.append(f"up to {timing['lock_step']} probes in lock-step")
        lines.append(_line("per step", ", ".join(times).replace(", (", " (")))
    if shares := rates(timing):
        lines.append(_line("speed", ", ".join(f"{name} {share}" for name, share in shares) + " (a rank)"))
    peak = (result.get("memory") or {}).get("peak_bytes")
    if peak:
        lines.append(_line("memory", f"at most {size(peak)} a rank, {plural(result.get('world_size'), 'rank')}"))
    lines.append(_line("run", str(run_dir)))
    if report_path is not None:
        lines.append(_line("report", str(Path(report_path).resolve())))
    lines.append(caution_count(cautions))
    return "\n".join(lines)


def _computes(result: Mapping[str, Any]) -> list[str]:
    """Say which function's matrix it is where the arithmetic is rounded, and how far off its products are."""
    operator, error = result.get("operator") or {}, (result.get("errors") or {}).get("hvp_relative")
    if operator.get("dtype") not in ("bfloat16", "tf32") or not operator.get("computes"):
        return []
    off = "not compared with fp32" if error is None else f"its products differ by {number(100 * error, 2)} % from fp32"
    return [_line("computed", f"{operator['computes']}; {off}")]


def print_summary(
    result: Mapping[str, Any], run_dir: str | Path, report_path: str | Path | None, stream: IO[str] | None = None
) -> None:
    """Print :func:`summary_text` to ``stream`` (standard output when None). One rank only."""
    out = stream if stream is not None else sys.stdout
    text = printable(summary_text(result, run_dir, report_path), out)
    if out.isatty():
        columns = max(60, shutil.get_terminal_size().columns)
        text = "\n".join(_wrapped(line, columns) for line in text.splitlines())
    print("\n" + text, file=out, flush=True)


def _wrapped(line: str, columns: int) -> str:
    """Return a line as several that begin under its text, none longer than the terminal is wide."""
    return textwrap.fill(
        line,
        columns,
        subsequent_indent=" " * (_WIDTH + 1),
        break_long_words=False,
        break_on_hyphens=False,
        drop_whitespace=True,
        replace_whitespace=False,
    )


def inspect_text(run_dir: str | Path) -> str:
    """Return what a run directory holds, finished or not, also while a job writes to it. Local, one process.

    Raises
    ------
    ConfigError : no such directory; a damaged result.json; neither a store nor a result.
    StoreError : the store is damaged, or of a newer format.

    """
    run = read_run(run_dir, need_result=False)
    lines = [_line("run", str(run.path)), *_request(run)]
    sketched = (run.path / SKETCHES).exists()
    if sketched:
        lines.append(_line("sketches", _sketches(run.path / SKETCHES)))
    if (run.path / FILE).exists() or not (run.result or sketched):
        with read_store(run.path) as store:
            lines += _progress(store) + _store(store)
    if run.result:
        lines.append(_line("result", _result(run)))
    lines.append(_line("files", ""))
    return "\n".join([*lines, *_files(run.path)])


def inspect_run(run_dir: str | Path, verify: bool = False, stream: IO[str] | None = None) -> int:
    """Print :func:`inspect_text`; with ``verify``, check every committed basis row. Returns 0, or 2 with problems.

    Raises
    ------
    ConfigError, StoreError : as :func:`inspect_text`.

    """
    out = stream if stream is not None else sys.stdout
    print(printable(inspect_text(run_dir), out), file=out)
    if not verify:
        return 0
    with read_store(run_dir) as store:
        rows = sum(len(probe.rows) for probe in store.probes)
        problems = store.verify(_counter(out))
    for problem in problems:
        print(_line("problem", printable(problem, out)), file=out)
    if not problems:
        found = f"{plural(rows, 'committed basis row')}, every checksum holds" if rows else "no basis row is needed any more"
        print(_line("verified", found), file=out)
    return 2 if problems else 0


def _counter(out: IO[str]) -> Callable[[int, int], None] | None:
    """Count rows on a terminal only: one line that rewrites itself is noise in a log."""
    if not out.isatty():
        return None

    def show(done: int, total: int) -> None:
        print(f"\rverifying row {done} of {total}", end="\n" if done == total else "", file=out, flush=True)

    return show


def _request(run: RunFiles) -> list[str]:
    """Say what was asked for, from config.toml."""
    try:
        config = tomllib.loads(run.config_text)
        model, data, operator = config["model"], config["data"], config["operator"]
        own = config.get("problem", {}).get("build")
        what = f"{operator['kind']}, {operator['method']} ({operator['scheme']}), {model['compute_dtype']}"
        size_of = f"{data['sequences']} x {data['sequence_length']} tokens of {data['source']}"
        of = [_line("problem", own)] if own else [_line("model", str(model["source"])), _line("data", size_of)]
        return [*of, _line("operator", what)]
    except (tomllib.TOMLDecodeError, KeyError, TypeError):
        return []


def _progress(store: StoreView) -> list[str]:
    schema, state, probes = store.schema, store.state, store.probes
    finished = state.complete(schema.probes)
    done = sum(len(p.alpha) for p in probes)
    if finished:
        status = f"finished: {plural(done, 'step')} over {plural(schema.probes, 'probe')}"
    elif state.sequence == 0:
        status = f"not begun: 0 of {schema.probes * schema.steps} steps"
    else:
        status = f"unfinished: {done} of {schema.probes * schema.steps} steps; run the same command to go on"
    lines = [_line("state", f"{status} (commit {state.sequence})")]
    for k, probe in enumerate(probes):
        if not len(probe.alpha):
            lines.append(_line(f"probe {k + 1}", "not begun"))
            continue
        part = ritz(probe.alpha, probe.beta)
        text = f"{len(probe.alpha)} of {schema.steps} steps" + (
            ", ended early" if state.over(k) and len(probe.alpha) < schema.steps else ""
        )
        ends = [f"{number(part.values[i], 6)} (residual {number(part.residuals[i], 2)})" for i in (0, -1)]
        lines.append(_line(f"probe {k + 1}", f"{text}; Ritz values from {ends[0]} to {ends[1]}"))
    return lines


def _store(store: StoreView) -> list[str]:
    schema = store.schema
    kind = "one file (mpio)" if schema.driver == "mpio" else f"{plural(schema.num_shards, 'rank file')}"
    shared = "one basis, reused by each probe" if schema.width == 1 else f"{schema.width} bases, reused by each group"
    kept = "a basis for each probe" if schema.keep_basis else shared
    rows = f"{kept}: {schema.rows} rows of {schema.dtype}, {size(schema.basis_bytes)}" if schema.rows else "no basis is left"
    return [
        _line("parameters", f"{count(schema.num_params)} in {plural(len(store.layout), 'tensor')}"),
        _line("store", f"{kind}; {rows}"),
    ]


def _result(run: RunFiles) -> str:
    try:
        low, high = extremes(run.result)
        return f"eigenvalues in [{number(low, 6)}, {number(high, 6)}], trace {trace_text(run.result.get('trace'))}"
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        return f"result.json does not hold one ({type(error).__name__}: {error}): {WRITE_ANEW}"


def _sketches(path: Path) -> str:
    with Examples(path) as examples:
        sketch = examples.attributes["sketch"]
        return (
            f"{examples.done.sum()} of {plural(len(examples), 'example')}, {sketch['kind'].upper()} to "
            f"{sketch['dimension']:,} numbers, seed {sketch['seed']}"
        )


def _bytes(file: Path) -> int:
    """Return what a file takes on the disk: holes take nothing."""
    return min(file.stat().st_size, allocated(file))


def _files(path: Path) -> list[str]:
    lines = []
    for entry in sorted(path.iterdir()):
        if entry.is_dir():
            inside = [f for f in entry.rglob("*") if f.is_file()]
            total = sum(_bytes(f) for f in inside)
            lines.append(f"  {size(total):>10}  {entry.name}/ ({plural(len(inside), 'file')})")
        elif entry.is_file():
            lines.append(f"  {size(_bytes(entry)):>10}  {entry.name}")
    return lines
