"""What ``hpc-hess check`` shows: a table on the screen, and the sweep over finite-difference steps as a figure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def check_text(found: Mapping[str, Any]) -> str:
    """Return the screen's lines."""
    lines = [
        "",
        f"loss {found['loss']:.6f}, |gradient| {found['gradient_norm']:.4g}, {found['num_params']:,} parameters",
        f"computed                 {found['computes']}",
        f"same gradient twice      {_bitwise(found['repeat'])}",
        f"symmetry |uHv - vHu|     {found['symmetry']:.1e} of |Hv|",
        f"linearity                {found['linearity']:.1e} of |Hv|",
        f"orthogonality of basis   {found['orthogonality_loss']:.1e} after {found['lanczos_steps']} steps",
    ]
    ritz = found.get("ritz")
    if ritz:
        lines.append(
            f"extreme Ritz value       {ritz['theta']:.6g}; with the exact product y'Hy = {ritz['rayleigh']:.6g}, "
            f"|Hy - theta y| = {ritz['residual']:.2g} (Lanczos: {ritz['lanczos_residual']:.2g})"
        )
    for vector in found.get("vectors", []):
        if "rounding" in vector:
            short = vector["format"].replace("bfloat", "bf")
            lines.append(f"{short} against fp32        off by {vector['rounding']:.1e} of |Hv| on the {vector['name']}")
            continue
        lines += ["", f"{vector['name']}:", "  scheme     step       error      predicted  gradients"]
        for row in vector["schemes"]:
            predicted = "n/a" if row["predicted"] is None else f"{row['predicted']:.1e}"
            lines.append(
                f"  {row['scheme']:<10} {row['step']:<10.2e} {row['error']:<10.1e} {predicted:<10} "
                f"{row['gradients']} (+ {row['calibration']} to calibrate)"
            )
        best = min(vector["sweep"], key=lambda row: row["error"], default=None)
        if best:
            lines.append(f"  best of the sweep (central): eps {best['step']:.0e}, error {best['error']:.1e}")
    return "\n".join(lines)


def _bitwise(repeat: float) -> str:
    return "bitwise equal" if repeat == 0 else f"differs by {repeat:.1e}"


def write_check_figure(found: Mapping[str, Any], folder: Path) -> Path | None:
    """Draw error against step for each vector, with the steps the program chose. None where no step was compared."""
    vectors = [v for v in found.get("vectors", []) if any(row["error"] > 0 for row in v.get("sweep", []))]
    if not vectors:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for vector, colour in zip(vectors, ("#0072B2", "#D55E00"), strict=False):
        sweep = vector["sweep"]
        axes.loglog(
            [r["step"] for r in sweep],
            [r["error"] for r in sweep],
            "o-",
            color=colour,
            ms=4,
            lw=1.5,
            label=f"central, {vector['name']}",
        )
        for row, marker in zip(vector["schemes"], "vsD", strict=True):
            axes.plot(
                row["step"],
                row["error"],
                marker,
                color=colour,
                ms=9,
                mfc="none",
                mew=2,
                label=f"{row['scheme']}, chosen step",
            )
    axes.set_xlabel("step eps along the unit vector")
    axes.set_ylabel("relative error of the product")
    axes.set_title("Finite differences against the exact product")
    axes.grid(alpha=0.25, which="major")
    axes.legend(fontsize=8, frameon=False, ncols=2)
    path = folder / "check.png"
    figure.savefig(path, dpi=150)
    return path
