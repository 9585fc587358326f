"""What the terminal shows of a plan, and of plans for several numbers of nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hpc_hess.console.words import count, duration, plural, size

_WIDTH = 13


def plan_text(plan: Mapping[str, Any]) -> str:
    """Return a plan (scaling.plan.describe) as lines."""
    local = plan["local_ranks"]
    nodes = plural(plan["nodes"], "node")
    lines = [
        f"{plan['model']}: {count(plan['num_params'])} parameters on {nodes} x {plural(local, 'rank')}, {plan['machine']}",
        _line("verdict", _verdict(plan)),
        _line("memory", f"{_memory(plan)} at the peak"),
    ]
    parts = sorted(plan["parts_bytes"].items(), key=lambda part: -part[1])
    lines += [_line("", f"{size(value):>12}  {name}") for name, value in parts if value]
    lines.append(_line("", f"{size(plan['basis_bytes']):>12}  Krylov basis, {_where(plan)}"))
    if plan["host_bytes"]:
        lines.append(_line("host", f"{size(plan['host_bytes'])} a rank, {size(local * plan['host_bytes'])} a node"))
    lines.append(_line("disk", f"{size(plan['store_bytes'])}; a step writes {size(plan['row_bytes'])} for each probe"))
    sent = ", ".join(f"{kind} {size(value)}" for kind, value in sorted(plan["sent_bytes"].items()))
    if sent:
        lines.append(_line("a product", f"sends {sent} (of the whole tensors)"))
    batches = f"{plan['micro_batches']} x {plan['tokens']:,} tokens"
    lines.append(_line("", f"{plan['flops']:.3g} floating-point operations a rank, on {batches}"))
    times = f"product {_range(plan['product_s'])}, Lanczos {duration(plan['vectors_s'])}"
    lines.append(_line("time", f"{times}, one gradient {_range(plan['gradient_s'])}"))
    lines.append(_line("whole run", f"{_range(plan['run_s'])}: all traffic hidden, or none; calibration and start apart"))
    return "\n".join(lines)


def sweep_text(plans: Sequence[Mapping[str, Any]]) -> str:
    """Return a table, one plan a line."""
    rows = [("nodes", "ranks", "memory a device", "basis", "product", "whole run", "")]
    for plan in plans:
        rows.append(
            (
                str(plan["nodes"]),
                str(plan["ranks"]),
                f"{size(plan['device_bytes'])} of {size(plan['device_memory_bytes'])}",
                _where(plan),
                _range(plan["product_s"]),
                _range(plan["run_s"]),
                "" if plan["fits"] else "does not fit",
            )
        )
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def _verdict(plan: Mapping[str, Any]) -> str:
    if plan["fits"]:
        return f"fits, with the basis {_where(plan)}"
    over = plan["device_bytes"] - plan["device_memory_bytes"]
    what = f"the basis needs {size(plan['host_bytes'])} a rank on the host"
    if over > 0:
        what = f"{size(over)} too much on a device"
    return f"does NOT fit: {what}"


def suggestions_text(found: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Return what would make a run fit (a change and its plan each), as lines."""
    lines = [f"{change}: {_memory(plan)}, the whole run {_range(plan['run_s'])}" for change, plan in found]
    lines = lines or ["nothing that was tried; try a smaller data.sequence_length"]
    return "\n".join(_line("" if k else "would fit", line) for k, line in enumerate(lines))


def _memory(plan: Mapping[str, Any]) -> str:
    return f"{size(plan['device_bytes'])} of {size(plan['device_memory_bytes'])} a device"


def _where(plan: Mapping[str, Any]) -> str:
    return {"device": "on the device", "host": "in host memory", "disk": "on disk", None: "nowhere"}[plan["basis"]]


def _range(seconds: Sequence[float]) -> str:
    low, high = (duration(value) for value in seconds)
    return low if low == high else f"{low} to {high}"


def _line(label: str, text: str) -> str:
    return f"{label:<{_WIDTH}}{text}"
