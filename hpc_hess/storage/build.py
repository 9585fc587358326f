"""Create a store, or a new generation of one, aside; copy the rows that are needed; rename it into place.

Whatever instant a job is killed at, krylov.h5 is the old store, the new one, or absent, and always whole. What an
interrupted job left beside it is unreferenced and swept away by the next one, under the lock.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hpc_hess.errors import HpcHessError, StoreError
from hpc_hess.parallel.layout import Layout, Shard
from hpc_hess.parallel.world import World
from hpc_hess.storage.agree import attempt
from hpc_hess.storage.blocks import bounded, overlaps, read_blocks, regular_blocks
from hpc_hess.storage.checksum import combine, partial_checksum
from hpc_hess.storage.commit import Ledger
from hpc_hess.storage.disk import (
    SAVE_SPACE,
    damaged_row,
    not_allocated,
    remove,
    rename_durably,
    require_space,
    reserve,
    sync_directory,
)
from hpc_hess.storage.drivers import open_driver
from hpc_hess.storage.schema import (
    FILE,
    RANKS,
    TEMPORARY,
    Header,
    Schema,
    create_master,
    create_rank_file,
    open_file,
    open_rank_file,
    read_header,
)


def sweep(run_dir: Path, keep_generation: str) -> None:
    """Remove what interrupted jobs left in ``run_dir``. Only under its lock. Collective: no."""
    remove(run_dir / TEMPORARY)
    ranks = run_dir / RANKS
    for path in ranks.iterdir() if ranks.is_dir() else ():
        if path.name != keep_generation:
            remove(path)
    if ranks.is_dir() and not keep_generation:
        ranks.rmdir()


def sum_checksums(world: World, parts: list[int], failed: bool, name: str) -> tuple[list[int], bool]:
    """Return (each row's checksum from all ranks' parts, whether any rank failed). Collective: yes, one reduction."""
    # halves of 32 bits: their sums fit int64, and integer sums do not depend on the order
    halves = [half for part in parts for half in (part & 0xFFFFFFFF, part >> 32)]
    values = torch.tensor([*halves, int(failed)], dtype=torch.int64)
    *sums, failures = world.sum_over_shards(values, name).tolist()
    return [combine([low, high << 32]) for low, high in zip(sums[::2], sums[1::2], strict=True)], failures > 0


class RowSource:
    """Rows of a store that is being replaced, read by the ranks of the new one whatever the old layout was."""

    def __init__(self, run_dir: Path, header: Header, shard: Shard) -> None:
        self._schema = schema = header.schema
        itemsize = schema.numpy_dtype.itemsize
        self._files: list[Any] = []
        self._parts: list[tuple[Any, list[tuple[int, int, int]]]] = []
        try:
            if schema.driver == "mpio":
                self._files.append(open_file(run_dir / FILE, "r"))
                self._blocks = bounded(regular_blocks(*shard.file_intervals), itemsize)
                return
            layout = header.stored_layout()
            for rank in range(schema.num_shards):
                theirs = layout.shard(rank)
                segments = overlaps(shard.file_intervals, theirs.file_intervals)
                if segments:
                    file = open_rank_file(run_dir, schema, rank, theirs.size, "r")
                    self._files.append(file)
                    self._parts.append((file, segments))
        except BaseException:
            self.close()
            raise

    def read_row(self, probe: int, row: int, out: NDArray) -> None:
        """Read this rank's part (of the new layout) of a row. Collective: no."""
        basis = self._schema.basis_index(probe)
        if self._schema.driver == "mpio":
            read_blocks(self._files[0][f"probes/{basis}/basis"], row, self._blocks, out)
            return
        for file, segments in self._parts:
            dataset = file[f"basis/{basis}"]
            for here, there, length in segments:
                dataset.read_direct(out, np.s_[row, there : there + length], np.s_[here : here + length])

    def close(self) -> None:
        """Close all files. Collective: no."""
        for file in self._files:
            file.close()


def build(
    run_dir: Path,
    schema: Schema,
    *,
    layout: Layout,
    shard: Shard,
    world: World,
    comm: Any,
    attributes: dict[str, Any],
    ledger: Ledger,
    source: Header | None = None,
    rows: list[tuple[int, int]] | None = None,
    save_space: str = SAVE_SPACE,
) -> None:
    """Create the store that ``schema`` describes, filled from ``ledger`` and ``rows`` of ``source``. Collective: yes.

    Raises
    ------
    StoreError : no space, not writable, or a row of ``source`` is damaged. Nothing is left behind then.
    CollectiveError : a rank died. Once krylov.h5 is this store, the store stays.

    """
    head, active, name = world.rank == 0, world.replica == 0, "create the store"
    temporary = run_dir / TEMPORARY
    try:
        with attempt(world, run_dir, name):
            if head:
                require_space(run_dir, schema.basis_bytes + _small_bytes(schema), save_space)
                if schema.driver == "files":
                    (run_dir / RANKS / schema.generation).mkdir(parents=True)
                create_master(temporary, schema, layout.parameters, attributes, ledger, layout)
                reserve(temporary)
                if read_header(temporary).schema != schema:
                    raise StoreError(f"{temporary} does not hold what was written: check the disk of run.out")
        with attempt(world, run_dir, name):
            if active and schema.driver == "files":
                path = schema.rank_file(run_dir, shard.index)
                create_rank_file(path, schema, shard.index, shard.size)
                reserve(path)
                sync_directory(path.parent)
        if source is not None and rows:
            _copy_rows(run_dir, schema, shard, world, comm, source, rows)
        with attempt(world, run_dir, name):
            if head:
                rename_durably(temporary, run_dir / FILE)
    except HpcHessError:
        if head:
            with contextlib.suppress(OSError, HpcHessError):
                if not _published(run_dir, schema):
                    sweep(run_dir, source.schema.generation if source else "")
        raise


def _published(run_dir: Path, schema: Schema) -> bool:
    """Whether krylov.h5 is already this store: a rank may die between the rename and the agreement that it is done."""
    return (run_dir / FILE).exists() and read_header(run_dir / FILE).schema == schema


def _small_bytes(schema: Schema) -> int:
    slots = schema.slots
    return 2 * (slots.commit_stride + slots.extra_stride) + schema.probes * (16 * schema.steps + 8 * schema.rows) + (1 << 20)


def _copy_rows(
    run_dir: Path, schema: Schema, shard: Shard, world: World, comm: Any, source: Header, rows: list[tuple[int, int]]
) -> None:
    active, name = world.replica == 0, "copy the basis"
    values = np.empty(shard.size if active else 0, schema.numpy_dtype)
    old: RowSource | None = None
    new = None
    try:
        with attempt(world, run_dir, name):
            old = RowSource(run_dir, source, shard) if active else None
        with attempt(world, run_dir, name, meet=comm is not None):
            new = open_driver(run_dir / TEMPORARY, schema, shard, comm) if active else None
        for probe, row in rows:
            part = 0
            with attempt(world, run_dir, name):
                if old is not None and new is not None:
                    old.read_row(probe, row, values)
                    part = partial_checksum(values, *shard.file_intervals)
                    new.write_row(schema.basis_index(probe), row, values)
            (total,), _ = sum_checksums(world, [part], False, name)
            if total != source.ledger.row_checksum(probe, row):
                raise damaged_row(run_dir / FILE, probe, row)
        with attempt(world, run_dir, name, meet=comm is not None):
            if new is not None:
                new.sync_rows()
    finally:
        if old is not None:
            old.close()
        if new is not None:
            new.close()


def allocate_again(path: Path, schema: Schema, world: World, shard: Shard | None) -> None:
    """Allocate what was given back of the disk space of all rows. ``shard``: of a rank that has files. Collective: yes.

    Raises
    ------
    StoreError : the disk has no room for it.

    """
    files = [path]
    if schema.driver == "files":
        files = [schema.rank_file(path.parent, index) for index in range(schema.num_shards)]
    missing = 0
    with attempt(world, path, "allocate the basis"):
        if world.rank == 0:
            missing = sum(not_allocated(file) for file in files)
            require_space(path.parent, missing)
    if world.broadcast(missing, "space of the basis"):
        with attempt(world, path, "allocate the basis"):
            if shard is not None and shard.index < len(files):
                reserve(files[shard.index])
