"""Block-diagonal products and spectra, partitions and deflation, against dense matrices; on 1, 2 and 3 ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hpc_hess.errors import ConfigError
from hpc_hess.linalg.blockwise import block_product, block_samples, block_spectra, compare_exact, compare_sampled
from hpc_hess.linalg.deflation import Deflated, orthonormal
from hpc_hess.linalg.keeping import KeepNothing
from hpc_hess.parallel.basis import Basis
from hpc_hess.parallel.vector import VectorSpace
from hpc_hess.parallel.world import World
from hpc_hess.studies.block_diagonal.compute import stand_in
from hpc_hess.studies.block_diagonal.partition import partition
from tests.support.cut_matrix import SHAPES, SIZE, gathered, local, make_space, operator_of
from tests.support.spawn import run_ranks

COUNTS = {"layer": 4, "tensor": 7, "head": 5 + 3 + 3, "row": 5 + 1 + 6 + 1 + 3 + 4 + 1}


def symmetric() -> np.ndarray:
    a = np.random.default_rng(0).standard_normal((SIZE, SIZE))
    return a + a.T


def block_ids(space: VectorSpace, kind: str) -> np.ndarray:
    """Read the program's numbering off: a vector that is b + 1 in block b."""
    ones = local(space, np.ones(SIZE))
    blocks = partition(space, kind, 2)  # type: ignore[arg-type]
    return gathered(blocks.scaled(ones, torch.arange(1, blocks.count + 1, dtype=torch.float64))).round().astype(int) - 1


def expected_ids(kind: str) -> np.ndarray:
    keys: list[str] = []
    for name in sorted(SHAPES):
        layer = next((p for p in name.split(".") if p.isdigit()), name.removesuffix(".weight"))
        for index in np.ndindex(SHAPES[name]):
            key = layer if kind == "layer" else name
            if kind == "row" and len(index) > 1:
                key = f"{name} {index[0]}"
            if kind == "head" and "q_proj" in name:
                key = f"{name} {index[0] // 2}"
            if kind == "head" and "o_proj" in name:
                key = f"{name} {index[1] // 2}"
            keys.append(key)
    first = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return np.array([first[key] for key in keys])


def check(world: World) -> dict[str, list[float]]:
    space, matrix = make_space(world), symmetric()
    operator = operator_of(space, matrix)
    x = np.random.default_rng(1).standard_normal(SIZE)
    v, found = local(space, x), {}
    for kind in COUNTS:
        blocks = partition(space, kind, 2)  # type: ignore[arg-type]
        ids = block_ids(space, kind)
        same = ids[:, None] == ids[None, :]
        assert (same == (expected_ids(kind)[:, None] == expected_ids(kind)[None, :])).all()
        assert blocks.count == COUNTS[kind] == len(blocks.names)
        assert blocks.sizes == np.bincount(ids).tolist()
        inner = blocks.dots(v, local(space, matrix @ x)).numpy()
        np.testing.assert_allclose(inner, np.bincount(ids, x * (matrix @ x)), atol=1e-12)
        block = np.where(same, matrix, 0)
        exact = block_product(operator, blocks, v, 3)
        np.testing.assert_allclose(gathered(exact), block @ x, atol=1e-12)
        comparison = compare_exact(operator.matvec(v), exact, blocks.count)
        error = np.linalg.norm(block @ x - matrix @ x) / np.linalg.norm(matrix @ x)
        assert comparison.relative_error == pytest.approx(error)
        (sample,) = block_samples(operator, blocks, v, 0, [1])
        found[kind] = [comparison.relative_error, comparison.cosine, sample.norm()]
    blocks = partition(space, "layer", 2)
    parts = block_spectra(operator, blocks, Basis(space, 31), v, 31, KeepNothing(), 2)
    ids = block_ids(space, "layer")
    for number, part in enumerate(parts):  # more steps than entries: every eigenvalue, and an end in time
        eigenvalues = np.linalg.eigvalsh(matrix[np.ix_(ids == number, ids == number)])
        np.testing.assert_allclose(part.values, eigenvalues, atol=1e-8)
        assert part.weights.sum() == pytest.approx(1)
    return found


def test_against_dense_matrices_on_one_two_and_three_ranks() -> None:
    first = run_ranks(check, 1)[0]
    for ranks in (2, 3):
        for found in run_ranks(check, ranks):
            for kind, numbers in found.items():
                np.testing.assert_allclose(numbers, first[kind], rtol=1e-12)


@pytest.fixture(scope="module")
def space() -> VectorSpace:
    return make_space(World.alone())


def test_samples_are_unbiased_and_their_errors_are_true(space: VectorSpace) -> None:
    matrix, x = symmetric(), np.random.default_rng(1).standard_normal(SIZE)
    operator, v = operator_of(space, matrix), local(space, x)
    blocks = partition(space, "row", 2)
    ids = block_ids(space, "row")
    block = np.where(ids[:, None] == ids[None, :], matrix, 0)
    true = np.linalg.norm(block @ x - matrix @ x) / np.linalg.norm(matrix @ x)
    image, samples = operator.matvec(v), Basis(space, 12)
    errors, stated = [], []
    mean = np.zeros(SIZE)
    for repetition in range(60):
        for k, sample in enumerate(block_samples(operator, blocks, v, 7 + repetition, range(12))):
            samples[k] = sample
            mean += gathered(sample) / 720
        comparison = compare_sampled(image, samples, 12)
        errors.append(comparison.relative_error - true)
        stated.append(comparison.relative_error_stderr)
    assert abs(np.mean(errors)) < 4 * np.std(errors) / np.sqrt(60) + 0.01
    assert 0.6 < np.std(errors) / np.mean(stated) < 1.6
    off = np.sqrt(((matrix - block) ** 2 @ x**2) / 720)  # standard error of each entry's mean
    assert np.mean(np.abs(mean - block @ x) < 3 * off) > 0.95


def test_no_heads_known(space: VectorSpace) -> None:
    with pytest.raises(ConfigError, match="knows no projection of attention heads"):
        partition(space, "head", 0)


def test_deflation_leaves_the_other_eigenvalues(space: VectorSpace) -> None:
    matrix = symmetric()
    values, vectors = np.linalg.eigh(matrix)
    known = Basis(space, 3)
    taken = [local(space, vectors[:, k].copy()) for k in (0, SIZE - 1)]
    count = orthonormal(known, [*taken, taken[0]])  # a copy is no new direction
    assert count == 2
    deflated = Deflated(operator_of(space, matrix), known, count)
    dense = np.stack([gathered(deflated.matvec(local(space, column))) for column in np.eye(SIZE)])
    expected = np.sort(np.r_[values[1:-1], 0, 0])
    np.testing.assert_allclose(np.linalg.eigvalsh(dense), expected, atol=1e-10)


def test_one_block_for_the_whole() -> None:
    top = np.array([10.0, 6.0, 2.0, -1.0])
    assert stand_in(top / 4, top) == {"scale": pytest.approx(4), "top_error": pytest.approx(0), "top_count": 3}
    worse = stand_in(np.array([5.0, 5.0, 1.0]), top)
    scale = (50 + 30 + 2) / 51
    assert worse["scale"] == pytest.approx(scale)
    assert worse["top_error"] == pytest.approx((abs(5 * scale - 10) + abs(5 * scale - 6) + abs(scale - 2)) / 18)
    assert stand_in(np.array([-1.0]), top)["top_error"] == 1.0
