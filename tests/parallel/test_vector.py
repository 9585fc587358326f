"""Vectors and bases over 1 to 4 ranks, with empty shards and replicas, against one process."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hpc_hess.linalg.probes import fill, normals
from hpc_hess.parallel.basis import Basis
from hpc_hess.parallel.layout import Layout
from hpc_hess.parallel.vector import Vector, VectorSpace
from hpc_hess.parallel.world import World
from tests.support.sharded import assemble, from_global, send
from tests.support.spawn import run_ranks

# "wide" puts nothing on ranks 1 to 3 of 4, and alone leaves them wholly empty
TABLES: dict[str, dict[str, tuple[int, ...]]] = {
    "model": {"a": (13, 7), "experts": (3, 12, 5), "s": (), "tiny": (2, 3), "wide": (1, 9)},
    "one row": {"wide": (1, 40)},
}
VECTORS = 6


def _whole(number: int, size: int) -> torch.Tensor:
    return normals(1, number, 0, size, dtype=torch.float64)


def _work(world: World, table: str, dtype: torch.dtype) -> dict[str, Any]:
    """Everything a VectorSpace does, on this world."""
    dims = {"experts": 1} if table == "model" and world.shard_size > 1 else {}
    space = VectorSpace(world, Layout(TABLES[table], world.shard_size, dims), dtype)
    vectors = [from_global(space, _whole(k, space.size)) for k in range(VECTORS)]
    got: dict[str, Any] = {"local": space.size_local, "dots": [vectors[0].dot(v) for v in vectors]}
    got["norm"] = vectors[1].norm()
    axpy = vectors[0].copy().axpy_(-0.5, vectors[1]).scale_(3.0)
    got["axpy"] = send(axpy)
    basis = Basis(space, 4)
    w = vectors[5].copy()
    for j, v in enumerate(vectors[:5]):  # five vectors in a ring of four
        if j > 0:
            first = max(0, j - 4)
            basis.orthogonalise_(v, first, j)
        basis[j] = v.scale_(1.0 / v.norm())
    coefficients, remaining = basis.orthogonalise_(w, 1, 5)  # wraps around the ring
    got["coefficients"], got["remaining"] = coefficients.numpy(), remaining
    got["w"] = send(w)
    got["inner"] = [basis[j].dot(w) for j in range(1, 5)]
    got["window"] = basis.orthogonalise_(from_global(space, _whole(7, space.size)), 3, 5)[0].numpy()
    got["combined"] = send(basis.combine(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), first=2))
    probe = space.zeros()
    fill(probe.data, *space.shard.global_intervals, seed=4, probe=2, distribution="rademacher")
    got["probe"] = send(probe)
    return got


def _on_ranks(world: World, replicates: list[int]) -> list[list[dict[str, Any]]]:
    answers = []
    for replicate in replicates:
        world.make_mesh(replicate)
        answers.append([_work(world, *case) for case in _cases()])
    return answers


def _cases() -> list[tuple[str, torch.dtype]]:
    return [(table, dtype) for table in TABLES for dtype in (torch.float64, torch.float32)]


def _check(ranks: list[dict[str, Any]], alone: dict[str, Any], dtype: torch.dtype, shards: int) -> None:
    tolerance = 1e-13 if dtype == torch.float64 else 1e-6
    for key in ("dots", "norm", "coefficients", "remaining", "window"):
        for rank in ranks:  # scalars are bitwise the same on every rank
            np.testing.assert_array_equal(rank[key], ranks[0][key])
        scale = np.abs(alone[key]).max()
        np.testing.assert_allclose(ranks[0][key], alone[key], atol=tolerance * scale, err_msg=key)
    for rank in ranks:
        assert np.abs(rank["inner"]).max() < tolerance * 10
    for key in ("axpy", "w", "combined", "probe"):
        whole, expected = assemble([rank[key] for rank in ranks[:shards]]), assemble([alone[key]])
        exact = key in ("axpy", "probe")  # no reduction in them
        np.testing.assert_allclose(whole, expected, atol=0 if exact else 20 * tolerance, rtol=0, err_msg=key)
    for replica in range(1, len(ranks) // shards):
        for shard in range(shards):
            for key in ("axpy", "w", "combined", "probe"):
                for a, b in zip(ranks[shard][key], ranks[replica * shards + shard][key], strict=True):
                    np.testing.assert_array_equal(a, b, err_msg=f"{key} differs between replicas")


@pytest.mark.parametrize(("num_ranks", "replicates"), [(2, [1]), (3, [1]), (4, [1, 2])])
def test_any_number_of_ranks_equals_one_process(num_ranks: int, replicates: list[int]) -> None:
    """4 ranks also as 2 replicas of 2 shards."""
    answers = run_ranks(_on_ranks, num_ranks, replicates)
    for case, (table, dtype) in enumerate(_cases()):
        alone = _work(World.alone(), table, dtype)
        for place, replicate in enumerate(replicates):
            shards = num_ranks // replicate
            ranks = [answer[place][case] for answer in answers]
            _check(ranks, alone, dtype, shards)
            if table == "one row":
                assert [rank["local"] for rank in ranks] == ([40] + [0] * (shards - 1)) * replicate


def test_one_process_against_numpy() -> None:
    space = VectorSpace(World.alone(), Layout(TABLES["model"]), torch.float64)
    got = _work(World.alone(), "model", torch.float64)
    whole = [_whole(k, space.size).numpy() for k in range(VECTORS)]
    np.testing.assert_allclose(got["dots"], [whole[0] @ v for v in whole], rtol=1e-12)
    np.testing.assert_allclose(assemble([got["axpy"]]), 3 * (whole[0] - 0.5 * whole[1]), rtol=1e-12, atol=1e-12)
    # Gram-Schmidt in order with a window of four: vectors 1..4 come from a QR of 0..3, then of 1..4
    q: list[np.ndarray] = []
    for j in range(5):
        v = whole[j].copy()
        for _ in range(2):
            for u in q[max(0, j - 4) :]:
                v -= (u @ v) * u
        q.append(v / np.linalg.norm(v))
    window = np.array(q[1:5])
    np.testing.assert_allclose(got["coefficients"], window @ whole[5], atol=1e-12)
    rest = whole[5] - window.T @ (window @ whole[5])
    np.testing.assert_allclose(assemble([got["w"]]), rest, atol=1e-12)
    assert got["remaining"] == pytest.approx(np.linalg.norm(rest))
    np.testing.assert_allclose(assemble([got["combined"]]), q[2] - 2 * q[3] + 0.5 * q[4], atol=1e-12)


def test_a_window_wider_than_the_ring_is_refused() -> None:
    space = VectorSpace(World.alone(), Layout({"a": (5,)}), torch.float64)
    basis = Basis(space, 3)
    with pytest.raises(ValueError, match=r"vectors 1\.\.4 do not fit a basis of 3 rows"):
        basis.orthogonalise_(space.zeros(), 1, 5)
    with pytest.raises(ValueError, match=r"expected a local tensor of shape \(5,\), got \(4,\)"):
        space.wrap(torch.zeros(4))


def test_every_window_of_a_ring_in_order() -> None:
    """Coefficients come back in the order of the vectors, wherever the ring wraps."""
    space = VectorSpace(World.alone(), Layout({"a": (30,)}), torch.float64)
    basis = Basis(space, 5)
    frame = torch.linalg.qr(_whole(0, 900).reshape(30, 30))[0].T
    w = _whole(3, 30)
    for j in range(17):
        basis[j] = space.wrap(frame[j].contiguous())
        for first in range(max(0, j - 4), j + 1):
            coefficients, _ = basis.orthogonalise_(Vector(space, w.clone()), first, j + 1)
            torch.testing.assert_close(coefficients, frame[first : j + 1] @ w, rtol=1e-13, atol=1e-13)
            weights = torch.arange(1.0, j + 2 - first)
            expected = weights.double() @ frame[first : j + 1]
            torch.testing.assert_close(basis.combine(weights, first).data, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("concentrated", [False, True])
@pytest.mark.parametrize("along", [0.3, 100.0])
def test_float32_vectors_keep_float64_coefficients(concentrated: bool, along: float) -> None:
    """Long float32 vectors, also where the first pass cancels nearly all: alpha, beta and orthogonality."""
    size, generator = 1 << 20, torch.Generator().manual_seed(0)
    frame = torch.randn(4, size, generator=generator, dtype=torch.float64)
    if concentrated:  # as the dominant eigenvector of a language model: nearly all of it on a few hundred entries
        frame[0] *= 1e-4
        frame[0, 5000:5500] += 1
    frame = torch.linalg.qr(frame.T)[0].T.contiguous()
    space = VectorSpace(World.alone(), Layout({"a": (size,)}), torch.float32)
    basis = Basis(space, 4)
    for j, row in enumerate(frame):
        basis[j] = space.wrap(row.float())
    new = torch.randn(size, generator=generator, dtype=torch.float64)
    w = space.wrap((along * frame[0] + new / new.norm()).float())

    rows, exact = basis.rows.double(), w.data.double()
    expected = torch.zeros(4, dtype=torch.float64)
    norm = float(exact.norm())
    for _ in range(2):
        projected = rows @ exact
        exact, expected = exact - rows.T @ projected, expected + projected
    coefficients, remaining = basis.orthogonalise_(w, 0, 4)
    assert float((coefficients - expected).abs().max()) < 2e-8 * norm
    assert remaining == pytest.approx(float(exact.norm()), rel=1e-6)
    assert float((rows @ w.data.double()).abs().max()) < 1e-6 * remaining
