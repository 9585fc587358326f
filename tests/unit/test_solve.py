"""Inverse products against dense solves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import cg as scipy_cg
from scipy.sparse.linalg import minres as scipy_minres

from hpc_hess.errors import NumericsError
from hpc_hess.linalg import probes
from hpc_hess.linalg.operator import FunctionOperator
from hpc_hess.linalg.solve import conjugate_gradients, minres
from hpc_hess.parallel.vector import Vector
from tests.support.known_spectra import make_space, orthogonal


def matrix(low: float, high: float, size: int = 120) -> torch.Tensor:
    q = orthogonal(size)
    return (q * torch.linspace(low, high, size, dtype=torch.float64)) @ q.T


def problem(dense: torch.Tensor) -> tuple[FunctionOperator, Vector]:
    space = make_space(len(dense))
    return FunctionOperator(space, lambda v: Vector(space, dense @ v.data)), probes.draw(
        space, seed=3, probe=0, distribution="gaussian"
    )


@pytest.mark.parametrize("solve", [conjugate_gradients, minres])
@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_positive_definite(solve, damping: float) -> None:  # type: ignore[no-untyped-def]
    dense = matrix(0.05, 4)
    operator, b = problem(dense)
    heard: list[float] = []
    found = solve(operator, b, damping=damping, tolerance=1e-10, most=500, after_product=heard.append)
    exact = torch.linalg.solve(dense + damping * torch.eye(len(dense), dtype=torch.float64), b.data)
    assert float((found.x.data - exact).norm() / exact.norm()) < 1e-7
    true = float((b.data - dense @ found.x.data - damping * found.x.data).norm() / b.norm())
    assert found.converged_to == pytest.approx(true, rel=0.05, abs=1e-13)
    assert found.residuals == [1.0, *heard]
    assert operator.num_products == len(heard)
    scipy = {conjugate_gradients: scipy_cg, minres: scipy_minres}[solve]
    count: list[float] = []
    shifted = (dense + damping * torch.eye(len(dense), dtype=torch.float64)).numpy()
    scipy(shifted, b.data.numpy(), rtol=1e-10, maxiter=500, callback=lambda _: count.append(0))
    assert len(heard) <= 1.2 * len(count) + 2  # SciPy stops by another norm


def test_indefinite() -> None:
    dense = matrix(-1.03, 3.01)
    operator, b = problem(dense)
    found = minres(operator, b, damping=0.1, tolerance=1e-9, most=1000)
    exact = torch.linalg.solve(dense + 0.1 * torch.eye(len(dense), dtype=torch.float64), b.data)
    assert float((found.x.data - exact).norm() / exact.norm()) < 1e-5
    assert (np.diff(found.residuals) <= 1e-15).all()  # they never grow
    with pytest.raises(NumericsError, match=r"met the curvature -.* raise the damping"):
        conjugate_gradients(operator, b, damping=0.1, tolerance=1e-9, most=1000)


def test_nothing_to_do_and_not_enough_products() -> None:
    operator, b = problem(matrix(0.1, 1))
    for solve in (conjugate_gradients, minres):
        zero = solve(operator, b.space.zeros(), damping=0.0)
        assert zero.residuals == [0.0]
        assert zero.x.norm() == 0
        assert len(solve(operator, b, damping=0.0, tolerance=1e-12, most=5).residuals) == 6
    assert operator.num_products == 10


def test_an_eigenvector_takes_one_product() -> None:
    dense = matrix(0.5, 2)
    values, vectors = torch.linalg.eigh(dense)
    operator, b = problem(dense)
    b.data.copy_(vectors[:, 7])
    for solve in (conjugate_gradients, minres):
        found = solve(operator, b, damping=0.25, tolerance=1e-9)
        assert len(found.residuals) == 2
        assert torch.allclose(found.x.data, vectors[:, 7] / (values[7] + 0.25))
