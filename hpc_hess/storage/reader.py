"""A store as one process sees it, read-only: for ``inspect``, notebooks and reports. Needs no World and no torch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from hpc_hess.errors import StoreError
from hpc_hess.storage.blocks import Block, bounded, read_blocks
from hpc_hess.storage.checksum import combine, partial_checksum
from hpc_hess.storage.commit import Committed, kept_rows, newest
from hpc_hess.storage.disk import damaged_row, explain, explaining
from hpc_hess.storage.schema import FILE, Schema, header_of, open_file, open_rank_file

_BLOCK_BYTES = 64 << 20


@dataclass(frozen=True)
class StoredParameter:
    """One line of the layout table; offsets count entries of the file index and of the global index."""

    name: str
    shape: tuple[int, ...]
    offset: int
    global_offset: int


@dataclass(frozen=True)
class StoredProbe:
    """One probe: ``alpha``, ``beta`` of its completed steps (float64); ``basis`` (rows, num_params), read on demand, see
    :meth:`StoreView.row`.

    ``rows`` are the basis rows whose data and checksum are committed: with a shared basis, of the last group only.
    """

    alpha: NDArray[np.float64]
    beta: NDArray[np.float64]
    basis: h5py.Dataset
    checksum: NDArray[np.uint64]
    rows: tuple[int, ...]


class StoreView:
    """A store open for reading, also while a run writes it; use :func:`read_store`, as a context manager or not."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with explaining(path, "open the store"), contextlib.ExitStack() as held:
            self._file = held.enter_context(open_file(path, "r"))
            header = header_of(self._file, path)
            self._header = header
            self.schema: Schema = header.schema
            self.attributes: dict[str, Any] = header.attributes
            self.state: Committed = newest(header.schema.slots, header.ledger, path)
            held.pop_all()

    def row(self, probe: int, row: int) -> NDArray[Any]:
        """Return a basis row as numbers, (num_params,): float64 or float32, to which rows in bfloat16 are widened.

        Raises
        ------
        StoreError : it cannot be read, or it is committed and not what was written.

        """
        stored = self.probes[probe]
        with explaining(self.path, f"read basis row {row} of probe {probe}"):
            values = stored.basis[row]
            found = combine([partial_checksum(values, np.zeros(1, np.int64), np.array([len(values)]))])
        if row in stored.rows and found != self._header.ledger.row_checksum(probe, row) and not self._given_up(probe, row):
            raise damaged_row(self.path, probe, row)
        if self.schema.dtype == "bfloat16":
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values

    @property
    def layout(self) -> list[StoredParameter]:
        """The selected parameters in file order."""
        table = self._header.table
        with explaining(self.path, "read the layout"):
            shapes = [tuple(int(n) for n in shape if n >= 0) for shape in table["shape"]]
            offsets = zip(table["offset"].tolist(), table["global_offset"].tolist(), strict=True)
            return [StoredParameter(n, s, *o) for n, s, o in zip(table["name"], shapes, offsets, strict=True)]

    @property
    def probes(self) -> list[StoredProbe]:
        """All probes, those that have not begun with empty arrays."""
        ledger, state, out = self._header.ledger, self.state, []
        for k in range(self.schema.probes):
            n = state.lengths[k]
            rows = kept_rows(state, ledger, self.schema.keep_basis, k)
            with explaining(self.path, "open the basis"):
                basis = self._file[f"probes/{k}/basis"]
            out.append(StoredProbe(ledger.alpha[k, :n].copy(), ledger.beta[k, :n].copy(), basis, ledger.checksum[k], rows))
        return out

    def verify(self, progress: Callable[[int, int], None] | None = None) -> list[str]:
        """Read every committed row and return one sentence for each that is damaged; an empty list is good news.

        ``progress(done, total)`` is called after each row. Reads rank files directly: a virtual data set gives fill
        values where a file is missing. A row that a run still at work has given up meanwhile is not counted.
        """
        problems: list[str] = []
        parts = self._parts(problems)
        todo = [(k, row) for k, probe in enumerate(self.probes) for row in probe.rows]
        for done, (probe, row) in enumerate(todo if not problems else (), 1):
            basis = self.schema.basis_index(probe)
            try:
                sums = [self._partial(dataset(basis), row, *where) for dataset, *where in parts]
                if combine(sums) != self._header.ledger.row_checksum(probe, row) and not self._given_up(probe, row):
                    problems.append(f"basis row {row} of probe {probe} does not match its checksum")
            except Exception as error:  # of h5py: see explaining
                problems.append(str(explain(error, self.path, f"read basis row {row} of probe {probe}")))
            if progress:
                progress(done, len(todo))
        for file in self._rank_files:
            file.close()
        return problems

    def _given_up(self, probe: int, row: int) -> bool:
        """Whether the run went on since this view was opened, and the row is no longer what it was then."""
        with StoreView(self.path) as now:
            if now.state.sequence == self.state.sequence:
                return False
            same = now.probes[probe].checksum[row] == self._header.ledger.checksum[probe, row]
            return not (same and row in now.probes[probe].rows)

    def _parts(self, problems: list[str]) -> list[Any]:
        """Return (basis -> data set, starts, lengths) of each file that holds a part of every row."""
        self._rank_files: list[h5py.File] = []
        whole = (np.zeros(1, np.int64), np.array([self.schema.num_params]))
        if self.schema.driver == "mpio":
            return [(lambda k: self._file[f"probes/{k}/basis"], *whole)]
        parts = []
        with explaining(self.path, "read the layout"):
            layout = self._header.stored_layout()
        for rank in range(self.schema.num_shards):
            shard = layout.shard(rank)
            try:
                file = open_rank_file(self.path.parent, self.schema, rank, shard.size, "r")
            except StoreError as error:
                problems.append(str(error))
            else:
                self._rank_files.append(file)
                if shard.size:
                    parts.append((lambda k, file=file: file[f"basis/{k}"], *shard.file_intervals))
        return parts

    def _partial(self, dataset: h5py.Dataset, row: int, starts: Any, lengths: Any) -> int:
        """Return the checksum of one file's part of a row, a bounded number of bytes at a time."""
        ends = np.cumsum(lengths)
        size, total, at = int(ends[-1]), 0, 0
        step = _BLOCK_BYTES // dataset.dtype.itemsize
        for at in range(0, size, step):
            values = np.empty(min(step, size - at), dataset.dtype)
            read_blocks(dataset, row, bounded([Block(0, at, len(values), 1, len(values))], values.itemsize), values)
            low, high = np.maximum(ends - lengths, at), np.minimum(ends, at + len(values))
            inside = high > low
            total += partial_checksum(values, (starts + low - (ends - lengths))[inside], (high - low)[inside])
        return total

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> StoreView:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def read_store(path: str | Path) -> StoreView:
    """Open the store at ``path``, a run directory or its krylov.h5, for reading. Single process.

    Raises
    ------
    StoreError : no such file, not a store, a newer format, damaged.

    """
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    if not path.exists():
        raise StoreError(f"there is no run at {path}: give a run directory or its {FILE}")
    return StoreView(path)
