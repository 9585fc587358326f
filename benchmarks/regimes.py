"""Where Hessian products can be trusted: error against step, by number format, model size and vector.

Central differences of gradients over a sweep of steps, and the exact product, against the exact product in float64 at
the same parameters. Number formats:

* float64, float32: parameters, gradients and vectors in that format;
* bfloat16: float32 masters and vectors, forward and backward on a bfloat16 copy of the parameters (what FSDP's mixed
  precision does). The program refuses this for differences; here the objective makes the copy;
* bfloat16, weights too: the same at parameters that bfloat16 can hold, as in a checkpoint released in it. The reference
  is taken there as well, so that casting the parameters costs nothing until they are moved;
* emulated ones: float32, with matrix products as tensor cores make them (regimes_emulated); differences with tf32 alone.

``python -m benchmarks.regimes`` measures the toys, then regimes_krylov, and draws the figures; ``--smollm2`` measures
SmolLM2-135M instead (minutes; ``--dtypes`` cuts it in pieces). Results of other models in the files are kept.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch

from benchmarks import regimes_krylov
from benchmarks.frame import Option, Table, benchmark, machine
from benchmarks.llamas import random_llama
from benchmarks.regimes_curves import CURVES, DTYPES, SMOLLM2, VECTORS, summary, truncation_of
from benchmarks.regimes_emulated import rounding
from benchmarks.regimes_figures import draw
from benchmarks.regimes_formats import BFloat16Objective, exact_product, hold_bfloat16_weights, load
from hpc_hess.curvature.differences.finite_difference import FiniteDifferenceHessian
from hpc_hess.curvature.differences.step_size import concentration
from hpc_hess.errors import NumericsError
from hpc_hess.linalg.lanczos import Lanczos
from hpc_hess.model.sharded.gradient import Gradient
from hpc_hess.parallel.basis import Basis
from hpc_hess.parallel.vector import Vector
from hpc_hess.session.problem import Problem
from hpc_hess.session.reference import extreme_ritz_vector, start_vector

TOYS: dict[str, dict[str, int]] = {  # Llama shape, tied embeddings, seeded weights of spread 1 / sqrt(hidden)
    "0.09 M": {"hidden_size": 48, "intermediate_size": 128, "num_hidden_layers": 3, "vocab_size": 256},
    "1 M": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 5, "vocab_size": 1024},
    "10 M": {"hidden_size": 320, "intermediate_size": 864, "num_hidden_layers": 8, "vocab_size": 4096},
}


# -- vectors ---------------------------------------------------------------------------------------------------------


def test_vectors(problem: Problem, steps: int) -> dict[str, Vector]:
    """Return unit vectors: Gaussian, the extreme Ritz vector of ``steps`` exact steps, Gaussian on the last RMSNorm."""
    space = problem.model.space
    process = Lanczos(exact_product(problem), Basis(space, steps), steps)
    process.start(start_vector(space, 0, 0, "gaussian"))
    while not process.finished:
        process.step()
    random, norm = start_vector(space, 0, 1, "gaussian"), space.zeros()
    for piece in space.shard.pieces:
        if piece.parameter.name == "model.norm.weight":
            norm.data[piece.start : piece.stop] = random.data[piece.start : piece.stop]
    return {"random": random, "Ritz": extreme_ritz_vector(process)[0], "final norm": norm.scale_(1 / norm.norm())}


# -- the sweep -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What is measured on one model: powers of ten swept for each number format, steps to the Ritz vector."""

    powers: dict[str, tuple[float, float, float]]
    ritz_steps: int
    vectors: tuple[str, ...] = VECTORS

    def steps(self, dtype: str) -> list[float]:
        if dtype not in self.powers:
            return []
        low, high, stride = self.powers[dtype]
        return [float(10**k) for k in np.arange(low, high + 0.01, stride)]


TOY_PLAN = Plan(
    {
        "float64": (-8, 1.5, 0.5),
        "float32": (-6, 1.5, 0.5),
        "bfloat16": (-4, 1.5, 0.5),
        "bfloat16, weights too": (-4, 1.5, 0.5),
        "tf32 (emulated)": (-4, 1.5, 0.5),
    },
    20,
)
SMOLLM2_PLAN = Plan(
    {
        "float64": (-7, 0, 1),
        "float32": (-4.5, 1, 0.5),
        "bfloat16": (-1.5, 1.5, 0.5),
        "bfloat16, weights too": (-1, 1, 1),
        "tf32 (emulated)": (-3, 1, 1),
    },
    8,
    ("random", "Ritz"),
)


def sweep(name: str, config: dict[str, Any], plan: Plan, dtypes: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return a curve for each number format and vector."""
    began = time.perf_counter()
    narrow = load(config, "float32")
    vectors = {k: v for k, v in test_vectors(narrow, plan.ritz_steps).items() if k in plan.vectors}
    print(f"{name}, vectors: {time.perf_counter() - began:.0f} s", flush=True)
    theta = narrow.model.read_parameters()
    curves: list[dict[str, Any]] = []
    references: dict[str, torch.Tensor] = {}
    for rounded in (False, True):  # is theta rounded to bfloat16?
        wanted = [d for d in dtypes if (d == DTYPES[3]) == rounded]
        if not wanted:
            continue
        wide = load(config, "float64")
        if rounded:
            hold_bfloat16_weights(wide)
            hold_bfloat16_weights(narrow)
        exact = exact_product(wide)
        wrap = wide.model.space.wrap
        references = {k: exact.matvec(wrap(v.data.double())).data for k, v in vectors.items()}
        del exact
        for dtype in wanted:
            problem = wide if dtype == "float64" else narrow
            curves += _curves(name, problem, dtype, vectors, references, plan.steps(dtype))
            print(f"{name}, {dtype}: {time.perf_counter() - began:.0f} s", flush=True)
        del wide, wrap
    narrow.model.write_parameters(theta)
    return curves


def _curves(
    name: str,
    problem: Problem,
    dtype: str,
    vectors: dict[str, Vector],
    references: dict[str, torch.Tensor],
    steps: list[float],
) -> list[dict[str, Any]]:
    space = problem.model.space
    low = dtype.startswith("bfloat16")
    exact = None if dtype == "float64" else exact_product(problem, torch.bfloat16 if low else None)
    exact_errors: dict[str, float] = {}
    if exact is not None:
        for kind, v in vectors.items():
            with rounding(dtype):
                exact_errors[kind] = _error(exact.matvec(v), references[kind])
        del exact
    gradient = Gradient(problem.model, BFloat16Objective(problem.objective)) if low else problem.gradient
    curves = []
    for kind, v in vectors.items():
        u = space.wrap(v.data.to(space.dtype))
        spread = concentration(v)
        with rounding(dtype):
            base = gradient.at_theta0() if steps else (0.0, space.zeros())
            swept: tuple[Any, ...] = ("auto", *steps) if steps else ()
            points = [_difference(gradient, base, u, references[kind], step) for step in swept]
        curves.append(
            {
                "model": name,
                "parameters": space.size,
                "dtype": dtype,
                "vector": kind,
                "participation": spread.participation,
                "product_norm": float(references[kind].norm()),
                "exact_error": exact_errors.get(kind),
                "auto": points[0] if points else None,
                "points": [p for p in points[1:] if p],
            }
        )
    return curves


def _difference(
    gradient: Gradient, base: tuple[float, Vector], v: Vector, reference: torch.Tensor, step: Any
) -> dict[str, Any] | None:
    """One central difference: its step, the share of it that was stored, its error; None where there is no step."""
    operator = FiniteDifferenceHessian(gradient, "central", step, base)
    try:
        product = operator.matvec(v)
    except NumericsError:  # nothing moves when the step is stored, or the loss overflows
        return None
    record = operator.records[-1]
    return {
        "eps": record.step,
        "realised": record.realised,
        "error": _error(product, reference),
        "predicted": record.predicted_error,
    }


def _error(product: Vector, reference: torch.Tensor) -> float:
    """Relative error in float64."""
    return float((product.data.double() - reference).norm() / reference.norm())


@benchmark("Error of a Hessian product against step, number format, size and vector")
def main(
    table: Table,
    smollm2: Annotated[bool, "measure SmolLM2-135M, 1 x 128 tokens, and not the toys"] = False,
    models: Annotated[tuple[str, ...], Option("which toys", choices=(*TOYS,))] = (*TOYS,),
    no_krylov: Annotated[bool, "leave regimes_krylov out"] = False,
    dtypes: Annotated[tuple[str, ...], Option(choices=DTYPES)] = DTYPES,
    figures: Annotated[bool, "only rewrite tables and figures from the stored curves"] = False,
) -> None:
    curves: list[dict[str, Any]] = []
    if smollm2 and not figures:
        data = {"source": "text:launch/data/gpl-3.txt", "sequence_length": 128, "sequences": 1}
        curves = sweep(SMOLLM2, {"data": data}, SMOLLM2_PLAN, dtypes)
    elif not figures:
        for name in models:
            with random_llama(TOYS[name], 1, 64) as config:
                curves += sweep(name, config, TOY_PLAN, dtypes)
    stored = table.folder / CURVES
    kept = json.loads(stored.read_text())["curves"] if stored.exists() else []
    fresh = {(c["model"], c["dtype"]) for c in curves}
    curves += [c for c in kept if (c["model"], c["dtype"]) not in fresh]
    names = [*TOYS, SMOLLM2]
    curves.sort(key=lambda c: (names.index(c["model"]), VECTORS.index(c["vector"]), DTYPES.index(c["dtype"])))
    table.settings = {
        "reference": "exact product in float64 at the same parameters",
        "scheme": "central",
        "toys": "1 x 64 random tokens",
        SMOLLM2: "1 x 128 tokens of the GPL-3, --smollm2",
        "threads": torch.get_num_threads(),
    }
    table.command = "python -m benchmarks.regimes [--smollm2]"  # the rows of both
    for curve in curves:
        table.add(summary(curve, truncation_of(curves, curve)))
    stored.write_text(json.dumps({"machine": machine(), "curves": curves}, default=float) + "\n")
    if not (smollm2 or figures or no_krylov):
        regimes_krylov.main(["--write-to", str(table.folder)])
    draw(table.folder)


if __name__ == "__main__":
    main()
