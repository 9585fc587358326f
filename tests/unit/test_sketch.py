"""Sketches: adjoints, norms, parts of a vector, known weaknesses; the dense matrix that the definition spells out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import hpc_hess
from hpc_hess.errors import ConfigError
from hpc_hess.sketch.implicit import implicit_gradient, implicit_product
from hpc_hess.sketch.kinds import KINDS, SketchSettings
from hpc_hess.sketch.sketch import Sketch
from hpc_hess.sketch.transforms import factors, haar, hadamard, spreading

SIZE = 1999  # odd, and no multiple of any block
PRECONDITIONERS = ("hadamard", "fft", "haar")
CASES = [(kind, p) for kind in ("affd", "afjl", "ffd", "fjl") for p in PRECONDITIONERS] + [
    ("qk", "haar"),
    ("gaussian", "hadamard"),
    ("rademacher", "hadamard"),
]


def make(kind: str, preconditioner: str = "hadamard", *, dimension: int = 64, seed: int = 0, size: int = SIZE) -> Sketch:
    block = 0 if kind == "ffd" else 256
    settings = {"kind": kind, "dimension": dimension, "preconditioner": preconditioner, "seed": seed, "block": block}
    return Sketch(size, SketchSettings(**settings))  # type: ignore[arg-type]


def apply(sketch: Sketch, x: torch.Tensor) -> torch.Tensor:
    collection = sketch.begin(x.device)
    sketch.add(collection, x, [0], [len(x)])
    return sketch.end(collection)


def transpose(sketch: Sketch, y: torch.Tensor, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    out = torch.empty(sketch.size, dtype=dtype)
    sketch.lift(y, out, [0], [sketch.size])
    return out


def normal(size: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("kind", "preconditioner"), CASES)
def test_the_transpose_is_the_adjoint(kind: str, preconditioner: str) -> None:
    sketch = make(kind, preconditioner)
    x, y = normal(SIZE), normal(64, 2)
    here, there = torch.dot(apply(sketch, x), y), torch.dot(x, transpose(sketch, y))
    assert abs(here - there) < 1e-12 * x.norm() * y.norm()
    in_float32 = torch.dot(x, transpose(sketch, y, torch.float32).double())
    assert abs(here - in_float32) < 1e-6 * x.norm() * y.norm()


@pytest.mark.parametrize(("kind", "preconditioner"), CASES)
def test_norms_are_preserved_on_average(kind: str, preconditioner: str) -> None:
    x = normal(SIZE)
    ratios = [float(apply(make(kind, preconditioner, seed=seed), x).norm() / x.norm()) ** 2 for seed in range(60)]
    mean, spread = sum(ratios) / 60, torch.tensor(ratios).std() / math.sqrt(60)
    assert abs(mean - 1) < 4 * spread + 0.01
    assert torch.tensor(ratios).std() < (0.6 if kind == "qk" else 0.35)  # sqrt(2 / D) = 0.18 for a Gaussian matrix


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_a_vector_add_up_wherever_they_lie(kind: str) -> None:
    sketch, x = make(kind), normal(SIZE)
    whole = apply(sketch, x)
    collection = sketch.begin(x.device)
    for starts, lengths in (([3, 700, 701], [250, 1, 900]), ([0, 253, 1601], [3, 447, 398])):
        data = torch.cat([x[s : s + n] for s, n in zip(starts, lengths, strict=True)])
        sketch.add(collection, data, starts, lengths)
    assert torch.allclose(sketch.end(collection), whole, atol=1e-12)
    y = normal(64, 2)
    out = torch.empty(251, dtype=torch.float64)
    sketch.lift(y, out, [5, 900], [1, 250])
    lifted = transpose(sketch, y)
    assert torch.allclose(out, torch.cat([lifted[5:6], lifted[900:1150]]), atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_seeds_give_other_sketches_and_the_same_seed_the_same(kind: str) -> None:
    x = normal(SIZE)
    first, again, other = (apply(make(kind, seed=seed), x) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert (first - other).norm() > 0.1 * x.norm()


def test_the_definition_of_affd_spelt_out_for_one_block() -> None:
    sketch = make("affd", size=256)
    first, gaussians, second = (sketch._chain.factors[1], sketch._chain.factors[2], sketch._chain.tail)
    ones, block = torch.ones(1, 256, dtype=torch.float64), range(1)
    B = sketch._chain.factors[0].forward(ones.clone(), block)[0].diag()
    G = gaussians.forward(ones.clone(), block)[0].diag()
    eye = torch.eye(256, dtype=torch.float64)
    H1 = first.forward(eye.clone(), range(256)).T
    H2 = second.forward(eye.clone()).T  # its first 64 rows
    assert torch.allclose(H1 @ H1.T, eye)
    assert torch.allclose(H2 @ H2.T, eye[:64, :64])
    assert set(B.diagonal().tolist()) == {1.0, -1.0}
    assert 0.8 < G.diagonal().square().mean() < 1.25
    x = normal(256)
    assert torch.allclose(apply(sketch, x), 2.0 * H2 @ G @ H1 @ B @ x)


def test_ffd_fails_where_a_transform_concentrates_the_vector_and_affd_does_not() -> None:
    """Schioppa 2024, theorem 3.1: with H x_1 = e_1 the squared norm is one squared normal."""
    x = torch.zeros(SIZE, dtype=torch.float64)
    probe = make("ffd")
    x[:64] = probe._chain.factors[0].adjoint(torch.eye(64, dtype=torch.float64)[:1], range(1))[0]
    spread = {}
    for kind in ("ffd", "affd"):
        squares = []
        for seed in range(100):
            sketch = make(kind, "fft", seed=seed) if kind == "affd" else make(kind, seed=seed)
            if kind == "ffd":  # the same transform for every seed: the adversary knows it
                x[:64] = sketch._chain.factors[0].adjoint(torch.eye(64, dtype=torch.float64)[:1], range(1))[0]
            squares.append(float(apply(sketch, x).square().sum()))
        spread[kind] = float(torch.tensor(squares).std())
    assert spread["ffd"] > 0.9  # a chi-square of one degree of freedom: sqrt 2
    assert spread["affd"] < 0.4


def test_pieces_of_the_transforms() -> None:
    assert factors(1 << 16) == [64, 32, 32]
    assert factors(2) == [2]
    assert factors(1 << 20) == [32] * 4
    H = hadamard(8)
    assert torch.allclose(H @ H.T, torch.eye(8, dtype=torch.float64))
    assert torch.equal(H, H.T)
    Q = haar(5, 12, 0, 1)
    assert torch.allclose(Q @ Q.T, torch.eye(5, dtype=torch.float64))
    for kind in PRECONDITIONERS:
        whole, cut = (spreading(kind, 128, rows, 0, 0) for rows in (128, 8))  # type: ignore[arg-type]
        x = normal(128)[None]
        assert torch.allclose(whole.forward(x).norm(), x.norm())
        assert torch.allclose(whole.adjoint(whole.forward(x)), x)
        assert torch.allclose(cut.forward(x), whole.forward(x)[:, :8])


@pytest.mark.parametrize(
    "values", [{"dimension": 100}, {"dimension": 0}, {"block": 3}, {"kind": "affd", "dimension": 64, "block": 32}]
)
def test_what_cannot_be_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="should be"):
        Sketch(SIZE, SketchSettings(**values))  # type: ignore[arg-type]


def test_indices_beyond_32_bits() -> None:
    """A slice of a vector of 1e11 entries: int64 arithmetic, and memory for D numbers and one batch."""
    size, start = 10**11, 99_999_990_000
    sketch = Sketch(size, SketchSettings(dimension=256))
    x = normal(5000).float()
    collection = sketch.begin(x.device)
    sketch.add(collection, x, [start], [5000])
    y = sketch.end(collection)
    assert 0.7 < y.norm() / x.norm() < 1.3
    out = torch.empty(5000)
    sketch.lift(y, out, [start], [5000])
    assert abs(torch.dot(out, x) - y.square().sum()) < 1e-5 * y.square().sum()


@pytest.mark.parametrize(
    ("kind", "preconditioner"), [("affd", "hadamard"), ("afjl", "fft"), ("qk", "haar"), ("ffd", "haar")]
)
def test_implicit_and_explicit_derivatives_agree(kind: str, preconditioner: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(7, 30), torch.nn.Tanh(), torch.nn.Linear(30, 3)).double()
    x, target = torch.randn(20, 7, dtype=torch.float64), torch.randint(3, (20,))
    batches, weights = [(x, target)], dict(model.named_parameters())

    def loss(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(torch.func.functional_call(model, parameters, (x,)), target)

    settings: dict[str, Any] = {"kind": kind, "preconditioner": preconditioner, "seed": 2}

    def of_model(m: torch.nn.Module, _: Any) -> torch.Tensor:
        return loss(dict(m.named_parameters()))

    explicit = hpc_hess.gradient_sketches(model, batches, of_model, dimension=32, **settings)
    operator = hpc_hess.hessian(model, batches, of_model, method="exact")
    sketch = Sketch(operator.shape[0], SketchSettings(dimension=32, **settings))
    theta0 = {name: weight.detach() for name, weight in weights.items()}
    gradient = implicit_gradient(loss, theta0, sketch, operator.layout)
    assert torch.allclose(gradient, torch.from_numpy(explicit[0]), atol=1e-10)
    v = normal(32, 4)
    product = hpc_hess.sketched(operator, 32, **settings) @ v
    assert torch.allclose(implicit_product(loss, theta0, v, sketch, operator.layout), product, atol=1e-8)
    values = hpc_hess.eigenpairs(hpc_hess.sketched(operator, 32, **settings), 1, which="largest").values
    dense = torch.stack([hpc_hess.sketched(operator, 32, **settings) @ e for e in torch.eye(32, dtype=torch.float64)])
    assert values[0] == pytest.approx(float(torch.linalg.eigvalsh(dense)[-1]), rel=1e-3)
