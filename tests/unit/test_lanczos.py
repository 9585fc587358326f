"""Lanczos on matrices with known spectra, one process."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from hpc_hess.errors import NumericsError
from hpc_hess.linalg.lanczos import Lanczos, basis_rows, next_products
from hpc_hess.linalg.operator import FunctionOperator, LinearOperator, diagonal, products
from hpc_hess.linalg.probes import normals, signs
from hpc_hess.linalg.quadrature import ritz
from hpc_hess.parallel.basis import Basis
from hpc_hess.parallel.vector import Vector
from tests.support.known_spectra import make_space, with_spectrum


def run(
    operator: LinearOperator, steps: int, reorthogonalise: int | str = "full", seed: int = 1, capacity: int | None = None
) -> Lanczos:
    space = operator.space
    basis = Basis(space, capacity or basis_rows(reorthogonalise, steps))
    lanczos = Lanczos(operator, basis, steps, reorthogonalise)
    lanczos.start(space.wrap(normals(seed, 0, 0, space.size, dtype=space.dtype)))
    while not lanczos.finished:
        lanczos.step()
    return lanczos


def tridiagonal(lanczos: Lanczos) -> torch.Tensor:
    a = torch.tensor(lanczos.alpha, dtype=torch.float64)
    b = torch.tensor(lanczos.beta[: lanczos.step_count - 1], dtype=torch.float64)
    return torch.diag(a) + torch.diag(b, 1) + torch.diag(b, -1)


SPECTRA = {
    "uniform": torch.linspace(-1, 2, 120, dtype=torch.float64),
    "outliers": torch.cat([torch.linspace(-0.1, 0.1, 115, dtype=torch.float64), torch.tensor([-30.0, -9, 14, 40, 41])]),
    "decades": torch.logspace(-8, 3, 120, dtype=torch.float64),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_recurrence_and_orthogonality(name: str, dtype: torch.dtype) -> None:
    operator = with_spectrum(SPECTRA[name], dtype)
    steps = 30
    lanczos = run(operator, steps)
    eps, norm = torch.finfo(dtype).eps, float(SPECTRA[name].abs().max())
    v = lanczos.basis.rows.double()  # (steps, n)
    products = torch.stack([operator.matvec(lanczos.basis[j]).data for j in range(steps)]).double()
    residual = products - tridiagonal(lanczos) @ v
    # A V = V T + beta v e^T: all rows of the transposed relation but the last vanish
    assert float(residual[:-1].abs().max()) < 50 * eps * norm
    assert float(residual[-1].norm()) == pytest.approx(lanczos.beta[-1], abs=50 * eps * norm)
    assert float((v @ residual[-1]).abs().max()) < 50 * eps * norm
    assert float((v @ v.T - torch.eye(steps)).abs().max()) < 10 * eps
    assert min(lanczos.beta) > 0


def test_full_rank_run_gives_the_exact_spectrum() -> None:
    eigenvalues = torch.cat([torch.linspace(-3, 5, 37, dtype=torch.float64), torch.tensor([-20.0, 11.0, 60.0])])
    lanczos = run(with_spectrum(eigenvalues), len(eigenvalues))
    assert lanczos.step_count == len(eigenvalues)
    values = ritz(lanczos.alpha, lanczos.beta).values
    np.testing.assert_allclose(values, eigenvalues.sort().values.numpy(), atol=1e-12 * 60)
    assert lanczos.beta[-1] < 1e-10  # nothing is left


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("rank", [1, 4, 9])
def test_breakdown_on_a_low_rank_matrix_is_a_result(rank: int, dtype: torch.dtype, tolerance: float) -> None:
    nonzero = torch.linspace(2, 10, rank, dtype=torch.float64) * (-1) ** torch.arange(rank)
    eigenvalues = torch.cat([nonzero, torch.zeros(80 - rank, dtype=torch.float64)])
    operator = with_spectrum(eigenvalues, dtype)
    lanczos = run(operator, 50)
    assert lanczos.broke_down
    assert lanczos.finished
    assert lanczos.step_count == rank + 1 == operator.num_products
    result = ritz(lanczos.alpha, lanczos.beta)
    expected = np.sort(np.append(nonzero.numpy(), 0.0))
    np.testing.assert_allclose(result.values, expected, atol=tolerance * 10)
    assert result.residuals.max() < 1e3 * tolerance
    assert result.weights.sum() == pytest.approx(1.0)


def test_breakdown_at_once_on_an_eigenvector() -> None:
    space = make_space(6)
    lanczos = Lanczos(diagonal(space, space.wrap(torch.arange(6.0, dtype=torch.float64))), Basis(space, 4), 4)
    lanczos.start(space.wrap(torch.eye(6, dtype=torch.float64)[4]))
    lanczos.step()
    assert (lanczos.broke_down, lanczos.alpha, lanczos.beta) == (True, [4.0], [0.0])


@pytest.mark.parametrize("zero", [torch.float32, torch.float64])
def test_the_zero_matrix(zero: torch.dtype) -> None:
    space = make_space(10, zero)
    lanczos = run(diagonal(space, space.zeros()), 5)
    assert (lanczos.broke_down, lanczos.alpha, lanczos.beta) == (True, [0.0], [0.0])


@pytest.mark.parametrize(("mode", "rows"), [("none", 3), (1, 3), (2, 3), (5, 6), (100, 16), ("full", 16)])
def test_rings_equal_full_on_a_well_behaved_matrix(mode: int | str, rows: int) -> None:
    operator = with_spectrum(torch.linspace(-1, 2, 200, dtype=torch.float64))
    full = run(operator, 16)
    other = run(operator, 16, mode)
    assert other.basis.rows.shape[0] == basis_rows(mode, 16) == rows
    np.testing.assert_allclose(other.alpha, full.alpha, atol=1e-11)
    np.testing.assert_allclose(other.beta, full.beta, atol=1e-11)


def test_a_ring_has_what_it_says_a_resume_needs() -> None:
    operator = with_spectrum(SPECTRA["outliers"])
    for mode in ("none", 1, 4, "full"):
        whole = run(operator, 12, mode)
        basis = Basis(operator.space, basis_rows(mode, 12))
        first = Lanczos(operator, basis, 12, mode)
        first.start(operator.space.wrap(normals(1, 0, 0, operator.space.size, dtype=torch.float64)))
        for _ in range(7):
            first.step()
        again = Lanczos(operator, Basis(operator.space, basis_rows(mode, 12)), 12, mode, list(first.alpha), list(first.beta))
        again.basis.rows.fill_(torch.nan)  # what is not needed may hold anything
        for j in again.rows_needed():
            again.basis[j] = first.basis[j]
        while not again.finished:
            again.step()
        assert again.alpha == whole.alpha, mode
        assert again.beta == whole.beta, mode


def test_without_reorthogonalisation_orthogonality_is_lost_and_full_keeps_it() -> None:
    """What the option is for: copies of a converged extreme eigenvalue appear, and only without."""
    operator = with_spectrum(SPECTRA["outliers"])
    without, full = run(operator, 60, "none"), run(operator, 60)
    near = [int((np.abs(ritz(x.alpha, x.beta).values - 41.0) < 1e-6).sum()) for x in (without, full)]
    assert near[0] > 1
    assert near[1] == 1


@pytest.mark.parametrize("mode", ["none", 3, "full"])
def test_one_product_a_step(mode: int | str) -> None:
    operator = with_spectrum(SPECTRA["uniform"])
    lanczos = run(operator, 11, mode)
    assert operator.num_products == lanczos.step_count == 11


def test_the_operator_never_sees_its_argument_change() -> None:
    """Products read v_j itself: the basis row must still be v_j afterwards."""
    operator = with_spectrum(SPECTRA["uniform"])
    lanczos = run(operator, 5)
    before = lanczos.basis.rows.clone()
    operator.matvec(lanczos.basis[2])
    assert torch.equal(before, lanczos.basis.rows)
    assert isinstance(operator, LinearOperator)


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_a_start_vector_without_direction(bad: float) -> None:
    operator = with_spectrum(SPECTRA["uniform"])
    lanczos = Lanczos(operator, Basis(operator.space, 3), 3)
    with pytest.raises(NumericsError, match="the start vector has norm"):
        lanczos.start(operator.space.wrap(torch.full((120,), bad, dtype=torch.float64)))


@pytest.mark.parametrize("mode", ["none", 2, "full"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_product_names_the_step(mode: int | str, bad: float) -> None:
    space = make_space(20)
    calls: list[int] = []

    def product(v: Vector) -> Vector:
        calls.append(1)
        out = torch.arange(20.0, dtype=torch.float64) * v.data
        out[3] = bad if len(calls) == 3 else out[3]
        return Vector(space, out)

    with pytest.raises(NumericsError, match="Lanczos step 3 is not finite"):
        run(FunctionOperator(space, product), 10, mode)


def test_a_second_start_begins_afresh() -> None:
    operator = with_spectrum(SPECTRA["uniform"])
    fresh = run(operator, 6, seed=2)
    reused = run(operator, 6, seed=1)
    reused.start(operator.space.wrap(normals(2, 0, 0, 120, dtype=torch.float64)))
    while not reused.finished:
        reused.step()
    assert (reused.alpha, reused.beta) == (fresh.alpha, fresh.beta)


def test_an_asymmetric_product_shows() -> None:
    operator = with_spectrum(SPECTRA["uniform"])
    assert run(operator, 10).asymmetry < 1e-14
    space = operator.space
    skew = normals(9, 0, 0, 120 * 120, dtype=torch.float64).reshape(120, 120) * 1e-4
    crooked = FunctionOperator(space, lambda v: Vector(space, operator.matvec(v).data + (skew - skew.T) @ v.data))
    assert 1e-5 < run(crooked, 10).asymmetry < 1e-2


def test_bfloat16_rows_still_find_the_extremes() -> None:
    """A declared bf16 basis: three digits, no breakdown."""
    eigenvalues = SPECTRA["outliers"]
    operator = with_spectrum(eigenvalues, torch.float32)
    basis = Basis(operator.space, 20)
    basis.rows = basis.rows.to(torch.bfloat16)
    lanczos = Lanczos(operator, basis, 20)
    lanczos.start(operator.space.wrap(signs(1, 0, 0, 120)))
    original = operator._function
    operator._function = lambda v: original(Vector(v.space, v.data.float()))
    while not lanczos.finished:
        lanczos.step()
    values = ritz(lanczos.alpha, lanczos.beta).values
    assert values[-1] == pytest.approx(41.0, rel=2e-2)
    assert values[0] == pytest.approx(-30.0, rel=2e-2)


# -- lock-step ---------------------------------------------------------------------------------------------------------


class Shared(FunctionOperator):
    """Multiplies several vectors at once and remembers how many."""

    def matmat(self, vectors: Sequence[Vector]) -> list[Vector]:
        self.widths = [*getattr(self, "widths", []), len(vectors)]
        return [self.matvec(v) for v in vectors]


@pytest.mark.parametrize("reorthogonalise", ["full", 3, "none"])
def test_processes_in_lock_step_are_those_of_one_by_one(reorthogonalise: int | str) -> None:
    """The second start vector spans an invariant space of dimension 3: its process ends while the others go on."""
    space = make_space(40)
    entries = torch.linspace(-2, 5, 40, dtype=torch.float64)
    operator = Shared(space, lambda v: Vector(space, entries * v.data))
    starts = [normals(k, 0, 0, 40, dtype=torch.float64) for k in range(3)]
    starts[1][[0, 17, 39]], starts[1][[*range(1, 17), *range(18, 39)]] = 1.0, 0.0
    group = []
    for start in starts:
        process = Lanczos(operator, Basis(space, basis_rows(reorthogonalise, 8)), 8, reorthogonalise)
        process.start(space.wrap(start.clone()))
        group.append(process)
    while running := [process for process in group if not process.finished]:
        for process, product in zip(running, next_products(running), strict=True):
            process.advance(product)
    assert operator.widths == [3, 3, 3, 2, 2, 2, 2, 2]
    assert [process.step_count for process in group] == [8, 3, 8]
    assert [process.broke_down for process in group] == [False, True, False]
    for start, process in zip(starts, group, strict=True):
        alone = Lanczos(operator, Basis(space, basis_rows(reorthogonalise, 8)), 8, reorthogonalise)
        alone.start(space.wrap(start.clone()))
        while not alone.finished:
            alone.step()
        assert (alone.alpha, alone.beta) == (process.alpha, process.beta)


def test_an_operator_without_matmat_multiplies_one_by_one() -> None:
    operator = diagonal(make_space(5), make_space(5).wrap(torch.arange(5.0, dtype=torch.float64)))
    vectors = [operator.space.wrap(torch.full((5,), float(k), dtype=torch.float64)) for k in (1, 2)]
    found = products(operator, vectors)
    assert operator.num_products == 2
    assert [v.data.tolist() for v in found] == [[0, 1, 2, 3, 4], [0, 2, 4, 6, 8]]


def test_a_resumed_process_knows_whether_it_has_ended() -> None:
    operator = diagonal(make_space(5), make_space(5).wrap(torch.arange(5.0, dtype=torch.float64)))
    process = Lanczos(operator, Basis(operator.space, 4), 4)
    for alpha, ended, broke_down in (([1.0], False, False), ([1.0], True, True), ([1.0] * 4, True, False)):
        process.resume(alpha, alpha, ended)
        assert (process.finished, process.broke_down) == (ended, broke_down)
