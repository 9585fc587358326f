"""Every estimator on a known matrix over 1, 2 and 3 ranks: right within its stated error, and the same on all of them.

The matrix is Q diag(spectrum) Q^T, Q a product of reflections along probe vectors: dense, known, and cheap on shards. Both
layouts number entries alike, so that every run is about the same matrix.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance

from hpc_hess.linalg import probes
from hpc_hess.linalg.density import density
from hpc_hess.linalg.diagonal import DiagonalEstimate, diagonal_hutchinson, xdiag
from hpc_hess.linalg.eigen import ThickRestart, eigenpairs
from hpc_hess.linalg.lanczos import Lanczos
from hpc_hess.linalg.measure import cumulative, mass, wasserstein_a_posteriori
from hpc_hess.linalg.operator import FunctionOperator
from hpc_hess.linalg.quadrature import Estimate, ritz
from hpc_hess.linalg.quadrature import trace as quadrature_trace
from hpc_hess.linalg.sampling import StoppingRule
from hpc_hess.linalg.solve import conjugate_gradients, minres
from hpc_hess.linalg.trace import hutch_plus_plus, hutchinson, xtrace
from hpc_hess.parallel.basis import Basis
from hpc_hess.parallel.layout import Layout
from hpc_hess.parallel.vector import Vector, VectorSpace
from hpc_hess.parallel.world import World
from tests.support.sharded import assemble, from_global, send
from tests.support.spawn import run_ranks

LAYOUTS: dict[str, dict[str, tuple[int, ...]]] = {
    "uneven": {"embed": (13, 7), "norm": (5,), "scalar": (), "w": (4, 11)},
    "empty": {"a": (1, 97), "b": (1, 44)},  # all on rank 0
}
SIZE, BUDGET, STEPS, PROBES, PAIRS, TOLERANCE, SEED = 141, 48, 20, 4, 3, 1e-8, 1
POINTS = np.linspace(-31.3, 61.7, 47)  # none of them an eigenvalue
# what rounding leaves of each answer, of its largest entry: 1e-9 but for
ROUNDING = {
    "x": 10 * TOLERANCE,  # it is no better than asked for
    "wasserstein": 0.01,  # Ritz values of two probes at one eigenvalue differ by rounding, and the bound is taken there
}


def spectrum() -> torch.Tensor:
    """A bulk around zero, outliers on both sides."""
    bulk = torch.linspace(-1, 1.5, SIZE - 10, dtype=torch.float64) ** 3
    return torch.cat([bulk, torch.tensor([-30.0, -12, -5, -3, 4, 6, 9, 17, 33, 60], dtype=torch.float64)])


def prescribed(space: VectorSpace) -> FunctionOperator:
    entries = from_global(space, spectrum())
    axes = [probes.draw(space, seed=7, probe=k, distribution="gaussian") for k in range(3)]
    for u in axes:
        u.scale_(1 / u.norm())

    def reflect(v: Vector, u: Vector) -> Vector:
        return v.axpy_(-2 * u.dot(v), u)

    def product(v: Vector) -> Vector:
        inner = functools.reduce(reflect, axes, v.copy())
        return functools.reduce(reflect, reversed(axes), space.wrap(entries.data * inner.data))

    return FunctionOperator(space, product)


# -- what every rank computes: by estimator, numbers and vectors --------------------------------------------------------

Found = dict[str, float | list[float] | Vector]


def pair(estimate: Estimate) -> Found:
    assert estimate.stderr is not None
    return {"mean": estimate.mean, "stderr": estimate.stderr}


def entries(estimate: DiagonalEstimate) -> Found:
    return {"mean": estimate.mean, "stderr": estimate.stderr, "relative": estimate.relative_error}


def moments(operator: FunctionOperator) -> Found:
    found = hutchinson(operator, StoppingRule(0.0, most=BUDGET), seed=SEED)
    norm = pair(found.frobenius_estimate)
    return {**pair(found.trace_estimate), "norm": norm["mean"], "norm_stderr": norm["stderr"]}


def stopped(operator: FunctionOperator) -> Found:
    """All ranks stop after the same product."""
    found = hutchinson(operator, StoppingRule(0.5, most=500), seed=SEED, distribution="gaussian")
    return {**pair(found.trace_estimate), "count": float(len(found.trace))}


def exchangeable_diagonal(operator: FunctionOperator) -> Found:
    basis, images = (Basis(operator.space, BUDGET // 2) for _ in range(2))
    return entries(xdiag(operator, basis, images, BUDGET, seed=SEED))


def slq(operator: FunctionOperator) -> Found:
    recurrences, basis = [], Basis(operator.space, STEPS)
    for probe in range(PROBES):
        process = Lanczos(operator, basis, STEPS)
        process.start(probes.draw(operator.space, seed=SEED, probe=probe, distribution="gaussian"))
        while not process.finished:
            process.step()
        recurrences.append((process.alpha, process.beta))
    quadratures = [ritz(*r) for r in recurrences]
    smooth, shares = density(quadratures, points=400, width=1.0), cumulative(recurrences, POINTS, SIZE)
    negative, tiny = mass(recurrences, SIZE, below=-0.01), mass(recurrences, SIZE, above=-0.5, below=0.5)
    return {
        **pair(quadrature_trace(quadratures, SIZE)),
        "grid": list(smooth.grid),
        "density": list(smooth.mean),
        "band_low": list(smooth.band(SIZE)[0]),
        "band_high": list(smooth.band(SIZE)[1]),
        "low": list(shares.low),
        "share": list(shares.mean),
        "high": list(shares.high),
        "negative": [negative.low, negative.mean, negative.high],
        "tiny": [tiny.low, tiny.mean, tiny.high],
        "wasserstein": wasserstein_a_posteriori(recurrences, SIZE),
        "nodes": [x for q in quadratures for x in q.values],
        "weights": [x / PROBES for q in quadratures for x in q.weights],
    }


def extreme_pairs(operator: FunctionOperator) -> Found:
    space, size = operator.space, 2 * PAIRS + 6
    search = ThickRestart(operator, Basis(space, size + 1), size, PAIRS, "both", TOLERANCE)
    search.start(probes.draw(space, seed=SEED, probe=0, distribution="gaussian"))
    pairs = eigenpairs(search, 1000)
    assert search.finished
    assert search.num_restarts > 0
    found: Found = {"values": list(pairs.values), "residuals": list(pairs.residuals)}
    direction = probes.draw(space, seed=1, probe=0, distribution="gaussian")
    for k in range(len(pairs.values)):
        u = pairs.vector(k)
        found[f"vector {k}"] = u.scale_(math.copysign(1, u.dot(direction)))
    return found


DAMPING = {"CG": 40.0, "MINRES": 2.0}  # lambda_min is -30: the second matrix is indefinite


def solution(operator: FunctionOperator, name: str) -> Found:
    b = probes.draw(operator.space, seed=3, probe=0, distribution="gaussian")
    solve = {"CG": conjugate_gradients, "MINRES": minres}[name]
    found = solve(operator, b, damping=DAMPING[name], tolerance=TOLERANCE, most=1000)
    return {"x": found.x, "b": b, "residual": found.converged_to, "products": float(len(found.residuals) - 1)}


ESTIMATORS: dict[str, Callable[[FunctionOperator], Found]] = {
    "hutchinson": moments,
    "hutchinson, stopped": stopped,
    "hutch++": lambda a: pair(hutch_plus_plus(a, Basis(a.space, BUDGET // 3), BUDGET, seed=SEED)),
    "xtrace": lambda a: pair(xtrace(a, Basis(a.space, BUDGET // 2), BUDGET, seed=SEED)),
    "diagonal": lambda a: entries(diagonal_hutchinson(a, most=BUDGET, seed=SEED)),
    "xdiag": exchangeable_diagonal,
    "slq": slq,
    "eigenpairs": extreme_pairs,
    "CG": lambda a: solution(a, "CG"),
    "MINRES": lambda a: solution(a, "MINRES"),
}

Sent = dict[tuple[str, str, str], Any]  # layout, estimator, quantity


def on_a_rank(world: World) -> Sent:
    if world.size > 1:
        world.make_mesh()
    sent: Sent = {}
    for layout, shapes in LAYOUTS.items():
        operator = prescribed(VectorSpace(world, Layout(shapes, world.shard_size), torch.float64))
        for name, estimator in ESTIMATORS.items():
            for quantity, value in estimator(operator).items():
                sent[layout, name, quantity] = send(value) if isinstance(value, Vector) else value
    return sent


@functools.cache
def everything(num_ranks: int) -> dict[tuple[str, str, str], np.ndarray]:
    """Whole vectors, and numbers, which are bitwise the same on every rank."""
    ranks = run_ranks(on_a_rank, num_ranks) if num_ranks > 1 else [on_a_rank(World.alone())]
    found = {}
    for key, value in ranks[0].items():
        if isinstance(value, tuple):
            found[key] = assemble([sent[key] for sent in ranks])
        else:
            assert all(sent[key] == value for sent in ranks), key
            found[key] = np.asarray(value)
    return found


def answer(num_ranks: int, layout: str, estimator: str) -> dict[str, np.ndarray]:
    return {key[2]: value for key, value in everything(num_ranks).items() if key[:2] == (layout, estimator)}


@functools.cache
def dense() -> np.ndarray:
    space = VectorSpace(World.alone(), Layout(LAYOUTS["uneven"]), torch.float64)
    operator = prescribed(space)
    return np.stack([operator.matvec(space.wrap(row)).data.numpy() for row in torch.eye(SIZE, dtype=torch.float64)])


def test_the_matrix_is_the_one_it_is_said_to_be() -> None:
    assert np.abs(dense() - dense().T).max() < 1e-13
    assert np.abs(np.linalg.eigvalsh(dense()) - spectrum().sort().values.numpy()).max() < 1e-12
    off_diagonal = dense() - np.diag(np.diag(dense()))
    assert np.linalg.norm(off_diagonal) > 0.1 * np.linalg.norm(dense())


# -- equal, and right ---------------------------------------------------------------------------------------------------

on_ranks = pytest.mark.parametrize("num_ranks", [1, 2, 3])
cut = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@cut
@on_ranks
def test_answers_do_not_depend_on_the_ranks(num_ranks: int, layout: str, estimator: str) -> None:
    alone, here = answer(1, "uneven", estimator), answer(num_ranks, layout, estimator)
    assert alone.keys() == here.keys()
    for quantity in alone.keys() - {"residual", "residuals"}:  # rounding itself; they are looked at below
        value = alone[quantity]
        most = ROUNDING.get(quantity, 1e-9) * np.abs(value).max()
        np.testing.assert_allclose(here[quantity], value, rtol=0, atol=most, err_msg=quantity)


@pytest.mark.parametrize("estimator", ["hutchinson", "hutchinson, stopped", "hutch++", "xtrace", "slq"])
@cut
@on_ranks
def test_traces(num_ranks: int, layout: str, estimator: str) -> None:
    found = answer(num_ranks, layout, estimator)
    assert abs(found["mean"] - float(spectrum().sum())) < 3 * found["stderr"]
    plain = answer(num_ranks, layout, "hutchinson")
    if estimator in ("hutch++", "xtrace"):
        assert found["stderr"] < 0.5 * plain["stderr"]
    assert abs(plain["norm"] - float(spectrum().norm())) < 3 * plain["norm_stderr"]


@pytest.mark.parametrize(("estimator", "most"), [("diagonal", 1.0), ("xdiag", 0.2)])
@cut
@on_ranks
def test_diagonals(num_ranks: int, layout: str, estimator: str, most: float) -> None:
    found, truth = answer(num_ranks, layout, estimator), np.diag(dense())
    z = (found["mean"] - truth) / found["stderr"]
    assert 0.75 < (np.abs(z) < 2.02).mean() < 1  # 95 %, had entries errors of their own
    error = np.linalg.norm(found["mean"] - truth) / np.linalg.norm(truth)
    assert error < most
    assert 0.5 < error / found["relative"] < 2


@cut
@on_ranks
def test_densities_and_their_bounds(num_ranks: int, layout: str) -> None:
    found, values = answer(num_ranks, layout, "slq"), spectrum().numpy()
    shares = (values <= POINTS[:, None]).mean(1)
    assert (found["low"] <= shares).all()
    assert (shares <= found["high"]).all()
    assert (found["high"] - found["low"]).max() < 0.9
    for name, truth in (("negative", (values <= -0.01).mean()), ("tiny", (np.abs(values) <= 0.5).mean())):
        low, mean, high = found[name]
        assert 0 < low <= truth <= high < 1
        assert low <= mean <= high
    smooth = np.exp(-0.5 * (found["grid"][:, None] - values) ** 2).mean(1) / math.sqrt(2 * math.pi)
    # where there is nothing to see, quadrature leaves a trace below every scale of the plot
    assert (found["band_low"] <= smooth + 1e-5).all()
    assert (smooth <= found["band_high"] + 1e-5).all()
    assert np.trapezoid(found["density"], found["grid"]) == pytest.approx(1, abs=1e-3)
    distance = wasserstein_distance(values, found["nodes"], v_weights=found["weights"])
    assert distance < found["wasserstein"] < 0.2 * np.ptp(values)


@cut
@on_ranks
def test_pairs(num_ranks: int, layout: str) -> None:
    found, values = answer(num_ranks, layout, "eigenpairs"), spectrum().sort().values.numpy()
    assert np.abs(found["values"] - np.concatenate([values[:PAIRS], values[-PAIRS:]])).max() < 60 * TOLERANCE
    vectors = np.stack([found[f"vector {k}"] for k in range(2 * PAIRS)], 1)
    assert np.abs(vectors.T @ vectors - np.eye(2 * PAIRS)).max() < 1e-12
    residuals = np.linalg.norm(dense() @ vectors - vectors * found["values"], axis=0)
    assert (residuals <= 60 * TOLERANCE).all()
    assert residuals == pytest.approx(found["residuals"], rel=1e-3, abs=1e-11)


@pytest.mark.parametrize("estimator", DAMPING)
@cut
@on_ranks
def test_solutions(num_ranks: int, layout: str, estimator: str) -> None:
    found, matrix = answer(num_ranks, layout, estimator), dense() + DAMPING[estimator] * np.eye(SIZE)
    exact = np.linalg.solve(matrix, found["b"])
    assert np.linalg.norm(found["x"] - exact) < 1e-6 * np.linalg.norm(exact)
    true = np.linalg.norm(found["b"] - matrix @ found["x"]) / np.linalg.norm(found["b"])
    assert true == pytest.approx(found["residual"], rel=0.05)
    assert true <= 1.05 * TOLERANCE
    assert found["products"] < SIZE + 10
