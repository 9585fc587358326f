"""The trace, and the Frobenius norm."""

from __future__ import annotations

from typing import Any

from hpc_hess.linalg import trace
from hpc_hess.linalg.quadrature import Estimate
from hpc_hess.linalg.sampling import StoppingRule
from hpc_hess.studies.base import FIRST_PROBE, Bench, Recipe
from hpc_hess.studies.trace.settings import Settings


def trace_study(bench: Bench) -> dict[str, Any]:
    """Estimate the trace, and with Hutchinson's samples the Frobenius norm. Collective: yes."""
    settings, operator = Settings.of(bench.config), bench.operator
    method, most = settings.method, settings.samples
    found: dict[str, Any] = {"method": method, "products": most}
    if method == "hutchinson":
        moments = trace.hutchinson(
            operator, StoppingRule(0.0, most=most), seed=bench.seed, first_probe=FIRST_PROBE, keep=bench.keep
        )
        return found | _estimate("trace", moments.trace_estimate) | _estimate("frobenius", moments.frobenius_estimate)
    if method == "hutch++":
        estimate = trace.hutch_plus_plus(operator, bench.basis(most // 3), most, seed=bench.seed, keep=bench.keep)
    else:
        estimate = trace.xtrace(operator, bench.basis(most // 2), most, seed=bench.seed, keep=bench.keep)
    return found | _estimate("trace", estimate)


def _estimate(name: str, estimate: Estimate) -> dict[str, Any]:
    return {name: estimate.mean, f"{name}_stderr": estimate.stderr}


RECIPE = Recipe(trace_study, lambda config: Settings.of(config).samples)
