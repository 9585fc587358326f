"""Claims that hold: bands of densities on all axes, bounds, and one layer for the whole, against dense spectra."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest

from benchmarks.coverage import Case, chebyshev, of_densities, of_quadratures, spectra
from hpc_hess.linalg.density import density, density_chebyshev, density_symlog, symlog
from hpc_hess.linalg.measure import Radau
from hpc_hess.linalg.quadrature import Ritz, ritz
from hpc_hess.studies.block_diagonal import layers_view as layers
from hpc_hess.studies.block_diagonal.compute import known_top, stand_in
from hpc_hess.studies.run_figures import write_figures
from tests.support.report_case import lanczos, llm_like, make_result

SEEDS = 6


@pytest.mark.parametrize("name", ["bulk", "tails"])
def test_statements_hold_on_dense_spectra(name: str) -> None:
    """The bands of all four axes and all bounds; 2 probes x 20 steps, as in the fault."""
    case, tried = Case(spectra()[name]), defaultdict(list)
    for seed in range(SEEDS):
        found = case.recurrences(seed, 2, 20)
        for part in (of_densities(case, [ritz(*r) for r in found], "a run"), of_quadratures(case, found, "a run")):
            for statement, level, share in part:
                tried[statement, level].append(float(share))
    checked = {what: (np.mean(shares), level) for (what, level), shares in tried.items() if not what.startswith("trace")}
    assert sum("density" in what for what in checked) == 9
    for what, (share, level) in checked.items():
        assert share >= (1.0 if level == 1 else level - 0.15), (what, share)


def test_the_symmetric_log_band_where_steps_resolve_nothing() -> None:
    """The fault: the line stood far below the truth with a narrow band around it."""
    values = llm_like()
    quadratures = [ritz(*lanczos(values, 20, seed)) for seed in (0, 1)]
    shape = density_symlog(quadratures, points=300, width=0.2, linear=0.002)
    z = (symlog(shape.grid, 0.002)[:, None] - symlog(values, 0.002)) / 0.2
    truth = np.exp(-0.5 * z**2).mean(1) / (0.2 * np.sqrt(2 * np.pi))
    low, high = shape.band(len(values), everywhere=False)
    assert ((low <= truth + 1e-9) & (truth <= high + 1e-9)).mean() > 0.9
    wrong = np.abs(np.log(shape.mean + 1e-300) - np.log(truth + 1e-300)) > np.log(20)
    seen = truth > 1e-3 * truth.max()
    assert (wrong & seen).any()  # the line would be off by a factor of twenty ...
    assert not (wrong & seen & shape.resolved).any()  # ... and is not drawn there
    assert 0.2 < shape.resolved.mean() < 0.9


def test_captions_say_where_no_line_is_drawn(tmp_path) -> None:  # type: ignore[no-untyped-def]
    few = write_figures(make_result(llm_like(), 12, 2), [], tmp_path / "few")
    assert "No line where the steps do not tell the density" in few[0].caption
    assert "95 %" in few[0].caption
    all_steps = make_result(np.array([1.0, 2.0, 5.0, 9.0]), 4, 2)  # exhausted: the measure is known
    assert "No line" not in write_figures(all_steps, [], tmp_path / "all")[0].caption


def test_without_the_last_residual_norm_nothing_is_claimed() -> None:
    alpha, beta = lanczos(llm_like(), 12, 0)
    q = ritz(alpha, beta[:-1])
    assert Radau(q).bounds(0.0) == (0.0, 1.0)
    shape = density([q], points=100)
    low, high = shape.band(2000)
    assert (low == 0).all()
    assert np.isinf(high).all()
    assert not shape.resolved.any()


def test_more_chebyshev_moments_than_are_exact_have_no_band() -> None:
    quadratures = [ritz(*lanczos(llm_like(), 12, seed)) for seed in range(2)]
    assert density_chebyshev(quadratures).resolved.all()
    assert not density_chebyshev(quadratures, moments=60).resolved.any()
    one = [Ritz(np.array([-1.0, 0.5, 2.0]), np.array([0.2, 0.3, 0.5]), np.zeros(3))]
    shape = density_chebyshev(one, points=50, moments=5)
    values = np.repeat(one[0].values, [2, 3, 5])
    np.testing.assert_allclose(chebyshev(values, shape.grid, 5, (shape.grid[0], shape.grid[-1])), shape.mean, atol=1e-12)


def test_only_known_eigenvalues_stand_in() -> None:
    q = Ritz(np.array([-4.0, 1.0, 3.0, 6.0, 10.0]), np.full(5, 0.2), np.array([0.001, 0.002, 2.0, 0.01, 0.001]))
    np.testing.assert_array_equal(known_top(q), [10.0, 6.0])  # 3 has not converged: what is below it has an unknown number
    assert stand_in(known_top(q), np.array([20.0, 12.0, 7.0, 5.0])) == {
        "scale": pytest.approx(2),
        "top_error": pytest.approx(0),
        "top_count": 2,
    }
    none = Ritz(q.values, q.weights, np.full(5, 5.0))
    assert len(known_top(none)) == 0
    assert stand_in(known_top(none), np.array([20.0]))["top_count"] == 0


def test_a_layer_is_named_among_those_that_are_known_alike() -> None:
    parts = [
        {"name": "block 0", "size": 9, "values": [1.0], "top_count": 5, "top_error": 0.1, "scale": 1.2},
        {"name": "block 1", "size": 9, "values": [1.0], "top_count": 5, "top_error": 0.3, "scale": 1.1},
        {"name": "head", "size": 9, "values": [1.0], "top_count": 1, "top_error": 0.0, "scale": 2.0},
    ]
    found = {"blocks": "layer", "wasserstein": 2.0, "wasserstein_of_range": 0.02, "wasserstein_error": 1.0, "parts": parts}
    said = layers.facts(found)
    assert "its 5 largest eigenvalues" in said
    assert "10 % at best (block 0" in said
    assert "give or take 1 %" in said
    assert layers.table(found)[-1][-3:] == ["", "", "1"]
    assert "Too few" in layers.facts({**found, "parts": parts[2:]})
