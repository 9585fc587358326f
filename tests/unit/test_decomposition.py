"""Class structure of G against dense sums of outer products in float64; of a language model on 1 and 2 ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from hpc_hess.api.classifiers import Batch, decompose
from hpc_hess.config import make_config
from hpc_hess.console.progress import Progress
from hpc_hess.curvature.decomposition import Difference, Pullback, class_means, cross_class, most_frequent, weights
from hpc_hess.errors import DataError
from hpc_hess.linalg.operator import LinearOperator
from hpc_hess.model.sharded.gradient import Gradient
from hpc_hess.parallel.basis import Basis
from hpc_hess.parallel.world import World
from hpc_hess.session.operators import exact_operator
from hpc_hess.session.problem import load_problem
from tests.support.spawn import run_ranks
from tests.support.toys import toy_directory

CLASSES = 3


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES)).double()


def data() -> list[Batch]:
    """Two batches of different sizes, classes far from balanced."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(17, 4, generator=generator, dtype=torch.float64)
    y = torch.tensor([0] * 9 + [1] * 2 + [2] * 6)
    order = torch.randperm(17, generator=generator)
    x, y = x[order], y[order]
    return [(x[:11], y[:11]), (x[11:], y[11:])]


def pulled(model: nn.Module, x: torch.Tensor, u: torch.Tensor) -> np.ndarray:
    """J^T u of one example, in the global index."""
    parameters = [p for _, p in sorted(model.named_parameters())]
    return torch.cat([g.flatten() for g in torch.autograd.grad(model(x[None])[0], parameters, u)]).numpy()


def dense_parts(model: nn.Module, batches: list[Batch]) -> dict[str, np.ndarray]:
    """The definitions, term by term (papers.md, section 5): weights p, vectors g, and their means over groups."""
    xs, ys = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    n = len(xs)
    g: dict[tuple[int, int], list[tuple[float, np.ndarray]]] = {(c, k): [] for c in range(CLASSES) for k in range(CLASSES)}
    for x, y in zip(xs, ys.tolist(), strict=True):
        p = model(x[None])[0].softmax(-1).detach()
        for k in range(CLASSES):
            g[y, k].append((float(p[k]) / n, pulled(model, x, p - torch.eye(CLASSES, dtype=torch.float64)[k])))
    weight = {pair: sum(w for w, _ in terms) for pair, terms in g.items()}
    mean = {pair: sum(w * v for w, v in terms) / weight[pair] for pair, terms in g.items()}
    parts = dict.fromkeys(("g", "a1", "a2", "b1"), 0.0)
    for c in range(CLASSES):
        others = [k for k in range(CLASSES) if k != c]
        total = sum(weight[c, k] for k in others)
        centre = sum(weight[c, k] * mean[c, k] for k in others) / total
        parts["a1"] = parts["a1"] + total * np.outer(centre, centre)
        parts["a2"] = parts["a2"] + weight[c, c] * np.outer(mean[c, c], mean[c, c])
        for k in others:
            parts["b1"] = parts["b1"] + weight[c, k] * np.outer(mean[c, k] - centre, mean[c, k] - centre)
        for terms in (g[c, k] for k in range(CLASSES)):
            parts["g"] = parts["g"] + sum(w * np.outer(v, v) for w, v in terms)
    return {name: np.asarray(part) for name, part in parts.items()}


def dense(operator: LinearOperator) -> np.ndarray:
    space = operator.space
    columns = torch.eye(space.size, dtype=torch.float64)
    return np.stack([operator.matvec(space.wrap(column.clone())).data.numpy() for column in columns])


def test_a_classifier_against_the_definitions() -> None:
    model, batches = classifier(), data()
    parts, wanted = decompose(model, batches, CLASSES), dense_parts(model, batches)
    scale = np.abs(wanted["g"]).max()
    g = dense(parts.gauss_newton)
    for found, name in ((g, "g"), (dense(parts.means.a1), "a1"), (dense(parts.means.a2), "a2"), (dense(parts.cross), "b1")):
        np.testing.assert_allclose(found, wanted[name], atol=1e-12 * scale)
    np.testing.assert_allclose(dense(parts.without_means), g - wanted["a1"] - wanted["a2"], atol=1e-12 * scale)
    within = dense(parts.within)
    assert np.linalg.eigvalsh(within)[0] > -1e-12 * scale  # a sum of covariances
    assert np.trace(within) > 1e-3 * np.trace(g)  # and there is one
    top = np.linalg.eigvalsh(wanted["a1"])[-CLASSES:]
    np.testing.assert_allclose(parts.means.a1.eigenvalues(), top, atol=1e-12 * scale)
    rows = np.stack([parts.means.a1.basis[c].data.numpy() for c in range(CLASSES)])
    q = np.linalg.qr(rows.T)[0]
    outside = np.eye(len(g)) - q @ q.T
    np.testing.assert_allclose(dense(parts.knocked_out), outside @ g @ outside, atol=1e-12 * scale)
    h = dense(parts.hessian)
    np.testing.assert_allclose(dense(parts.residual), h - g, atol=1e-12)
    assert parts.means.pairs.sum() == pytest.approx(1)


def test_wrong_classes() -> None:
    with pytest.raises(DataError, match="batch 0 has class numbers outside 0 to 1: count the classes again"):
        decompose(classifier(), data(), 2)
    with pytest.raises(DataError, match="there are no examples"):
        decompose(classifier(), [], 2)


def test_the_most_frequent_tokens() -> None:
    groups, order = most_frequent(np.array([3, 0, 9, 1, 9]), 3)
    assert order == [2, 4, 0]
    assert groups.of.tolist() == [2, 3, 0, 3, 1]
    assert groups.count == 4


def language_model(world: World, toy: Path) -> dict[str, list[float]]:
    """A toy Llama: quadratic forms of every part with one vector, eigenvalues, and G's own."""
    config = make_config(
        {
            "model": {"source": str(toy / "model"), "master_dtype": "float64", "compute_dtype": "float64"},
            "parameters": {"include": ["model.norm.weight", "model.layers.1.self_attn.k_proj.weight"]},
            "data": {"source": f"tokens:{toy / 'tokens.npy'}", "sequence_length": 12, "sequences": 4},
            "operator": {"method": "exact", "kind": "gauss_newton"},
        }
    )
    world.make_mesh(1)
    problem = load_problem(config, world, Progress(0))
    space, objective = problem.model.space, problem.objective
    counts = np.bincount(problem.samples.input_ids[:, 1:].flatten().numpy(), minlength=96)
    groups, _ = most_frequent(counts, 2)

    def pull(cotangent):  # type: ignore[no-untyped-def]
        return Gradient(problem.model, Pullback(objective, cotangent))()[1]

    pairs = weights(objective, problem.model.module, groups, lambda sums: world.sum_over_ranks(sums, "weights"))
    rows = Basis(space, groups.count)
    means = class_means(pull, groups, pairs, rows)
    cross = cross_class(pull, groups, means, rows, Basis(space, 6))
    g = exact_operator(config, problem)
    within = Difference(Difference(g, means.both), cross)
    v = pull(groups.pair(0, 1))
    v.scale_(1 / v.norm())
    forms = [v.dot(part.matvec(v)) for part in (g, means.a1, means.a2, cross, within)]
    return {
        "forms": forms,
        "a1": means.a1.eigenvalues().tolist(),
        "pairs": pairs.flatten().tolist(),
        "sum": [g.matvec(v).axpy_(-1.0, _sum(means, cross, within, v)).norm()],
    }


def _sum(means, cross, within, v):  # type: ignore[no-untyped-def]
    total = means.both.matvec(v)
    return total.axpy_(1.0, cross.matvec(v)).axpy_(1.0, within.matvec(v))


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    toy_directory("llama", folder / "model")
    np.save(folder / "tokens.npy", np.random.default_rng(0).integers(3, 10, size=300))
    return folder


def test_a_language_model_on_one_and_two_ranks(toy: Path) -> None:
    one = run_ranks(language_model, 1, toy)[0]
    forms = np.array(one["forms"])
    assert forms[0] == pytest.approx(forms[1:].sum())
    assert (forms > 0).all()  # every part is positive semidefinite, and this vector is in none's kernel
    assert one["sum"][0] < 1e-12
    assert sum(one["pairs"]) == pytest.approx(1)
    for found in run_ranks(language_model, 2, toy):
        for key in ("forms", "a1", "pairs"):
            np.testing.assert_allclose(found[key], one[key], rtol=1e-9, atol=1e-14)
