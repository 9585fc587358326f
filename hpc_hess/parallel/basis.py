"""Basis: my shards of several vectors, in memory or on disk. Reductions happen here, so algorithms see none."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hpc_hess.parallel import kernels
from hpc_hess.parallel.vector import Vector, VectorSpace

PANEL_BYTES = 256 << 20  # of a basis on disk: one panel is swept while the next is read
Panel = tuple[slice, torch.Tensor]  # columns, and the rows there
RowReader = Callable[[int, int, NDArray[Any]], None]  # (row, start, out): entries from start on into out, on any thread


def _bits(row: torch.Tensor) -> NDArray[Any]:
    """Return the same memory as NumPy knows it, which has no bfloat16."""
    return row.view(torch.int16).numpy().view(np.uint16) if row.dtype == torch.bfloat16 else row.numpy()


def _aligned(count: int, width: int, dtype: torch.dtype, device: torch.device | None = None) -> torch.Tensor:
    """Return ``count`` rows, each beginning at a cache line: products of unaligned rows round otherwise."""
    line = 64 // dtype.itemsize
    return torch.empty((count, -(-width // line) * line), dtype=dtype, device=device)[:, :width]


class Basis:
    """Up to ``capacity`` vectors of a space, kept as a ring: vector j lies in row j % capacity.

    Parameters
    ----------
    device : where the rows lie; the space's own device unless given.
    dtype : of the rows; bfloat16 takes half the memory of float32 and rounds every vector to 8 bits of mantissa.

    """

    def __init__(
        self, space: VectorSpace, capacity: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        self.space, self.capacity, self.dtype = space, capacity, dtype or space.dtype
        self.rows = self._allocate(device or space.device)

    def _allocate(self, device: torch.device) -> torch.Tensor:
        return _aligned(self.capacity, self.space.size_local, self.dtype, device)

    def __getitem__(self, index: int) -> Vector:
        """Return vector ``index`` (a view where the row has the vectors' device and dtype)."""
        return Vector(self.space, self._row(index).to(self.space.device, self.space.dtype))

    def __setitem__(self, index: int, vector: Vector) -> None:
        self._row(index).copy_(vector.data)

    def _row(self, index: int) -> torch.Tensor:
        return self.rows[index % self.capacity]

    def stored(self, index: int) -> NDArray[Any]:
        """Return vector ``index`` as a store keeps it: this rank's part, bfloat16 as its bits (uint16)."""
        return _bits(self._row(index).cpu())

    def load(self, index: int, values: NDArray[Any]) -> None:
        """Set vector ``index`` to what :meth:`stored` gave."""
        row = torch.from_numpy(values.view(np.int16)) if self.dtype == torch.bfloat16 else torch.from_numpy(values)
        self._row(index).copy_(row.view(self.dtype))

    def _order(self, first: int, stop: int) -> list[int]:
        """Return vectors first..stop-1 in the order of their rows."""
        if stop - first > self.capacity:
            raise ValueError(f"vectors {first}..{stop - 1} do not fit a basis of {self.capacity} rows")
        return sorted(range(first, stop), key=lambda j: j % self.capacity)

    def _panels(self, vectors: list[int]) -> Iterator[Panel]:
        """Yield the rows of ``vectors``, in that order, panel by panel of columns."""
        rows = [j % self.capacity for j in vectors]
        together = rows == list(range(rows[0], rows[-1] + 1))
        yield slice(None), self.rows[rows[0] : rows[-1] + 1] if together else self.rows[rows]

    def orthogonalise_(self, w: Vector, first: int, stop: int) -> tuple[torch.Tensor, float]:
        """Make ``w`` orthogonal to vectors first..stop-1 in place, by classical Gram-Schmidt with two passes.

        Returns the summed coefficients <v_j, w> in the order first..stop-1 (float64, CPU) and the norm of what is left.
        Three all-reduces whatever the number of vectors. Collective: yes. (Giraud, Langou, Rozloznik, "The loss of
        orthogonality in the Gram-Schmidt orthogonalization process", 2005: twice is enough.)
        """
        order = self._order(first, stop)

        def sweep(kernel: Callable[..., torch.Tensor], count: int, name: str, *arguments: torch.Tensor) -> torch.Tensor:
            total = torch.zeros(count, dtype=torch.float64, device=w.data.device)
            for columns, rows in self._panels(order):
                kernel(rows, w.data[columns], *arguments, total=total)
            return self.space.sum(total, name)

        with self.space.world.timers.phase("orthogonalisation"):
            c1 = sweep(kernels.project, len(order), "first projection")
            c1 = c1.to(self.space.dtype).double()  # what is subtracted, so that the sum below is <v_j, w>
            c2 = sweep(kernels.subtract_then_project, len(order), "second projection", c1)
            square = sweep(kernels.subtract_then_square, 1, "norm", c2)
        total = (c1 + c2).cpu()
        coefficients = torch.empty_like(total)
        coefficients[[j - first for j in order]] = total
        return coefficients, math.sqrt(float(square))

    def combine(self, coefficients: torch.Tensor, first: int = 0) -> Vector:
        """Return sum_j coefficients[j] v_(first + j), as a Ritz vector needs. Local."""
        order = self._order(first, first + len(coefficients))
        out = self.space.zeros()
        weights = coefficients.double()[[j - first for j in order]].to(out.data.device)
        for columns, rows in self._panels(order):
            kernels.combine(rows, weights, out.data[columns])
        return out

    def dots(self, w: Vector, stop: int) -> torch.Tensor:
        """Return <v_j, w> of vectors 0..stop-1, which lie in order (float64, CPU). One all-reduce. Collective: yes."""
        total = torch.zeros(stop, dtype=torch.float64, device=w.data.device)
        for columns, rows in self._panels(list(range(stop))):
            kernels.project(rows, w.data[columns], total=total)
        return self.space.sum(total, "projection").cpu()

    def rotate_(self, matrix: torch.Tensor) -> None:
        """Replace the first k vectors by matrix (k, m; float64) times the first m, in place. Local; in memory only."""
        kernels.rotate_(self.rows, matrix.to(self.rows.device))


class BasisOnDisk(Basis):
    """A basis whose rows are read back from where they were written, a panel of columns at a time.

    In memory there are the newest vector and two panels: while one is swept, the next is being read. A vector must be on
    disk before a newer one is set. Sums are those of a basis in memory, to the last bit.
    """

    def __init__(self, space: VectorSpace, capacity: int, read: RowReader, dtype: torch.dtype | None = None) -> None:
        super().__init__(space, capacity, torch.device("cpu"), dtype)
        self._read, self._newest = read, -1
        self._buffers: list[torch.Tensor] = []

    def _allocate(self, device: torch.device) -> torch.Tensor:
        return torch.empty(self.space.size_local, dtype=self.dtype, device=device)

    def _row(self, index: int) -> torch.Tensor:
        if index != self._newest:
            raise KeyError(f"vector {index} is on disk; {self._newest} is in memory")
        return self.rows

    def __setitem__(self, index: int, vector: Vector) -> None:
        self._newest = index
        super().__setitem__(index, vector)

    def __getitem__(self, index: int) -> Vector:
        """Return vector ``index``, read from the disk unless it is the newest."""
        if index == self._newest:
            return super().__getitem__(index)
        row = torch.empty_like(self.rows)
        self._read(index % self.capacity, 0, _bits(row))
        return Vector(self.space, row.to(self.space.device, self.space.dtype))

    def load(self, index: int, values: NDArray[Any]) -> None:
        """Set the newest vector; older ones are where they were written."""
        self._newest = max(self._newest, index)
        if index == self._newest:
            super().load(index, values)

    def _panels(self, vectors: list[int]) -> Iterator[Panel]:
        size, count = self.space.size_local, len(vectors)
        block = kernels.sweep_width(count, {self.dtype, self.space.dtype}, self.space.device)
        width = max(block, PANEL_BYTES // (count * self.rows.element_size()) // block * block)
        width = min(width, size)
        if [buffer.shape for buffer in self._buffers] != [(count, width)] * 2:
            self._buffers.clear()
            self._buffers += (_aligned(count, width, self.dtype) for _ in range(2))

        def read(number: int) -> Panel:
            columns = slice(number * width, min((number + 1) * width, size))
            panel = self._buffers[number % 2][:, : columns.stop - columns.start]
            for row, vector in zip(panel, vectors, strict=True):
                if vector == self._newest:
                    row.copy_(self.rows[columns])
                else:
                    self._read(vector % self.capacity, columns.start, _bits(row))
            return columns, panel

        with ThreadPoolExecutor(1, thread_name_prefix="basis") as reader:
            numbers = range(-(-size // max(width, 1)))
            ahead = [reader.submit(read, number) for number in numbers[:1]]
            for number in numbers:
                columns, panel = ahead.pop().result()
                if number + 1 in numbers:
                    ahead.append(reader.submit(read, number + 1))
                yield columns, panel
