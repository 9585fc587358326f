"""B2, B6 and B7 in the Python interface: frozen parameters, half precision, repeated eigenvalues."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import eigsh
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

import hpc_hess
from hpc_hess.errors import ConfigError, LayoutError, ModelError
from hpc_hess.linalg import probes
from hpc_hess.linalg.eigen import ThickRestart, eigenpairs
from hpc_hess.parallel.basis import Basis
from tests.support.base_model import ids_b, model_b
from tests.support.known_spectra import with_spectrum

METHODS = ["finite_difference", "exact"]


def dense(model: nn.Module, loss: Any, batch: Any) -> np.ndarray:
    """Return the Hessian of the parameters that require gradients, by name, by double backward."""
    parameters = [p for _, p in sorted(model.named_parameters()) if p.requires_grad]
    gradients = torch.autograd.grad(loss(model, batch), parameters, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in gradients])
    rows = [torch.autograd.grad(entry, parameters, retain_graph=True, allow_unused=True) for entry in flat]
    return torch.stack(
        [
            torch.cat([(torch.zeros_like(p) if r is None else r).reshape(-1) for r, p in zip(row, parameters, strict=True)])
            for row in rows
        ]
    ).numpy()


def mean_square(module: nn.Module, batch: Any) -> torch.Tensor:
    return mse_loss(module(batch[0]), batch[1])


def perceptron() -> tuple[nn.Sequential, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    return model, (torch.randn(20, 5, dtype=torch.float64), torch.randn(20, 3, dtype=torch.float64))


# -- B2 ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_frozen_parameters_are_no_part_of_the_matrix(method: Any) -> None:
    model, batch = perceptron()
    model[0].requires_grad_(False)
    operator = hpc_hess.hessian(model, [batch], mean_square, method=method)
    assert operator.shape == (21, 21)
    matrix = np.stack([operator @ row for row in np.eye(21)])
    np.testing.assert_allclose(matrix, dense(model, mean_square, batch), atol=1e-8)
    assert [f.check for f in operator.intake] == ["model.frozen"]
    assert operator.notes == ["36 selected parameters require no gradient and are left out: the matrix spans 21"]
    sketches = hpc_hess.gradient_sketches(model, [batch], mean_square, dimension=16, kind="gaussian")
    assert float((sketches**2).sum()) > 0
    assert all(p.grad is None for p in model.parameters())


def test_a_model_without_trainable_parameters_is_named() -> None:
    model, batch = perceptron()
    model.requires_grad_(False)
    for call in (hpc_hess.hessian, hpc_hess.gradient_sketches):
        with pytest.raises(LayoutError, match="requires a gradient"):
            call(model, [batch], mean_square)
    with pytest.raises(LayoutError, match="requires a gradient"):
        hpc_hess.decompose(model, [(batch[0], torch.zeros(20, dtype=torch.int64))], 3)


def test_decompose_spans_what_requires_gradients() -> None:
    model, (x, _) = perceptron()
    model[0].requires_grad_(False)
    classes = torch.arange(20) % 3
    parts = hpc_hess.decompose(model, [(x, classes)], 3)
    matrix = np.stack([parts.hessian @ row for row in np.eye(21)])
    np.testing.assert_allclose(matrix, dense(model, lambda m, b: cross_entropy(m(b), classes), x), atol=1e-10)
    v = np.random.default_rng(0).standard_normal(21)
    np.testing.assert_allclose(parts.gauss_newton @ v + parts.residual @ v, parts.hessian @ v, atol=1e-12)


def test_float32_adapters_of_a_half_precision_model() -> None:
    """Dtypes agree among the selected ones only; through a half-precision model there are no finite differences."""
    torch.manual_seed(0)

    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.lora = nn.Linear(5, 3).bfloat16(), nn.Linear(5, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.base(x.bfloat16()) + self.lora(x).bfloat16()).float().tanh()

    model, batch = Adapted(), (torch.randn(20, 5), torch.randn(20, 3))
    operator = hpc_hess.hessian(model, [batch], mean_square, method="exact", include=["*lora*"])
    assert operator.shape == (18, 18)
    assert operator.space.dtype == torch.float32
    with pytest.raises(ConfigError, match="finite differences cannot be computed in half precision"):
        hpc_hess.hessian(model, [batch], mean_square, include=["*lora*"])


# -- B6 ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_have_float32_recurrences(dtype: torch.dtype) -> None:
    model, (x, y) = perceptron()
    model.to(dtype)
    x, y = x.to(dtype), y.to(dtype)
    wide, _ = perceptron()
    wide.load_state_dict(model.state_dict())
    exact = np.linalg.eigvalsh(dense(wide, mean_square, (x.double(), y.double())))
    operator = hpc_hess.hessian(model, [(x, y)], mean_square, method="exact")
    assert operator.space.dtype == torch.float32
    assert any(f.check == "given.precision" for f in operator.intake)
    spectrum = hpc_hess.slq(operator, steps=30)
    size = float(np.abs(exact).max())
    assert spectrum.lambda_max == pytest.approx(exact[-1], abs=0.03 * size)
    assert spectrum.lambda_min == pytest.approx(exact[0], abs=0.03 * size)
    pairs = hpc_hess.eigenpairs(operator, 1, which="largest", tolerance=0.02)
    assert pairs.num_products > 3
    assert pairs.values[0] == pytest.approx(exact[-1], abs=0.05 * size)
    largest = eigsh(operator.to_scipy(), k=1, which="LA", return_eigenvectors=False, tol=1e-2)
    assert largest[0] == pytest.approx(exact[-1], abs=0.05 * size)
    assert (operator @ torch.ones(57, dtype=dtype)).dtype == torch.float32
    with pytest.raises(ConfigError, match='half precision.* method = "exact"'):
        hpc_hess.hessian(model, [(x, y)], mean_square)


def test_half_precision_language_model() -> None:
    model = model_b()
    reference = hpc_hess.hessian(model, [ids_b()], method="exact")
    v = torch.randn(reference.shape[0], generator=torch.Generator().manual_seed(0))
    expected = reference @ v
    model.bfloat16()
    found = hpc_hess.hessian(model, [ids_b()], method="exact")
    assert found.space.dtype == torch.float32
    assert float(((found @ v) - expected).norm()) < 0.1 * float(expected.norm())
    assert hpc_hess.slq(found, steps=30).lambda_max == pytest.approx(36.46, rel=0.05)
    with pytest.raises(ConfigError, match="half precision"):
        hpc_hess.hessian(model, [ids_b()])


def test_differences_through_autocast_are_refused() -> None:
    model, (x, y) = perceptron()
    model.float()

    def loss(module: nn.Module, batch: Any) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return mse_loss(module(batch[0]).float(), batch[1])

    with pytest.raises(ConfigError, match="half precision"):
        hpc_hess.hessian(model, [(x.float(), y.float())], loss)
    operator = hpc_hess.hessian(model, [(x.float(), y.float())], mean_square)
    v = torch.ones(57)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        inside = operator @ v
    assert torch.allclose(inside, operator @ v)


def test_half_precision_classifiers_are_taken_apart() -> None:
    model, (x, _) = perceptron()
    classes = torch.arange(20) % 3
    parts = hpc_hess.decompose(model, [(x, classes)], 3)
    v = np.random.default_rng(0).standard_normal(57)
    expected = parts.gauss_newton @ v
    half = hpc_hess.decompose(model.bfloat16(), [(x.bfloat16(), classes)], 3)
    assert np.linalg.norm(half.gauss_newton @ v - expected) < 0.05 * np.linalg.norm(expected)
    assert hpc_hess.gradient_sketches(
        model, [(x.bfloat16(), classes)], lambda m, b: cross_entropy(m(b[0]), b[1]), dimension=16
    ).shape == (1, 16)


# -- B7 ------------------------------------------------------------------------------------------------------------------


def threefold(method: Any = "exact") -> tuple[Any, np.ndarray]:
    """Each eigenvalue three times: the squared error of a linear layer, summed over three outputs."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3, bias=False).double()
    x, y = torch.randn(30, 4, dtype=torch.float64), torch.randn(30, 3, dtype=torch.float64)
    loss = lambda m, b: ((m(b[0]) - b[1]) ** 2).sum() / len(b[0])  # noqa: E731
    values = np.repeat(torch.linalg.eigvalsh(2 * x.T @ x / 30).numpy(), 3)
    return hpc_hess.hessian(model, [(x, y)], loss, method=method), values


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("count", "which"),
    [
        (3, "largest"),
        (4, "smallest"),
        (5, "magnitude"),
        (2, "both"),
        (6, "both"),
        (12, "largest"),
        (11, "smallest"),
        (12, "both"),
        (7, "both"),
        (1, "largest"),
    ],
)
def test_every_copy_of_an_eigenvalue_is_found(count: int, which: Any, method: Any) -> None:
    operator, values = threefold(method)
    pairs = hpc_hess.eigenpairs(operator, count, which=which, tolerance=1e-6)
    low, high = values[:count], values[-count:]
    expected = {"largest": high, "magnitude": high, "smallest": low, "both": values if 2 * count > 12 else np.r_[low, high]}
    assert pairs.values == pytest.approx(expected[which], abs=1e-6)
    assert pairs.converged
    assert pairs.multiplicity_resolved
    vectors = pairs.vectors
    assert np.abs(vectors @ vectors.T - np.eye(len(vectors))).max() < 1e-6
    for value, u, residual in zip(pairs.values, vectors, pairs.residuals, strict=True):
        assert np.linalg.norm(operator @ u - value * u) < residual + 1e-6


def test_where_copies_are_not_searched_the_result_says_so() -> None:
    operator, _ = threefold()
    pairs = hpc_hess.eigenpairs(operator, 3, which="largest", copies=False)
    assert pairs.converged
    assert not pairs.multiplicity_resolved
    few = hpc_hess.eigenpairs(operator, 3, which="largest", most_products=6)
    assert not few.multiplicity_resolved


@pytest.mark.parametrize("which", ["largest", "smallest", "both", "magnitude"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_copies_in_a_large_matrix(which: Any, dtype: torch.dtype) -> None:
    """No Krylov space of these is exhausted; twice the products tell."""
    bulk = torch.linspace(-1, 1.5, 300, dtype=torch.float64) ** 3
    values = torch.cat([bulk, torch.tensor([-40, -40, -17, -17, -9, 30, 60, 60, 60, 110], dtype=torch.float64)])
    operator = with_spectrum(values, dtype)
    process = ThickRestart(operator, Basis(operator.space, 17), 16, 3, which, 1e-4, copies=True)
    process.start(probes.draw(operator.space, seed=0, probe=0, distribution="gaussian"))
    pairs = eigenpairs(process, 300)
    low, high = [-40, -40, -17], [60, 60, 110]
    expected = {"largest": high, "smallest": low, "both": low + high, "magnitude": high}
    assert pairs.values == pytest.approx(expected[which], abs=2e-2)
    assert process.finished
    assert process.complete
    for k, value in enumerate(pairs.values):
        u = pairs.vector(k)
        assert operator.matvec(u).axpy_(-float(value), u).norm() <= 1.1 * pairs.residuals[k] + 1e-3


def test_a_search_with_new_directions_resumes_to_the_last_bit() -> None:
    operator, _ = threefold()

    def search() -> ThickRestart:
        process = ThickRestart(operator, Basis(operator.space, 10), 9, 3, "largest", 1e-8, copies=True)
        process.start(probes.draw(operator.space, seed=0, probe=0, distribution="gaussian"))
        return process

    whole = search()
    values = eigenpairs(whole, 300).values
    for stop in range(1, whole.num_products):
        first, again = search(), search()
        eigenpairs(first, stop)
        again.basis.rows.fill_(torch.nan)
        for k in range(first.filled + first.has_next):
            again.basis[k] = first.basis[k]
        again.from_state(first.to_state())
        assert np.array_equal(eigenpairs(again, 300).values, values), stop
        assert (again.num_products, again.directions) == (whole.num_products, whole.directions)


def test_more_pairs_than_there_are_is_one_sentence() -> None:
    operator, _ = threefold()
    with pytest.raises(ConfigError, match="13 pairs were asked for: the matrix has 12"):
        hpc_hess.eigenpairs(operator, 13)


def test_models_without_values_are_named() -> None:
    with pytest.raises(ModelError, match="on the meta device"):
        hpc_hess.hessian(nn.Linear(3, 2, device="meta"), [torch.zeros(1, 3)])
    with pytest.raises(ModelError, match="has no shape yet"):
        hpc_hess.hessian(nn.LazyLinear(2), [torch.zeros(1, 3)])
    with pytest.raises(ModelError, match="not a torch.nn.Module"):
        hpc_hess.hessian(lambda x: x, [torch.zeros(1, 3)])  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="is complex"):
        hpc_hess.hessian(nn.Linear(3, 2, dtype=torch.complex64), [torch.zeros(1, 3)])
