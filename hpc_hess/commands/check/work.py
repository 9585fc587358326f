"""``hpc-hess check``: how far the products of a configuration can be trusted."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from hpc_hess.config import Config
from hpc_hess.console.progress import Progress, make_progress
from hpc_hess.curvature.differences.finite_difference import FiniteDifferenceHessian
from hpc_hess.curvature.operators import Point, built
from hpc_hess.errors import ModelError, NumericsError
from hpc_hess.linalg.lanczos import Lanczos
from hpc_hess.linalg.operator import LinearOperator
from hpc_hess.model.data.trial import reached_finding
from hpc_hess.parallel.basis import Basis
from hpc_hess.parallel.vector import Vector
from hpc_hess.parallel.world import World
from hpc_hess.registry.operators import OperatorSpec
from hpc_hess.session.operators import exact_operator, spec_of, what_is_computed
from hpc_hess.session.problem import Problem, check_repeatable, load_problem
from hpc_hess.session.reference import check_ritz, extreme_ritz_vector, relative_difference, share, start_vector
from hpc_hess.storage.run_files import write_aside

_SWEEP = [10.0**k for k in np.arange(-5, 0.75, 0.5)]


def check(config: Config, world: World) -> int:
    """Measure the configuration's products and write check.json and check.png to its run directory. Collective: yes.

    Determinism, symmetry, linearity; every scheme against the exact product on a probe and on the extreme Ritz vector
    of a short Lanczos run; a sweep over steps on both. In bfloat16 and tf32, instead, the product against that in float32.

    Raises
    ------
    ModelError : operator.method = "exact", and there is no exact product.

    """
    world.make_mesh(config.parallel.replicate)
    with make_progress(world.rank == 0, 1) as progress:
        problem = load_problem(config, world, progress)
        found = _measure(config, problem, progress)
    if world.rank == 0:
        from hpc_hess.commands.check.page import check_text, write_check_figure

        out = Path(config.run.out)
        out.mkdir(parents=True, exist_ok=True)
        write_aside(out / "check.json", json.dumps(found, indent=1) + "\n")
        figure = write_check_figure(found, out)
        print(check_text(found))
        print("\nwritten to " + " and ".join(str(path) for path in (out / "check.json", figure) if path))
    world.barrier("finish")
    return 0


def _measure(config: Config, problem: Problem, progress: Progress) -> dict[str, Any]:
    space, lanczos = problem.model.space, config.lanczos
    progress.phase("gradient at theta_0")
    base = problem.gradient.at_theta0()
    problem.intake.add(reached_finding(problem.model, base[1]))
    found: dict[str, Any] = {
        "loss": base[0],
        "gradient_norm": base[1].norm(),
        "num_params": space.size,
        "repeat": check_repeatable(problem.gradient),
        "computes": what_is_computed(config, problem),
    }
    progress.phase("exact product")
    spec, point = spec_of(config), Point(*base, problem.model)
    rounded = config.model.compute_dtype != config.model.master_dtype
    exact: LinearOperator | None = None
    try:
        product = exact_operator(config, problem, reference=True)
        for note in product.notes:
            progress.note(note)
        reference = built(spec, product, point)
        exact = built(spec, exact_operator(config, problem), point) if rounded else reference
    except ModelError as error:
        if config.operator.method == "exact":
            raise
        progress.note(f"no exact product to compare with: {error}")
    u, v = (start_vector(space, lanczos.seed, k, lanczos.distribution) for k in (0, 1))
    operator = exact if config.operator.method == "exact" else None
    if operator is None:
        differences = FiniteDifferenceHessian(problem.gradient, config.operator.scheme, config.operator.step, base)
        operator = built(spec, differences, point)
    progress.phase("symmetry and linearity")
    hu, hv = operator.matvec(u), operator.matvec(v)
    scale = max(hu.norm(), hv.norm())
    found["symmetry"] = share(abs(u.dot(hv) - v.dot(hu)), scale)
    both = operator.matvec(u.copy().axpy_(2.0, v))
    found["linearity"] = share(both.axpy_(-1.0, hu).axpy_(-2.0, hv).norm(), scale)
    progress.phase("a short Lanczos run")
    steps = min(lanczos.steps, 10)
    process = Lanczos(operator, Basis(space, steps), steps)
    process.start(u.copy())
    while not process.finished:
        process.step()
    y, theta, residual = extreme_ritz_vector(process)
    pairs = [(i, j) for i in range(process.step_count) for j in range(i)]
    gram = max((abs(process.basis[i].dot(process.basis[j])) for i, j in pairs), default=0.0)
    found |= {"theta": theta, "theta_residual": residual, "orthogonality_loss": gram, "lanczos_steps": steps}
    if exact is None:
        return found
    found["ritz"] = asdict(check_ritz(reference, process))
    vectors = (("probe", u), ("Ritz vector", y))
    if rounded:
        found["vectors"] = [
            {
                "name": name,
                "format": config.model.compute_dtype,
                "rounding": relative_difference(exact.matvec(vector), reference.matvec(vector)),
            }
            for name, vector in vectors
        ]
    elif "finite_difference" in spec.methods:
        found["vectors"] = [_compare(problem, spec, point, exact, name, vector, progress) for name, vector in vectors]
    return found


def _compare(
    problem: Problem, spec: OperatorSpec, point: Point, exact: LinearOperator, name: str, v: Vector, progress: Progress
) -> dict[str, Any]:
    """Every scheme with its own step, and central differences over a sweep of steps, against the exact product."""
    reference, base = exact.matvec(v), (point.loss, point.gradient)
    schemes, sweep = [], []
    for scheme in ("forward", "central", "fourth"):
        progress.phase(f"{name}: {scheme}")
        differences = FiniteDifferenceHessian(problem.gradient, scheme, "auto", base)  # type: ignore[arg-type]
        error = relative_difference(built(spec, differences, point).matvec(v), reference)
        record = differences.records[-1]
        schemes.append(
            {
                "scheme": scheme,
                "step": record.step,
                "error": error,
                "predicted": record.predicted_error,
                "gradients": record.gradients,
                "calibration": record.calibration,
            }
        )
    progress.phase(f"{name}: central, {len(_SWEEP)} steps from {_SWEEP[0]:.0e} to {_SWEEP[-1]:.0e}")
    for eps in _SWEEP:
        operator = built(spec, FiniteDifferenceHessian(problem.gradient, "central", eps, base), point)
        try:
            sweep.append({"step": eps, "error": relative_difference(operator.matvec(v), reference)})
        except NumericsError:  # the step underflows, or the loss overflows: nothing to plot there
            continue
    return {"name": name, "schemes": schemes, "sweep": sweep}
