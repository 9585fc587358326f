"""Bounds of cumulative densities, masses and distances hold on known spectra; densities lie within their bands."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch

from hpc_hess.linalg import probes
from hpc_hess.linalg.density import density, density_chebyshev, density_log, papyan_width
from hpc_hess.linalg.lanczos import Lanczos
from hpc_hess.linalg.measure import Radau, cumulative, mass, sampling_error, wasserstein_a_posteriori, wasserstein_a_priori
from hpc_hess.linalg.operator import diagonal
from hpc_hess.linalg.quadrature import ritz
from hpc_hess.parallel.basis import Basis
from hpc_hess.parallel.vector import Vector
from tests.support.known_spectra import make_space

SIZE = 600


@functools.cache
def spectrum() -> np.ndarray:
    """A bulk around zero, a negative tail, outliers."""
    bulk = np.linspace(-1, 1.4, SIZE - 20) ** 3
    return np.sort(np.concatenate([bulk, np.linspace(-9, -2, 8), np.geomspace(3, 40, 12)]))


@functools.cache
def recurrences(seed: int, num: int, steps: int) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    space = make_space(SIZE)
    operator = diagonal(space, Vector(space, torch.from_numpy(spectrum())))
    found = []
    for probe in range(num):
        process = Lanczos(operator, Basis(space, steps), steps)
        process.start(probes.draw(space, seed=seed, probe=probe, distribution="gaussian"))
        while not process.finished:
            process.step()
        found.append((np.array(process.alpha), np.array(process.beta)))
    return tuple(found)


@pytest.mark.parametrize("steps", [3, 8, 25])
def test_radau_brackets_the_measure_of_a_probe(steps: int) -> None:
    space = make_space(SIZE)
    start = probes.draw(space, seed=5, probe=0, distribution="gaussian").data.numpy()
    weights = start**2 / (start @ start)
    for x in [-20.0, -8.5, -0.3, 0.0, 1e-3, 0.2, 1.0, 3.0, 39.0, 41.0]:
        low, high = Radau(ritz(*recurrences(5, 1, steps)[0])).bounds(x)
        assert low <= weights[spectrum() < x].sum() + 1e-10
        assert high >= weights[spectrum() <= x].sum() - 1e-10
    gaps = [np.subtract(*Radau(ritz(*recurrences(5, 1, m)[0])).bounds(0.2)[::-1]) for m in (3, 8, 25)]
    assert gaps[0] > gaps[1] > gaps[2]


def test_a_ritz_value_and_an_exhausted_space() -> None:
    alpha, beta = recurrences(5, 1, 8)[0]
    q = ritz(alpha, beta)
    low, high = Radau(q).bounds(float(q.values[3]))
    assert low == pytest.approx(q.weights[:3].sum())
    assert high == pytest.approx(q.weights[:4].sum())
    assert Radau(ritz([2.0], [0.0])).bounds(2.0) == (0.0, 1.0)
    assert Radau(ritz([2.0], [0.0])).bounds(3.0) == (1.0, 1.0)


@pytest.mark.slow
def test_cumulative_and_masses_hold_over_seeds() -> None:
    """At least 95 of 100, for all points together; and the bounds are of use."""
    x = np.linspace(-10, 41, 40)
    truth = np.array([(spectrum() <= p).mean() for p in x])
    negative, tiny = (spectrum() <= -0.01).mean(), (np.abs(spectrum()) <= 0.5).mean()
    inside = masses = 0
    for seed in range(100):
        found = recurrences(seed, 4, 20)
        band = cumulative(found, x, SIZE)
        inside += bool(((band.low <= truth) & (truth <= band.high)).all())
        low = mass(found, SIZE, below=-0.01)
        near = mass(found, SIZE, above=-0.5, below=0.5)
        masses += low.low <= negative <= low.high and near.low <= tiny <= near.high
        assert low.low <= low.mean <= low.high
    assert inside >= 95
    assert masses >= 95
    outer = (x > 3) | (x < -2)
    assert (band.high - band.low)[outer].max() < 0.2


def test_the_order_of_points_does_not_matter() -> None:
    found, x = recurrences(0, 2, 20), np.array([3.0, -1.0, 40.0, 0.0])
    mixed, rising = cumulative(found, x, SIZE), cumulative(found, np.sort(x), SIZE)
    for name in ("low", "mean", "high"):
        np.testing.assert_array_equal(getattr(mixed, name)[np.argsort(x)], getattr(rising, name))
    assert mixed.low[2] > mixed.high[1]


@pytest.mark.slow
def test_wasserstein_bounds() -> None:
    span = float(np.ptp(spectrum()))
    held = 0
    for seed in range(50):
        found = recurrences(seed, 4, 20)
        quadratures = [ritz(*r) for r in found]
        grid = np.unique(np.concatenate([spectrum(), *[q.values for q in quadratures]]))
        truth = np.array([(spectrum() <= p).mean() for p in grid[:-1]])
        mean = np.mean([[q.weights[q.values <= p].sum() for p in grid[:-1]] for q in quadratures], axis=0)
        distance = float((np.abs(truth - mean) * np.diff(grid)).sum())
        bound = wasserstein_a_posteriori(found, SIZE, points=100)
        held += distance <= bound
        assert bound < wasserstein_a_priori(SIZE, 4, 20) * span
    assert held >= 48
    assert wasserstein_a_priori(10**9, 1, 120) == pytest.approx(0.1)
    assert sampling_error(10**9, 1, 0.05) < 1e-4


@pytest.mark.slow
def test_smoothed_densities_lie_within_their_bands() -> None:
    width, inside = 1.0, 0
    for seed in range(20):
        found = density([ritz(*r) for r in recurrences(seed, 8, 40)], points=150, width=width)
        band = found.band(SIZE)
        z = (found.grid[:, None] - spectrum()) / width
        truth = np.exp(-0.5 * z**2).mean(1) / (width * math.sqrt(2 * math.pi))
        inside += bool(((band[0] <= truth * (1 + 1e-9) + 1e-15) & (truth <= band[1] * (1 + 1e-9) + 1e-15)).all())
    assert inside >= 19
    bulk = np.abs(found.grid) < 1
    assert (band[1] / band[0])[bulk].max() < 2.2  # hundreds of eigenvalues under a kernel
    assert (band[1] / np.maximum(band[0], 1e-300)).max() > 10  # one of them


def test_every_density_integrates_to_one_and_is_not_negative() -> None:
    quadratures = [ritz(*r) for r in recurrences(1, 3, 30)]
    for found in (density(quadratures), density_log(quadratures), density_chebyshev(quadratures)):
        assert found.mean.min() > -1e-9
        assert np.trapezoid(found.mean, found.grid) == pytest.approx(1, abs=0.02), found.axis
        assert found.width > 0


def test_chebyshev_moments_are_those_of_the_matrix() -> None:
    """A single far eigenvalue shows up where it is, as wide as stated."""
    quadratures = [ritz(*r) for r in recurrences(2, 2, 30)]
    found = density_chebyshev(quadratures)
    peak = found.grid[np.argmax(np.where(found.grid > 36, found.mean, 0))]
    assert abs(peak - 40) < 2 * found.width


def test_papyan_width() -> None:
    width = papyan_width(2.0, 129, 3.0)
    h = 2 / 128
    assert math.exp(-((h / 2) ** 2) / (2 * width**2)) == pytest.approx(1 / 3)  # midway between neighbours
