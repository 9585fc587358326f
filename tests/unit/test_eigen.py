"""Thick-restart Lanczos on known spectra: the right pairs, no ghost, bounded memory, no more products than ARPACK."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator as ScipyOperator
from scipy.sparse.linalg import eigsh

from hpc_hess.errors import ConfigError, NumericsError
from hpc_hess.linalg import probes
from hpc_hess.linalg.eigen import Pairs, ThickRestart, Which, eigenpairs, least_basis
from hpc_hess.linalg.operator import FunctionOperator, diagonal
from hpc_hess.parallel.basis import Basis
from tests.support.known_spectra import expected, hessian_like, make_space, with_spectrum


def search(operator: FunctionOperator, count: int, which: Which, size: int, tolerance: float, most: int = 2000) -> Any:
    process = ThickRestart(operator, Basis(operator.space, size + 1), size, count, which, tolerance)
    process.start(probes.draw(operator.space, seed=0, probe=0, distribution="gaussian"))
    return process, eigenpairs(process, most)


@pytest.mark.parametrize("which", ["largest", "smallest", "both", "magnitude"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_wanted_pairs_of_a_hessian_like_spectrum(which: Which, dtype: torch.dtype) -> None:
    values = hessian_like(400)
    operator = with_spectrum(values, dtype)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    process, pairs = search(operator, 3, which, least_basis(3, which) + 4, tolerance)
    assert process.finished
    assert process.num_restarts > 0 or dtype == torch.float32  # whose tolerance is soon met
    assert np.abs(pairs.values - expected(values, 3, which)).max() < 10 * tolerance * 110
    check_pairs(operator, pairs, 20 * tolerance * pairs.scale)


def check_pairs(operator: FunctionOperator, pairs: Pairs, most: float) -> None:
    """Explicit residuals and orthonormality of the vectors themselves."""
    vectors = [pairs.vector(k) for k in range(len(pairs.values))]
    for value, u in zip(pairs.values, vectors, strict=True):
        assert operator.matvec(u).axpy_(-float(value), u).norm() < most
    gram = np.array([[u.dot(v) for v in vectors] for u in vectors])
    assert np.abs(gram - np.eye(len(vectors))).max() < 100 * torch.finfo(operator.space.dtype).eps


def test_residuals_are_what_they_claim() -> None:
    operator = with_spectrum(hessian_like(300))
    _, pairs = search(operator, 4, "both", 14, 1e-4)
    for k, value in enumerate(pairs.values):
        u = pairs.vector(k)
        assert operator.matvec(u).axpy_(-float(value), u).norm() == pytest.approx(pairs.residuals[k], rel=1e-4, abs=1e-9)


def test_no_ghost_after_many_restarts() -> None:
    """A dominant eigenvalue converges long before the others; it must not come back as a copy."""
    values = torch.cat([torch.linspace(0, 1, 500, dtype=torch.float64), torch.tensor([1e4], dtype=torch.float64)])
    _, pairs = search(with_spectrum(values, torch.float32), 4, "largest", 12, 1e-7, most=400)
    assert (pairs.values > 5e3).sum() == 1
    assert np.abs(pairs.values[:3] - values.sort().values[-4:-1].numpy()).max() < 1e-2


def for_scipy(operator: FunctionOperator) -> ScipyOperator:
    space = operator.space
    product = lambda x: operator.matvec(space.wrap(torch.from_numpy(x.copy()))).data.numpy()  # noqa: E731
    return ScipyOperator((space.size, space.size), matvec=product, dtype=np.float64)


@pytest.mark.parametrize("which", ["largest", "smallest", "both", "magnitude"])
def test_no_more_products_than_arpack(which: Which) -> None:
    """As many vectors for both; ARPACK counts the ends together, and stops by the same tolerance."""
    spectrum = hessian_like(800)
    operator = with_spectrum(spectrum)
    for count, size, tolerance in ((3, 20, 1e-6), (5, 24, 1e-8), (2, 10, 1e-10)):
        num_wanted = 2 * count if which == "both" else count
        begin = operator.num_products
        start = probes.draw(operator.space, seed=0, probe=0, distribution="gaussian")
        code = {"largest": "LA", "smallest": "SA", "both": "BE", "magnitude": "LM"}[which]
        found = eigsh(
            for_scipy(operator),
            num_wanted,
            which=code,
            ncv=size,
            tol=tolerance,
            v0=start.data.numpy(),
            return_eigenvectors=False,
        )
        arpack_products = operator.num_products - begin
        # ARPACK's tolerance is relative to each Ritz value; ours to the largest
        scale = float(np.abs(found).min() / np.abs(spectrum.numpy()).max())
        process, pairs = search(operator, count, which, size, tolerance * scale)
        assert np.abs(np.sort(found) - pairs.values).max() < 1e-4
        # where the bulk's dense edge must be resolved, restarts differ by luck
        assert process.num_products <= 1.05 * arpack_products, (count, size, process.num_products, arpack_products)


def test_an_invariant_space_ends_the_search() -> None:
    space = make_space(50)
    values = torch.zeros(50, dtype=torch.float64)
    values[:4] = torch.tensor([3.0, -2.0, 5.0, 1.0])
    operator = diagonal(space, space.wrap(values))
    process, pairs = search(operator, 3, "magnitude", 20, 1e-12)
    assert process.finished
    assert process.num_products <= 6
    assert pairs.values == pytest.approx([-2, 3, 5])
    assert (pairs.residuals == 0).all()


def test_bad_input() -> None:
    space = make_space(30)
    operator = diagonal(space, space.zeros())
    with pytest.raises(ConfigError, match="need a basis of at least 9, not 8"):
        ThickRestart(operator, Basis(space, 9), 8, 3, "both")
    process = ThickRestart(operator, Basis(space, 10), 9, 3, "both")
    with pytest.raises(NumericsError, match="start vector"):
        process.start(space.zeros())
    nan = FunctionOperator(space, lambda v: space.wrap(v.data * float("nan")))
    process = ThickRestart(nan, Basis(space, 10), 9, 3, "both")
    process.start(probes.draw(space, seed=0, probe=0, distribution="gaussian"))
    with pytest.raises(NumericsError, match="product 1 of the eigenpair search is not finite"):
        process.step()
