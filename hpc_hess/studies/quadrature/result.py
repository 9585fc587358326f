"""result.json: what a finished run says, with the stable keys that others read."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import sys
from dataclasses import asdict, dataclass, field
from typing import Any

import h5py
import numpy as np

from hpc_hess.config import Config
from hpc_hess.curvature.record import ProductRecord
from hpc_hess.errors import NumericsError
from hpc_hess.linalg.lanczos import Window
from hpc_hess.linalg.quadrature import ritz, trace
from hpc_hess.model.sharded.loss import LabelObjective
from hpc_hess.parallel.world import World, describe
from hpc_hess.profiling.flops import Limits
from hpc_hess.profiling.traffic import orthogonalisation_bytes
from hpc_hess.registry.tasks import TASKS
from hpc_hess.session.memory_budget import basis_dtype
from hpc_hess.session.problem import Problem, dtype_of
from hpc_hess.session.reference import RitzCheck
from hpc_hess.system import cpu_name

RESULT_NAME = "result.json"
FORMAT = 1
MOST_ERROR = 0.5  # of a product, or of its symmetry, beyond which no eigenvalue can be given


@dataclass
class Tally:
    """What a run measures on its way; kept in the store, so that a resumed run reports all of it."""

    loss: float = 0.0
    gradient_norm: float = 0.0
    gradient_s: float = 0.0
    repeat: float = 0.0
    asymmetry: float = 0.0
    step_min: float = float("inf")
    step_max: float = 0.0
    realised_error: float = 0.0
    predicted_error: float = 0.0
    computes: str = ""  # which function's matrix, and in which precision
    calibration_gradients: int = 0
    error_probe: float | None = None  # against the exact product, on the first probe
    error_probe_absolute: float = 0.0  # the same error of the unit vector, not relative to the product
    ritz_check: dict[str, float] = field(default_factory=dict)  # RitzCheck of the extreme Ritz pair
    ritz_ends: dict[str, dict[str, float]] = field(default_factory=dict)  # of the "lowest" and the "highest" Ritz pair
    ritz_probe: int = -1  # of which probe that is
    flips: int = 0
    products: int = 0
    hvp_s: float = 0.0
    lanczos_s: float = 0.0
    checkpoint_s: float = 0.0
    slowest_step_s: float = 0.0
    phases: dict[str, list[float]] = field(default_factory=dict)  # name -> sums over steps of largest and mean over ranks
    gradient_flops: int = 0  # of a rank, the largest over the ranks
    product_flops: int = 0  # likewise, of one product of one probe
    limits: list[float] = field(default_factory=list)  # Limits of a rank, the least over the ranks
    peak_bytes: int = 0
    baseline_bytes: int = 0  # resident before the weights are loaded: the program's own
    operator_state: dict[str, Any] = field(default_factory=dict)  # what the operator needs for a bitwise resume
    lock_step: int = 1  # the most probes that shared a product
    reached: dict[str, str] = field(default_factory=dict)  # the finding "model.reached", of the gradient at theta_0
    choices: dict[str, int] | None = None  # discrete choices that changed within the first product's step, by operation
    routed: bool | None = None  # whether experts were chosen at theta_0, which every gradient repeats

    @classmethod
    def from_json(cls, text: bytes) -> Tally:
        """Read what :meth:`to_json` wrote; an empty text gives a fresh tally."""
        return cls(**json.loads(text)) if text else cls()

    def to_json(self) -> bytes:
        """Return the tally as bytes for the store."""
        return json.dumps(asdict(self)).encode()

    def note_products(self, record: ProductRecord, count: int) -> None:
        """Count the ``count`` products of one step; ``record`` is what each of them did."""
        self.products += count
        self.lock_step = max(self.lock_step, count)
        if record.step is not None:
            self.step_min, self.step_max = min(self.step_min, record.step), max(self.step_max, record.step)
        self.realised_error = max(self.realised_error, abs(record.realised - 1))
        self.predicted_error = max(self.predicted_error, record.predicted_error or 0.0)
        self.calibration_gradients += record.calibration * count
        self.flips += record.flips * count
        self.choices = record.choices if self.choices is None else self.choices

    def note_phases(self, phases: dict[str, list[float]]) -> None:
        """Add one step's seconds of each phase: the largest over the ranks, and the mean."""
        for name, seconds in phases.items():
            before = self.phases.get(name, [0.0, 0.0])
            self.phases[name] = [a + b for a, b in zip(before, seconds, strict=True)]

    def note_times(self, hvp_s: float, lanczos_s: float, checkpoint_s: float) -> None:
        """Add one step's seconds (largest over the ranks), all probes that made it together."""
        self.hvp_s += hvp_s
        self.lanczos_s += lanczos_s
        self.checkpoint_s += checkpoint_s
        self.slowest_step_s = max(self.slowest_step_s, hvp_s + lanczos_s + checkpoint_s)


def make_result(
    config: Config, world: World, problem: Problem, tally: Tally, recurrences: list[tuple[np.ndarray, np.ndarray]]
) -> dict[str, Any]:
    """Build the contents of result.json. Collective: no."""
    space = problem.space
    quadratures = [ritz(alpha, beta) for alpha, beta in recurrences]
    estimate = trace(quadratures, space.size)
    largest = max(float(np.abs(q.values).max()) for q in quadratures) or 1.0
    count = max(tally.products, 1)
    errors = _product_errors(tally, largest)
    product_error = errors["hvp_absolute"] or 0.0
    return {
        "format": FORMAT,
        "num_params": space.size,
        "num_params_model": problem.model.layout.num_params_full,
        "world_size": world.size,
        "model": {
            "name": problem.source.name,
            "source": config.problem.build or config.model.source,
            "kind": problem.source.kind,
            **({"task": config.model.task} if config.model.task != "causal-lm" else {}),
            "architecture": type(problem.model.module).__name__.removeprefix("FSDP"),
            "fingerprint": problem.source.fingerprint,
            **({"commit": problem.source.commit} if problem.source.commit else {}),
            **({"base": problem.source.base.name, "adapter": config.model.adapter} if problem.source.base else {}),
        },
        "data": _data(config, problem),
        "operator": {
            "name": config.operator.kind,
            "method": config.operator.method,
            "scheme": config.operator.scheme,
            "dtype": config.model.compute_dtype,
            "master_dtype": config.model.master_dtype,
            "computes": tally.computes or None,
            "sketch": config.sketch.model_dump() if config.operator.sketched else None,
        },
        "intake": _findings(problem, tally),
        "loss": tally.loss,
        "gradient_norm": tally.gradient_norm,
        "steps": config.lanczos.steps,
        "probes": [
            {
                "seed": config.lanczos.seed,
                "probe": k,
                "alpha": alpha.tolist(),
                "beta": beta.tolist(),
                "ritz_values": q.values.tolist(),
                "ritz_weights": q.weights.tolist(),
                "ritz_residuals": q.residuals.tolist(),
                # an eigenvalue lies this close: Lanczos residual plus the product's error
                "ritz_errors": (q.residuals + product_error).tolist(),
            }
            for k, ((alpha, beta), q) in enumerate(zip(recurrences, quadratures, strict=True))
        ],
        "lambda_max": max(float(q.values[-1]) for q in quadratures),
        "lambda_min": min(float(q.values[0]) for q in quadratures),
        "trace": {"mean": estimate.mean, "stderr": estimate.stderr, "half_width_95": estimate.half_width()},
        "errors": {
            **errors,
            "symmetry": tally.asymmetry / largest,
            "repeat": tally.repeat,
            "realised_step": tally.realised_error,
            "step_min": tally.step_min if tally.step_max else None,
            "step_max": tally.step_max or None,
            "expert_flips": tally.flips,
            "choices_changed": tally.choices,
        },
        "timing": {
            "gradient_s": tally.gradient_s,
            "hvp_s": tally.hvp_s / count,
            "lanczos_s": tally.lanczos_s / count,
            "checkpoint_s": tally.checkpoint_s / count,
            "products": tally.products,
            "lock_step": tally.lock_step,
            "phases": {
                name: {"max_s": largest_s / count, "mean_s": mean_s / count}
                for name, (largest_s, mean_s) in sorted(tally.phases.items())
            },
            "calibration_gradients": tally.calibration_gradients,
            **_rates(config, tally, space.size_local),
        },
        "memory": {"peak_bytes": tally.peak_bytes, "baseline_bytes": tally.baseline_bytes},
        "hardware": {**describe(world), "cpu": cpu_name(), "cores": os.cpu_count()},
        "versions": _versions(),
    }


def _data(config: Config, problem: Problem) -> dict[str, Any]:
    """Say what the loss is over."""
    samples, objective = problem.samples, problem.objective
    if not isinstance(objective, LabelObjective):
        return {"batches": len(samples), "weight": objective.total_weight, "fingerprint": samples.fingerprint}
    if config.problem.build:
        return {"tokens": objective.num_tokens, "batches": len(samples), "fingerprint": samples.fingerprint}
    return {
        f"{TASKS[config.model.task].predicts}s": objective.num_tokens,
        "sequences": len(samples),
        "source": config.data.source,
        "sequence_length": config.data.sequence_length,
        "fingerprint": samples.fingerprint,
        **({"commit": samples.commit} if samples.commit else {}),
    }


def _findings(problem: Problem, tally: Tally) -> list[dict[str, str]]:
    """Return the intake's findings; that of the gradient at theta_0 from whichever start measured it."""
    found = [finding for finding in problem.intake.to_json() if finding["check"] != "model.reached"]
    return [*found, tally.reached] if tally.reached else found


def _rates(config: Config, tally: Tally, size_local: int) -> dict[str, Any]:
    """Return what a rank reached, beside what its machine reaches in a matrix product and in a copy."""
    if not (tally.limits and tally.product_flops and tally.hvp_s):
        return {}
    rates: dict[str, Any] = {
        "product_flops": tally.product_flops,
        "product_flops_per_s": tally.product_flops * tally.products / tally.hvp_s,
        "limits_per_s": Limits(*tally.limits)._asdict(),
    }
    largest_s, _ = tally.phases.get("orthogonalisation", [0.0, 0.0])
    if largest_s:
        itemsize = dtype_of(config.model.master_dtype).itemsize
        row_bytes = size_local * basis_dtype(config.lanczos, dtype_of(config.model.master_dtype)).itemsize
        window = Window(config.lanczos.reorthogonalise, config.lanczos.steps)
        moved = sum(
            orthogonalisation_bytes(len(window.reads(j)), row_bytes, size_local * itemsize)
            for j in range(config.lanczos.steps)
        )
        rates["orthogonalisation_bytes_per_s"] = moved * tally.products / config.lanczos.steps / largest_s
    return rates


def _product_errors(tally: Tally, largest: float) -> dict[str, Any]:
    """Measured where the exact product (in the masters' precision) was at hand, else predicted by the step controller.

    ``hvp_absolute`` is the largest measured |E v| of a unit vector v, of the first probe and of both extreme Ritz vectors:
    it widens every interval. A predicted relative error is taken of ``largest``, the largest |Ritz value|.
    """
    predicted = tally.predicted_error or None
    if tally.error_probe is None:
        return {
            "hvp_relative": predicted,
            "hvp_relative_is": None if predicted is None else "predicted",
            "hvp_absolute": None if predicted is None else predicted * largest,
        }
    ends = {name: RitzCheck(**end) for name, end in tally.ritz_ends.items()}
    absolute = [tally.error_probe_absolute or tally.error_probe * largest]  # runs from before it was kept
    absolute += [end.product_error_absolute for end in ends.values()]
    errors: dict[str, Any] = {
        "hvp_relative": tally.error_probe,
        "hvp_relative_is": "measured",
        "hvp_relative_probe": tally.error_probe,
        "hvp_relative_predicted": predicted,
        "hvp_absolute": max(absolute),
    }
    if ends:
        errors["ritz_ends"] = tally.ritz_ends
    if tally.ritz_check:
        check = RitzCheck(**tally.ritz_check)
        errors["hvp_relative_ritz"] = check.product_error
        errors["hvp_relative"] = max(tally.error_probe, check.product_error)
        errors["ritz"] = tally.ritz_check
    return errors


def refuse_meaningless(result: dict[str, Any]) -> None:
    """Raise NumericsError where a finished run's products are so far from symmetric that no eigenvalue can be given."""
    asymmetry = result["errors"]["symmetry"]
    if asymmetry > MOST_ERROR:
        choices = result["errors"].get("choices_changed")
        cause = f" (discrete choices of the model changed within a step: {', '.join(choices)})" if choices else ""
        raise NumericsError(
            f"the products are not symmetric: u.Hv and v.Hu differ by {100 * asymmetry:.3g} % of the largest "
            f"|eigenvalue|{cause}; "
            'no eigenvalue can be given: set operator.method = "exact", or look at hpc-hess check'
        )


def to_json(result: dict[str, Any]) -> str:
    """Return the text of result.json. What is not a finite number, which JSON cannot say, is null: not known."""
    return json.dumps(_finite(result), indent=1, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _versions() -> dict[str, str]:
    names = ["hpc-hess", "torch", "transformers", "numpy", "h5py"]
    found = {"python": sys.version.split()[0], "hdf5": h5py.version.hdf5_version}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
