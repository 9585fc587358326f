"""Traces, diagonals and Frobenius norms against known matrices: right on average, honest about their errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hpc_hess.linalg.diagonal import diagonal_hutchinson, xdiag
from hpc_hess.linalg.operator import FunctionOperator
from hpc_hess.linalg.quadrature import Estimate
from hpc_hess.linalg.sampling import StoppingRule
from hpc_hess.linalg.trace import hutch_plus_plus, hutchinson, xtrace
from hpc_hess.parallel.basis import Basis
from hpc_hess.parallel.vector import Vector
from tests.support.known_spectra import make_space, orthogonal

SIZE = 200


def dense(spectrum: torch.Tensor) -> tuple[torch.Tensor, FunctionOperator]:
    q = orthogonal(len(spectrum))
    matrix = (q * spectrum) @ q.T
    space = make_space(len(spectrum))
    return matrix, FunctionOperator(space, lambda v: Vector(space, matrix @ v.data))


def decaying() -> torch.Tensor:
    """A few large eigenvalues of both signs, a long tail."""
    values = torch.arange(1, SIZE + 1, dtype=torch.float64) ** -1.5 * 100
    values[1::3] *= -1
    return values


def zscores(estimates: list[Estimate], truth: float) -> np.ndarray:
    return np.array([(e.mean - truth) / e.stderr for e in estimates])  # type: ignore[operator]


def test_hutchinson_over_seeds() -> None:
    matrix, operator = dense(decaying())
    runs = [hutchinson(operator, StoppingRule(0.0, most=40), seed=s) for s in range(60)]
    traces = [run.trace_estimate for run in runs]
    assert np.mean([t.mean for t in traces]) == pytest.approx(float(matrix.trace()), rel=0.02)
    assert np.mean(np.abs(zscores(traces, float(matrix.trace()))) < 2.02) > 0.88  # 95 % by Student's t of 39
    norms = [run.frobenius_estimate for run in runs]
    assert np.mean([n.mean for n in norms]) == pytest.approx(float(matrix.norm()), rel=0.02)
    assert np.mean(np.abs(zscores(norms, float(matrix.norm()))) < 2.02) > 0.85


def test_hutchinson_is_exact_for_a_diagonal_matrix() -> None:
    space = make_space(30)
    entries = torch.arange(30, dtype=torch.float64)
    operator = FunctionOperator(space, lambda v: Vector(space, entries * v.data))
    moments = hutchinson(operator, StoppingRule(0.01))
    assert len(moments.trace) == 8  # the first look
    found_trace = moments.trace_estimate
    assert (found_trace.mean, found_trace.stderr, found_trace.count) == (pytest.approx(435.0), 0.0, 8)
    assert found_trace.deviation == pytest.approx(math.sqrt(2) * float(entries.norm()))  # at most
    found = diagonal_hutchinson(operator, most=3)
    assert torch.equal(found.mean.data, entries)
    assert found.relative_error == 0


def test_the_stopping_rule_does_not_stop_by_luck() -> None:
    """Of many runs on noise around a mean, no more than the risk stop with a mean that is too far off."""
    rng = np.random.default_rng(0)
    rule = StoppingRule(relative=0.1, risk=0.05, most=5000)
    wrong, counts = 0, []
    for _ in range(400):
        samples: list[float] = []
        while not samples or not rule.enough(samples):
            samples.append(float(rng.normal(1.0, 1.0)))
        wrong += abs(np.mean(samples) - 1.0) > 0.1
        counts.append(len(samples))
    assert wrong <= 0.05 * 400
    assert 600 < np.median(counts) < 2500  # (z / 0.1)^2 with the z of a late look, rounded up to one


def test_hutch_plus_plus_and_xtrace_beat_hutchinson() -> None:
    matrix, operator = dense(decaying())
    truth, budget, seeds = float(matrix.trace()), 60, range(40)
    plain = [hutchinson(operator, StoppingRule(0.0, most=budget), seed=s).trace_estimate for s in seeds]
    plus = [hutch_plus_plus(operator, Basis(operator.space, 20), budget, seed=s) for s in seeds]
    exchangeable = [xtrace(operator, Basis(operator.space, 30), budget, seed=s) for s in seeds]

    def rms(estimates: list[Estimate]) -> float:
        return float(np.sqrt(np.mean([(e.mean - truth) ** 2 for e in estimates])))

    assert rms(plus) < 0.35 * rms(plain)
    assert rms(exchangeable) < rms(plus)
    for estimates in (plus, exchangeable):
        z = zscores(estimates, truth)
        assert abs(z.mean()) < 0.6  # unbiased
        assert np.mean(np.abs(z) < 2.1) > 0.8
    # the stated error is the one that is seen, within a factor
    assert 0.5 < np.mean([e.stderr for e in exchangeable]) / rms(exchangeable) < 2  # type: ignore[arg-type]


def test_products_are_counted_and_a_low_rank_is_found_exactly() -> None:
    spectrum = torch.zeros(SIZE, dtype=torch.float64)
    spectrum[:5] = torch.tensor([9.0, -7, 5, 3, 1])
    _, operator = dense(spectrum)
    assert hutch_plus_plus(operator, Basis(operator.space, 10), 30).mean == pytest.approx(11, abs=1e-9)
    assert operator.num_products <= 30


def test_diagonals_over_seeds() -> None:
    matrix, operator = dense(decaying())
    truth = matrix.diagonal()
    budget = 60
    plain = [diagonal_hutchinson(operator, most=budget, seed=s) for s in range(20)]
    exchangeable = [xdiag(operator, Basis(operator.space, 30), Basis(operator.space, 30), budget, seed=s) for s in range(20)]
    for runs, most in ((plain, 0.25), (exchangeable, 0.05)):
        mean = torch.stack([run.mean.data for run in runs]).mean(0)
        assert float((mean - truth).norm() / truth.norm()) < most
        z = torch.stack([(run.mean.data - truth) / run.stderr.data for run in runs]).flatten()
        assert 0.85 < float((z.abs() < 2.02).double().mean()) < 0.99
        assert all(run.num_products == budget for run in runs)
    errors = [np.mean([float((run.mean.data - truth).norm()) for run in runs]) for runs in (plain, exchangeable)]
    assert errors[1] < 0.5 * errors[0]


def test_the_error_of_a_diagonal_is_foretold_and_stops_it() -> None:
    matrix, operator = dense(decaying())
    truth = matrix.diagonal()
    found = diagonal_hutchinson(operator, most=10_000, relative=0.3)
    actual = float((found.mean.data - truth).norm() / truth.norm())
    assert found.num_products < 10_000
    assert found.num_products in {8 * 2**k for k in range(12)}
    assert actual < 0.45
    assert found.relative_error <= 0.3
