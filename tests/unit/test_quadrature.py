"""Quadrature: moments, residuals, traces and densities from alpha and beta."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hpc_hess.linalg.density import density, density_symlog, inverse_symlog, symlog
from hpc_hess.linalg.lanczos import Lanczos
from hpc_hess.linalg.operator import diagonal
from hpc_hess.linalg.probes import normals, signs
from hpc_hess.linalg.quadrature import Ritz, estimate, ritz, squared_norms, trace
from hpc_hess.parallel.basis import Basis
from hpc_hess.parallel.layout import Layout
from hpc_hess.parallel.vector import VectorSpace
from hpc_hess.parallel.world import World

SIZE, STEPS = 300, 12
SPACE = VectorSpace(World.alone(), Layout({"a": (SIZE,)}), torch.float64)
SPECTRUM = torch.cat([torch.linspace(-1, 1, SIZE - 3, dtype=torch.float64), torch.tensor([-7.0, 12.0, 30.0])])


def lanczos(start: torch.Tensor, steps: int = STEPS) -> Lanczos:
    state = Lanczos(diagonal(SPACE, SPACE.wrap(SPECTRUM)), Basis(SPACE, steps), steps)
    state.start(SPACE.wrap(start.clone()))
    while not state.finished:
        state.step()
    return state


def quadrature(start: torch.Tensor, steps: int = STEPS) -> Ritz:
    state = lanczos(start, steps)
    return ritz(state.alpha, state.beta)


def probe(number: int) -> torch.Tensor:
    return signs(5, number, 0, SIZE, dtype=torch.float64)


def gaussian(number: int) -> torch.Tensor:
    """On a diagonal matrix every Rademacher probe sees the same measure; these differ."""
    return normals(5, number, 0, SIZE, dtype=torch.float64)


def integral(values: NDArray[np.float64], points: NDArray[np.float64]) -> float:
    return float(np.sum(0.5 * (values[1:] + values[:-1]) * np.diff(points)))


def test_m_nodes_give_2m_moments_exactly() -> None:
    """Gauss quadrature is exact for polynomials of degree 2 m - 1, and not of degree 2 m."""
    start = normals(3, 0, 0, SIZE, dtype=torch.float64)
    unit, scaled = (start / start.norm()).numpy(), SPECTRUM.numpy() / 30
    for steps in (1, 2, 5):
        q = quadrature(start, steps)
        assert q.weights.sum() == pytest.approx(1.0, abs=1e-14)
        assert (q.weights >= 0).all()
        for degree in range(2 * steps):
            exact = float(unit**2 @ scaled**degree)
            assert float(q.weights @ (q.values / 30) ** degree) == pytest.approx(exact, abs=1e-14), (steps, degree)
        beyond = float(unit**2 @ scaled ** (2 * steps))
        assert abs(float(q.weights @ (q.values / 30) ** (2 * steps)) - beyond) > 1e-11


def test_residuals_are_the_true_ones() -> None:
    state = lanczos(probe(0))
    q = ritz(state.alpha, state.beta)
    rows = state.basis.rows.numpy()
    t = np.diag(state.alpha) + np.diag(state.beta[:-1], 1) + np.diag(state.beta[:-1], -1)
    values, vectors = np.linalg.eigh(t)
    np.testing.assert_allclose(q.values, values, atol=1e-12)
    np.testing.assert_allclose(q.weights, vectors[0] ** 2, atol=1e-12)
    y = rows.T @ vectors
    true = np.linalg.norm(SPECTRUM.numpy()[:, None] * y - y * values, axis=0)
    np.testing.assert_allclose(q.residuals, true, atol=1e-11)
    # each Ritz value is within its residual of an eigenvalue
    distance = np.abs(q.values[:, None] - SPECTRUM.numpy()).min(1)
    assert (distance <= q.residuals + 1e-12).all()
    assert q.residuals.min() < 1e-6 < q.residuals.max()  # some converged, some did not: the test has both


def test_without_the_last_beta_residuals_are_unknown() -> None:
    state = lanczos(probe(0))
    q = ritz(state.alpha, state.beta[:-1])
    np.testing.assert_array_equal(q.values, ritz(state.alpha, state.beta).values)
    assert np.isnan(q.residuals).all()


def test_one_step() -> None:
    q = ritz([3.0], [0.5])
    assert (q.values.tolist(), q.weights.tolist(), q.residuals.tolist()) == ([3.0], [1.0], [0.5])


def test_one_step_has_the_second_moment_of_two() -> None:
    one, two = ritz([3.0], [0.5]), ritz([3.0, 1.0], [0.5, 2.0])
    assert squared_norms([one, two], 10) == pytest.approx([92.5, 92.5])


def test_trace_of_one_probe_has_no_error() -> None:
    got = trace([quadrature(probe(0))], SIZE)
    assert got.stderr is None
    # on a diagonal matrix a Rademacher probe is exact
    assert got.mean == pytest.approx(float(SPECTRUM.sum()), abs=1e-9)


def test_trace_error_covers_the_truth() -> None:
    starts = [normals(7, number, 0, SIZE, dtype=torch.float64) for number in range(40)]
    got = trace([quadrature(start, 3) for start in starts], SIZE)
    samples = [SIZE * float((s / s.norm()) ** 2 @ SPECTRUM) for s in starts]
    assert got.mean == pytest.approx(np.mean(samples))
    assert got.stderr == pytest.approx(np.std(samples, ddof=1) / np.sqrt(40))
    assert got.stderr is not None
    assert abs(got.mean - float(SPECTRUM.sum())) < 4 * got.stderr
    assert got.stderr < 25


def test_estimate_of_two() -> None:
    got = estimate([1.0, 3.0])
    assert got.mean == 2.0
    assert got.stderr == pytest.approx(1.0)


@pytest.mark.parametrize("probes", [1, 3])
def test_densities_integrate_to_one_on_their_axes(probes: int) -> None:
    quadratures = [quadrature(gaussian(k)) for k in range(probes)]
    linear = density(quadratures)
    assert integral(linear.mean, linear.grid) == pytest.approx(1.0, abs=1e-5)
    log = density_symlog(quadratures)
    assert log.linear is not None
    assert integral(log.mean, symlog(log.grid, log.linear)) == pytest.approx(1.0, abs=1e-5)
    for curve in (linear, log):
        assert (curve.mean >= 0).all()
        assert (np.diff(curve.grid) > 0).all()
        assert (curve.spread is None) == (probes == 1)
        if curve.spread is not None:
            assert curve.spread.shape == curve.mean.shape
            assert curve.spread.max() > 1e-3 * curve.mean.max()


def test_a_linear_density_puts_its_mass_where_the_eigenvalues_are() -> None:
    """Against the histogram of the true spectrum: 297 of 300 in [-1, 1], one each at -7, 12, 30."""
    quadratures = [quadrature(probe(k), 40) for k in range(4)]
    curve = density(quadratures, points=20_000, width=0.05)
    inside = np.abs(curve.grid) < 2
    assert integral(curve.mean[inside], curve.grid[inside]) == pytest.approx(297 / 300, abs=1e-3)
    for outlier in (-7.0, 12.0, 30.0):
        near = np.abs(curve.grid - outlier) < 1
        assert integral(curve.mean[near], curve.grid[near]) == pytest.approx(1 / 300, rel=1e-2)


def test_the_mean_over_probes_is_the_mean_of_the_curves() -> None:
    quadratures = [quadrature(gaussian(k)) for k in range(3)]
    both = density(quadratures, width=0.3)
    low, high = both.grid[0], both.grid[-1]
    curves = []
    for q in quadratures:
        z = (both.grid[:, None] - q.values) / 0.3
        curves.append(np.exp(-0.5 * z**2) @ q.weights / (0.3 * np.sqrt(2 * np.pi)))
    np.testing.assert_allclose(both.mean, np.mean(curves, 0), atol=1e-12)
    assert both.spread is not None
    np.testing.assert_allclose(both.spread, np.std(curves, 0, ddof=1), atol=1e-12)
    assert low < min(q.values.min() for q in quadratures) < max(q.values.max() for q in quadratures) < high


@pytest.mark.parametrize("value", [0.0, 4.0, -3.0])
def test_a_density_of_one_eigenvalue(value: float) -> None:
    single = [Ritz(np.array([value]), np.array([1.0]), np.array([0.0]))]
    linear, log = density(single), density_symlog(single)
    assert integral(linear.mean, linear.grid) == pytest.approx(1.0, abs=1e-5)
    assert log.linear is not None
    assert integral(log.mean, symlog(log.grid, log.linear)) == pytest.approx(1.0, abs=1e-5)
    assert linear.grid[linear.mean.argmax()] == pytest.approx(value, abs=1e-2)


@pytest.mark.parametrize("linear", [1e-9, 1e-3, 1.0, 50.0])
def test_symlog_and_its_inverse(linear: float) -> None:
    x = np.concatenate([-np.logspace(6, -12, 60), [0.0], np.logspace(-12, 6, 60)])
    y = symlog(x, linear)
    np.testing.assert_allclose(inverse_symlog(y, linear), x, rtol=1e-9, atol=linear * 1e-14)
    assert (np.diff(y) > 0).all()
    np.testing.assert_array_equal(symlog(-x, linear), -y)
    assert symlog(np.array([9 * linear]), linear)[0] == pytest.approx(1.0)
