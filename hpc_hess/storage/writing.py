"""Basis rows on their way to the disk: written beside the program, durable on every rank when they are finished."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpc_hess.errors import HpcHessError
from hpc_hess.parallel.layout import Shard
from hpc_hess.parallel.world import World
from hpc_hess.storage.agree import explained, met
from hpc_hess.storage.background import Background
from hpc_hess.storage.build import sum_checksums
from hpc_hess.storage.checksum import partial_checksum
from hpc_hess.storage.drivers import Driver

Place = tuple[int, int]  # a probe and its row


class Writer:
    """Writes this rank's parts of rows to the file ``path``; with ``comm`` over MPI."""

    def __init__(self, path: Path, shard: Shard, world: World, comm: Any) -> None:
        self._path, self._shard, self._world, self._comm = path, shard, world, comm
        self._started: list[tuple[Place, Future[int]]] = []  # with the checksum of this rank's part
        self._background = Background(threads=comm is None or _may_write_beside())

    def start(self, driver: Driver | None, basis: int, place: Place, values: NDArray) -> None:
        """Begin a row of data set ``basis``; ``values`` must stay as they are. Without a driver nothing is written."""
        self._started.append((place, self._background.submit(self._put, driver, basis, place[1], values)))

    def _put(self, driver: Driver | None, basis: int, row: int, values: NDArray) -> int:
        """Write a part and return its checksum. Runs beside the program: no collectives."""
        if driver is None:
            return 0
        part = partial_checksum(values, *self._shard.file_intervals)
        driver.write_row(basis, row, np.ascontiguousarray(values))
        driver.push_rows()
        return part

    def finish(self, driver: Driver | None) -> list[tuple[Place, int]]:
        """Wait until all is durable on every rank; return places and checksums of whole rows. Collective: yes.

        Raises
        ------
        StoreError : it failed on some rank.

        """
        started, self._started = self._started, []
        if not started:
            return []
        name = "write a basis row"
        parts: list[int] = []
        error: HpcHessError | None = None
        with self._world.doing(name):
            for _, future in started:
                try:
                    parts.append(future.result())
                except Exception as caught:
                    parts.append(0)
                    error = error or explained(caught, self._path, name)
        with self._world.doing(name) if self._comm is None else met(self._world, name):
            try:
                if driver is not None:
                    driver.sync_rows()  # a collective with MPI: every rank comes here
            except Exception as caught:
                error = error or explained(caught, self._path, name)
        totals, failed = sum_checksums(self._world, parts, error is not None, name)
        if failed:
            self._world.raise_together(error, name)
        return [(place, total) for (place, _), total in zip(started, totals, strict=True)]

    def close(self, *, wait: bool = True) -> None:
        """Write nothing more; see Background.close."""
        self._background.close(wait=wait)


def _may_write_beside() -> bool:
    """Whether MPI allows calls from a thread that is not its first one, one at a time."""
    from mpi4py import MPI

    return MPI.Query_thread() >= MPI.THREAD_SERIALIZED
