"""The two ways the data of one logical file reach a disk: one file over MPI, or one file a rank.

Both hold Dataset objects as long as they are open (an error while a temporary one is destroyed would be lost) and
change no metadata. ``sync`` makes what was written durable: HDF5's flush over MPI is collective and syncs; the serial
one does not, so the descriptor is synced. Rows are written independently by each rank, small data by the head rank.
Rows may be written, pushed and read from another thread: h5py lets one call at a time into HDF5.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np
from numpy.typing import NDArray

from hpc_hess.errors import StoreError
from hpc_hess.parallel.layout import Shard
from hpc_hess.parallel.world import World
from hpc_hess.storage.blocks import Block, bounded, clipped, read_blocks, write_blocks
from hpc_hess.storage.disk import give_back
from hpc_hess.storage.schema import Schema, blocks_of_file, open_file, open_rank_file
from hpc_hess.system import drop_pages

_LARGE = 16 << 20  # bytes of a rank's row from which its pages are dropped once they are on disk


class SmallData:
    """The small data sets of an open krylov.h5."""

    def __init__(self, file: h5py.File, schema: Schema) -> None:
        self._sets = {
            (key, k): file[f"probes/{k}/{key}"] for k in range(schema.probes) for key in ("alpha", "beta", "checksum")
        }
        self._sets["commit", -1], self._sets["extra", -1] = file["commit"], file["extra"]

    def put(self, name: str, probe: int, start: int, values: NDArray) -> None:
        """Write consecutive entries of a probe's alpha, beta or checksum. Call sync to make them durable."""
        if len(values):
            self._sets[name, probe][start : start + len(values)] = values

    def put_slot(self, name: str, slot: int, data: bytes) -> None:
        """Write the beginning of a slot of "commit" or "extra"."""
        if data:
            self._sets[name, -1][slot, : len(data)] = np.frombuffer(data, np.uint8)


class Driver(Protocol):
    """An open store, as one rank sees it."""

    small: SmallData | None  # on the head rank only

    def write_row(self, basis: int, row: int, values: NDArray) -> None:
        """Write this rank's part of a row. Collective: no."""

    def push_rows(self) -> None:
        """Have the system write rows to the disk now, so that sync_rows finds little to do. Collective: no."""

    def read_row(self, basis: int, row: int, out: NDArray, start: int = 0) -> None:
        """Read this rank's part of a row, its entries start..start+len(out)-1. Collective: no."""

    def give_back(self, rows: Iterable[tuple[int, int]]) -> None:
        """Free the disk space of whole rows (basis, row), which then read as zeros. Collective: no."""

    def sync_rows(self) -> None:
        """Make rows durable. Collective over the ranks of replica 0 with MPI."""

    def sync_small(self) -> None:
        """Make small data durable. Collective over the ranks of replica 0 with MPI."""

    def close(self) -> None:
        """Close all files. Collective over the ranks of replica 0 with MPI."""


class _Rows:
    """Rows of open basis data sets (none on a rank that owns nothing), moved in bounded calls."""

    def __init__(self, path: Path, bases: list[Any], blocks: list[Block], itemsize: int, *, owner: bool) -> None:
        self._bases, self._blocks = bases, bounded(blocks, itemsize)
        self._written: list[tuple[int, int]] = []
        self._path, self._owner = path, owner
        self._large = sum(b.size for b in blocks) * itemsize >= _LARGE
        self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def write_row(self, basis: int, row: int, values: NDArray) -> None:
        """Write this rank's part of a row. Collective: no."""
        if self._bases:
            write_blocks(self._bases[basis], row, self._blocks, values)
            self._written.append((basis, row))

    def push_rows(self) -> None:
        """Have the system write rows to the disk now. Collective: no."""
        os.fsync(self._handle)

    def read_row(self, basis: int, row: int, out: NDArray, start: int = 0) -> None:
        """Read this rank's part of a row, its entries start..start+len(out)-1. Collective: no."""
        if self._bases:
            read_blocks(self._bases[basis], row, clipped(self._blocks, start, start + len(out)), out)

    def give_back(self, rows: Iterable[tuple[int, int]]) -> None:
        """Free the disk space of whole rows (basis, row), which then read as zeros. Collective: no."""
        if not self._owner or not self._bases:
            return
        length = self._bases[0].shape[1] * self._bases[0].dtype.itemsize
        give_back(self._path, ((self._bases[basis].id.get_offset() + row * length, length) for basis, row in rows))

    def _forget(self) -> None:
        """Drop the pages of large rows that are on disk from memory, which the model needs more than the basis does.

        The next row reuses them: on a machine with little free memory it is then written several times faster.
        """
        for basis, row in self._written if self._large else ():
            dataset = self._bases[basis]
            first, last = self._blocks[0], self._blocks[-1]
            size = dataset.dtype.itemsize
            start = dataset.id.get_offset() + (row * dataset.shape[1] + first.start) * size
            length = (last.start + (last.count - 1) * last.stride + last.length - first.start) * size
            drop_pages(self._handle, start, length)
        self._written.clear()

    def _close_handle(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


class OneFile(_Rows):
    """krylov.h5 holds everything: opened by all ranks over MPI, or by a single process without it."""

    def __init__(self, path: Path, schema: Schema, shard: Shard, comm: Any) -> None:
        self._comm = comm
        self._file: Any = open_file(path, "r+", comm)
        bases = [self._file[f"probes/{k}/basis"] for k in range(schema.bases)]
        self._small = SmallData(self._file, schema)  # with MPI every rank opens the same data sets, in the same order
        self.small = self._small if shard.index == 0 else None
        blocks = blocks_of_file(schema, shard.file_intervals, shard.size)
        super().__init__(path, bases, blocks, schema.numpy_dtype.itemsize, owner=shard.index == 0)

    def sync_rows(self) -> None:
        """Flush and sync. Collective over the communicator."""
        self.sync_small()
        self._forget()

    def sync_small(self) -> None:
        """Flush and sync. Collective over the communicator."""
        self._file.flush()
        if self._comm is None:
            os.fsync(self._file.id.get_vfd_handle())

    def close(self) -> None:
        """Close the file. Collective over the communicator."""
        self._close_handle()
        self._file.close()


class RankFiles(_Rows):
    """One file a rank for its part of the basis; the head rank holds krylov.h5 with the small data as well."""

    def __init__(self, path: Path, schema: Schema, shard: Shard) -> None:
        self.small: SmallData | None = None
        self._master: Any = None
        self._file: Any = open_rank_file(path.parent, schema, shard.index, shard.size, "r+")
        bases = [self._file[f"basis/{k}"] for k in range(schema.bases if shard.size and schema.rows else 0)]
        blocks = blocks_of_file(schema, shard.file_intervals, shard.size)
        file = schema.rank_file(path.parent, shard.index)
        super().__init__(file, bases, blocks, schema.numpy_dtype.itemsize, owner=True)
        if shard.index == 0:
            try:
                self._master = open_file(path, "r+")
                self.small = SmallData(self._master, schema)
            except BaseException:
                self.close()
                raise

    def sync_rows(self) -> None:
        """Flush and sync this rank's file. Collective: no."""
        _sync(self._file)
        self._forget()

    def sync_small(self) -> None:
        """Flush and sync krylov.h5 on the head rank. Collective: no."""
        if self._master is not None:
            _sync(self._master)

    def close(self) -> None:
        """Close this rank's files. Collective: no."""
        self._close_handle()
        self._file.close()
        if self._master is not None:
            self._master.close()


def _sync(file: h5py.File) -> None:
    file.flush()
    os.fsync(file.id.get_vfd_handle())


def has_parallel_hdf5() -> bool:
    """Return whether h5py was built against parallel HDF5."""
    return bool(h5py.get_config().mpi)


def choose_driver(wanted: str, world: World, stored: str | None = None) -> str:
    """Return "mpio" or "files" for this job; "auto" keeps what a store has where the job can write it.

    Raises
    ------
    StoreError : "mpio" asked for where it cannot work.

    """
    possible = world.mpi is not None and has_parallel_hdf5()
    if wanted == "mpio" and not possible:
        remedy = (
            "start with mpirun or srun --mpi=pmix and install mpi4py"
            if has_parallel_hdf5()
            else "install h5py built with MPI (HDF5_MPI=ON CC=mpicc pip install --no-binary=h5py h5py)"
        )
        raise StoreError(f'store.driver = "mpio" cannot work here: {remedy}, or set store.driver = "files"')
    if wanted == "auto":
        one_process = world.size == 1 and stored == "mpio"  # one process can write the one file without MPI
        if stored == "files" or (not possible and not one_process):
            return "files"
        return "mpio"
    return wanted


def open_driver(path: Path, schema: Schema, shard: Shard, comm: Any) -> Driver:
    """Open the store at ``path`` for reading and writing. Collective over ``comm`` with MPI."""
    if schema.driver == "mpio":
        return OneFile(path, schema, shard, comm)
    return RankFiles(path, schema, shard)
