"""Where a basis lies does not change what it computes: in memory, in panels from a disk, in bfloat16."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hpc_hess.linalg.lanczos import Lanczos, basis_rows
from hpc_hess.linalg.operator import diagonal
from hpc_hess.linalg.probes import normals
from hpc_hess.parallel import basis as basis_module
from hpc_hess.parallel.basis import Basis, BasisOnDisk
from hpc_hess.parallel.layout import Layout
from hpc_hess.parallel.vector import VectorSpace
from hpc_hess.parallel.world import World

SIZE = 150_001  # several blocks of a sweep, the last one short


class Disk:
    """Rows as a store keeps them; reads count, and a row that was not written is an error."""

    def __init__(self, capacity: int) -> None:
        self.rows: list[NDArray[Any] | None] = [None] * capacity
        self.reads: list[tuple[int, int, int]] = []

    def read(self, row: int, start: int, out: NDArray[Any]) -> None:
        kept = self.rows[row]
        assert kept is not None
        out[:] = kept[start : start + len(out)]
        self.reads.append((row, start, len(out)))

    def write(self, basis: Basis, index: int) -> None:
        self.rows[index % basis.capacity] = basis.stored(index).copy()


def make_space(dtype: torch.dtype, size: int = SIZE) -> VectorSpace:
    return VectorSpace(World.alone(), Layout({"a": (size,)}), dtype)


@pytest.mark.parametrize("reorthogonalise", ["full", 3, "none"])
@pytest.mark.parametrize(("dtype", "rows"), [("float32", None), ("float64", None), ("float32", "bfloat16")])
@pytest.mark.parametrize("panel_bytes", [1 << 16, 1 << 21, 1 << 30])
def test_a_basis_on_disk_gives_the_bits_of_one_in_memory(
    monkeypatch: pytest.MonkeyPatch, reorthogonalise: Any, dtype: str, rows: str | None, panel_bytes: int
) -> None:
    monkeypatch.setattr(basis_module, "PANEL_BYTES", panel_bytes)
    space = make_space(getattr(torch, dtype))
    kind = getattr(torch, rows) if rows else None
    operator = diagonal(space, space.wrap(normals(5, 0, 0, SIZE, dtype=space.dtype)))
    capacity, disk = basis_rows(reorthogonalise, 6), Disk(6)
    bases = Basis(space, capacity, dtype=kind), BasisOnDisk(space, capacity, disk.read, kind)
    processes = [Lanczos(operator, basis, 6, reorthogonalise) for basis in bases]
    for process in processes:
        process.start(space.wrap(normals(1, 0, 0, SIZE, dtype=space.dtype)))
    while not processes[0].finished:
        disk.write(bases[1], processes[1].step_count)
        for process in processes:
            process.step()
    assert processes[0].alpha == processes[1].alpha
    assert processes[0].beta == processes[1].beta
    if reorthogonalise == "full":
        weights = torch.linspace(-1, 1, 6, dtype=torch.float64)
        assert torch.equal(bases[0].combine(weights).data, bases[1].combine(weights).data)
        assert torch.equal(bases[0][2].data, bases[1][2].data)
        assert disk.reads


def test_memory_of_a_basis_on_disk_is_bounded() -> None:
    space = make_space(torch.float32, 1_000_000)
    basis = BasisOnDisk(space, 1000, Disk(1000).read)
    assert basis.rows.numel() == 1_000_000


def test_a_vector_that_is_not_in_memory_cannot_be_stored() -> None:
    space, disk = make_space(torch.float32, 10), Disk(4)
    basis = BasisOnDisk(space, 4, disk.read)
    for index in range(2):
        basis[index] = space.wrap(torch.full((10,), float(index)))
        disk.write(basis, index)
    with pytest.raises(KeyError, match="vector 0 is on disk"):
        basis.stored(0)
    assert basis[0].data.tolist() == [0.0] * 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_vectors_load_to_the_same_bits(dtype: torch.dtype) -> None:
    space = make_space(torch.float32, 1001)
    basis, other = Basis(space, 3, dtype=dtype), Basis(space, 3, dtype=dtype)
    basis[4] = space.wrap(normals(0, 0, 0, 1001, dtype=torch.float32))
    kept = basis.stored(4)
    assert kept.dtype == (np.uint16 if dtype == torch.bfloat16 else np.float32)
    other.load(4, kept.copy())
    assert torch.equal(other[4].data, basis[4].data)
    if dtype == torch.bfloat16:
        torch.testing.assert_close(basis[4].data, normals(0, 0, 0, 1001, dtype=torch.float32), rtol=2.0**-8, atol=0)
