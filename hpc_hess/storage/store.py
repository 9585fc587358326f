"""The crash-safe store of one run: rows of the Krylov basis, recurrence coefficients, one committed step at a time.

A step is ``write_row`` (durable on every rank, agreed) and ``commit`` (small data, then one of two commit slots). A kill
at any instant loses at most the step that was not committed. Everything is created whole, aside, and renamed.
"""

from __future__ import annotations

import contextlib
import uuid
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpc_hess.errors import HpcHessError, StoreError
from hpc_hess.parallel.layout import Layout, Shard
from hpc_hess.parallel.world import World
from hpc_hess.storage.agree import attempt
from hpc_hess.storage.build import build, rows_to_keep, sum_checksums, sweep
from hpc_hess.storage.checksum import partial_checksum
from hpc_hess.storage.commit import Committed, Ledger, encode, newest
from hpc_hess.storage.drivers import Driver, choose_driver, open_driver
from hpc_hess.storage.lock import RunLock
from hpc_hess.storage.replicas import share_with_replicas
from hpc_hess.storage.schema import FILE, Header, Schema, read_header


def store_exists(run_dir: Path, world: World) -> bool:
    """Return whether ``run_dir`` holds a store, as rank 0 sees it. Collective: yes."""
    return world.broadcast((Path(run_dir) / FILE).exists(), "look for a store")


class Store:
    """One run on disk, open for reading and writing by all ranks; use :meth:`create` or :meth:`open`.

    Every method but the plain properties is collective. With HSDP only replica 0 touches files; the other replicas take
    part in agreement and receive what is read.
    """

    def __init__(
        self, run_dir: Path, header: Header, *, shard: Shard, world: World, lock: RunLock, comm: Any
    ) -> None:
        self._path, self._header, self.schema = run_dir / FILE, header, header.schema
        self._shard, self._world, self._lock, self._comm = shard, world, lock, comm
        self._ledger = header.ledger
        self._pending: dict[tuple[int, int], int] = {}  # checksums of rows written since the last commit
        self._driver: Driver | None = None
        self._state = newest(self.schema.slots, self._ledger, self._path)
        with attempt(world, self._path, "open the store"):
            if world.replica == 0:
                self._driver = open_driver(self._path, self.schema, shard, comm)

    # -- opening -------------------------------------------------------------------------------------------------

    @classmethod
    def create(
        cls, run_dir: Path, *, layout: Layout, shard: Shard, world: World, probes: int, steps: int, rows: int,
        attributes: dict[str, Any], driver: str = "auto", keep_basis: bool = False, dtype: Any = "float32",
        extra_bytes: int = 1 << 16, replace_existing: bool = False, lock: RunLock | None = None,
    ) -> Store:  # fmt: skip
        """Create the store of a new run, with all its space allocated. Collective: yes.

        Parameters
        ----------
        steps, rows : length of alpha and beta; number of basis rows (fewer than ``steps`` for a ring).
        keep_basis : a basis for each probe, instead of one that the next probe overwrites.
        dtype : of the rows, float32 or float64 (NumPy or torch).
        attributes : JSON-able values kept with the run: configuration, fingerprints.
        extra_bytes : capacity of the resume state that a commit carries besides.
        lock : the run directory's lock if the caller holds it already; closed with the store.

        Raises
        ------
        StoreError : the directory holds a run, is locked, read-only, too small; "mpio" cannot work here.

        """
        lock = lock or RunLock.acquire(run_dir, world)
        try:
            run_dir = Path(run_dir).resolve()
            kind = choose_driver(driver, world)
            with attempt(world, run_dir, "create the store"):
                if world.rank == 0:
                    _refuse_existing(run_dir, replace_existing)
            run_id, generation = world.broadcast((uuid.uuid4().hex, uuid.uuid4().hex[:12]), "name the run")
            schema = Schema(
                run_id=run_id, driver=kind, generation="" if kind == "mpio" else generation, num_shards=world.shard_size,
                num_params=layout.num_params, fingerprint=layout.fingerprint,
                dtype=np.dtype(str(dtype).removeprefix("torch.") if not isinstance(dtype, type) else dtype).name,
                probes=probes, steps=steps, rows=rows, keep_basis=keep_basis, extra_bytes=extra_bytes,
            )  # fmt: skip
            comm = _communicator(world, kind)
            ledger = Ledger.empty(schema.slots, steps)
            build(run_dir, schema, layout=layout, shard=shard, world=world, comm=comm, attributes=attributes, ledger=ledger)
            header = Header(schema, attributes, {}, ledger)
            _sweep_replaced(run_dir, world, generation=schema.generation)
            return cls(run_dir, header, shard=shard, world=world, lock=lock, comm=comm)
        except BaseException:
            lock.release()
            raise

    @classmethod
    def open(
        cls, run_dir: Path, *, layout: Layout, shard: Shard, world: World, driver: str = "auto",
        probes: int | None = None, steps: int | None = None, rows: int | None = None, lock: RunLock | None = None,
    ) -> Store:  # fmt: skip
        """Open the store of a run, on any number of ranks and with either driver. Collective: yes.

        A store that this job cannot write as it is (rank files of another layout, the other driver, more ``probes``,
        ``steps`` or ``rows`` than it has room for) is rebuilt aside with the rows that are still needed, and replaced.

        Raises
        ------
        StoreError : no run, another model's, damaged, incomplete, locked, of a newer format; no space to rebuild it.

        """
        lock = lock or RunLock.acquire(run_dir, world)
        try:
            run_dir = Path(run_dir).resolve()
            header: Any = None
            with attempt(world, run_dir / FILE, "open the store"):
                if world.rank == 0:
                    header = read_header(run_dir / FILE)
                    _check_layout(header, layout, run_dir)
                    sweep(run_dir, header.schema.generation)
            header = world.broadcast(header, "read the store")
            old = header.schema
            kind = choose_driver(driver, world, old.driver)
            size = {"probes": probes or old.probes, "steps": steps or old.steps, "rows": rows or old.rows}
            grown = {key: max(value, getattr(old, key)) for key, value in size.items()}
            comm = _communicator(world, kind)
            same = kind == old.driver and all(getattr(old, key) == value for key, value in grown.items())
            if not (same and (kind == "mpio" or _same_shards(header, layout))):
                header = _rebuild(run_dir, header, kind, grown, layout=layout, shard=shard, world=world, comm=comm)
            return cls(run_dir, header, shard=shard, world=world, lock=lock, comm=comm)
        except BaseException:
            lock.release()
            raise

    # -- what is there -------------------------------------------------------------------------------------------

    @property
    def state(self) -> Committed:
        """The newest committed state. Collective: no."""
        return self._state

    @property
    def attributes(self) -> dict[str, Any]:
        """The attributes given at creation. Collective: no."""
        return self._header.attributes

    def recurrence(self, probe: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return copies of (alpha, beta), ``steps`` long, NaN beyond the committed steps. Collective: no."""
        alpha, beta = self._ledger.alpha[probe].copy(), self._ledger.beta[probe].copy()
        alpha[self._state.lengths[probe] :] = np.nan
        beta[self._state.lengths[probe] :] = np.nan
        return alpha, beta

    # -- rows ----------------------------------------------------------------------------------------------------

    def write_row(self, probe: int, row: int, values: NDArray) -> None:
        """Write ``values`` (this rank's flat shard, of the store's dtype) as row ``row``, durably. Collective: yes.

        The row counts once a commit names it. A row that the last commit needs cannot be written (ValueError), except
        by the next probe after a finished one.

        Raises
        ------
        StoreError : it failed on some rank (a full disk); the committed state is untouched.

        """
        self._check_row(probe, row)
        if values.dtype != np.dtype(self.schema.dtype) or values.shape != (self._shard.size,):
            raise ValueError(f"a row is {self._shard.size} x {self.schema.dtype}, not {values.shape} x {values.dtype}")
        same_basis = self.schema.basis_index(probe) == self.schema.basis_index(self._state.probe)
        if same_basis and row in self._state.rows:
            if not (self._state.finished and probe > self._state.probe):
                raise ValueError(f"row {row} is needed by the last commit (step {self._state.step})")
            self._release()
        part = 0
        error: HpcHessError | None = None
        self._pending.pop((probe, row), None)
        try:
            if self._driver is not None:
                part = partial_checksum(values, *self._shard.file_intervals)
                self._driver.write_row(self.schema.basis_index(probe), row, np.ascontiguousarray(values))
        except Exception as caught:
            error = _explained(caught, self._path, "write a basis row")
        try:
            if self._driver is not None:
                self._driver.sync_rows()  # a collective with MPI: every rank comes here
        except Exception as caught:
            error = error or _explained(caught, self._path, "write a basis row")
        total, failed = sum_checksums(self._world, part, error is not None, "write a basis row")
        if failed:
            self._world.raise_together(error, "write a basis row")
        self._pending[probe, row] = total

    def read_row(self, probe: int, row: int, out: NDArray | None = None) -> NDArray:
        """Return this rank's shard of a row, in ``out`` (flat, contiguous) if given. Collective: yes."""
        self._check_row(probe, row)
        values = np.empty(self._shard.size, self.schema.dtype) if out is None else out
        with attempt(self._world, self._path, "read a basis row"):
            if self._driver is not None:
                self._driver.read_row(self.schema.basis_index(probe), row, values)
        share_with_replicas(self._world, values)
        return values

    def verify_rows(self, probe: int, rows: list[int] | range | tuple[int, ...]) -> list[int]:
        """Return those of ``rows`` whose data does not match their checksum, the same on every rank. Collective: yes."""
        values = np.empty(self._shard.size if self._driver else 0, self.schema.dtype)
        bad = []
        for row in rows:
            self._check_row(probe, row)
            part = 0
            with attempt(self._world, self._path, "verify a basis row"):
                if self._driver is not None:
                    self._driver.read_row(self.schema.basis_index(probe), row, values)
                    part = partial_checksum(values, *self._shard.file_intervals)
            total, _ = sum_checksums(self._world, part, False, "verify a basis row")
            if total != self._pending.get((probe, row), int(self._ledger.checksum[probe, row])):
                bad.append(row)
        return bad

    def _check_row(self, probe: int, row: int) -> None:
        if not (0 <= probe < self.schema.probes and 0 <= row < self.schema.rows):
            raise ValueError(f"no row {row} of probe {probe}: {self.schema.probes} probes x {self.schema.rows} rows")

    # -- commits -------------------------------------------------------------------------------------------------

    def commit(
        self, probe: int, step: int, alpha: NDArray[np.float64], beta: NDArray[np.float64], *, finished: bool = False,
        extra: bytes = b"", rows_needed: list[int] | None = None,
    ) -> None:  # fmt: skip
        """Make ``step`` completed steps of ``probe`` the state that a resume finds. Collective: yes.

        Parameters
        ----------
        alpha, beta : at least ``step`` long, the same on every rank; what was committed before cannot change.
        extra : resume state, up to the store's ``extra_bytes``.
        rows_needed : rows that a resume needs; they must have been written. Default: rows 0 to ``step``, as far as
            there are any; none if the probe is finished and the next one reuses its space.

        Raises
        ------
        StoreError : it failed on some rank; the store then holds this commit or the one before.

        """
        rows = self._rows_needed(probe, step, finished, rows_needed)
        self._check_commit(probe, step, alpha, beta, extra)
        ledger, old = self._ledger, self._state
        first = old.step if probe == old.probe else 0
        sums = {row: total for (p, row), total in self._pending.items() if p == probe}
        lengths = (*old.lengths[:probe], step, *(0,) * (self.schema.probes - probe - 1))
        state = Committed(old.sequence + 1, probe, step, finished, extra, rows, lengths)
        ledger.alpha[probe, first:step], ledger.beta[probe, first:step] = alpha[first:step], beta[first:step]
        for row, total in sums.items():
            ledger.checksum[probe, row] = total
        slot, record = state.sequence % 2, encode(state, self.schema.slots, ledger)
        with attempt(self._world, self._path, "commit a step"):
            if self._driver is not None:
                self._put(slot, record, state, first, sorted(sums))
        self._pending = {key: total for key, total in self._pending.items() if key[0] != probe}
        self._state = state

    def _put(self, slot: int, record: bytes, state: Committed, first: int, rows: list[int]) -> None:
        """Write the data of a commit, sync, write its record, sync. With MPI every rank syncs twice, come what may."""
        assert self._driver is not None
        small, ledger, error = self._driver.small, self._ledger, None
        for record_now in (False, True):
            try:
                if small is not None and error is None:
                    if record_now:
                        small.put_slot("commit", slot, record)
                    else:
                        small.put("alpha", state.probe, first, ledger.alpha[state.probe, first : state.step])
                        small.put("beta", state.probe, first, ledger.beta[state.probe, first : state.step])
                        for row in rows:
                            small.put("checksum", state.probe, row, ledger.checksum[state.probe, row : row + 1])
                        small.put_slot("extra", slot, state.extra)
            except Exception as caught:
                error = caught
            try:
                self._driver.sync_small()
            except Exception as caught:
                error = error or caught
        if error is not None:
            raise error

    def _rows_needed(self, probe: int, step: int, finished: bool, given: list[int] | None) -> tuple[int, ...]:
        known = {row for p, row in self._pending if p == probe}
        known |= set(np.flatnonzero(self._ledger.checksum[probe]).tolist())
        if given is None:
            rows = list(range(min(step + 1, self.schema.rows)))
            if finished:  # an early end has not written the vector of the next step
                reused = not self.schema.keep_basis and probe + 1 < self.schema.probes
                rows = [] if reused else [row for row in rows if row in known]
        else:
            rows = sorted(set(given))
        missing = [row for row in rows if row not in known]
        if missing:
            raise ValueError(f"rows {missing[:3]} of probe {probe} are to be committed but were never written")
        return tuple(rows)

    def _check_commit(self, probe: int, step: int, alpha: NDArray, beta: NDArray, extra: bytes) -> None:
        old = self._state
        if not old.probe <= probe < self.schema.probes or not 0 <= step <= min(self.schema.steps, len(alpha), len(beta)):
            raise ValueError(f"cannot commit probe {probe}, step {step} after probe {old.probe}, step {old.step}")
        if len(extra) > self.schema.extra_bytes:
            raise ValueError(f"{len(extra)} bytes of extra state, room for {self.schema.extra_bytes}")
        n = min(step, old.step) if probe == old.probe else 0
        for mine, kept in ((alpha, self._ledger.alpha), (beta, self._ledger.beta)):
            if np.asarray(mine[:n], np.float64).tobytes() != kept[probe, :n].tobytes():
                raise ValueError(f"the first {n} recurrence coefficients are committed and cannot change")

    def _release(self) -> None:
        """Commit that a finished probe needs its rows no more, before the next one overwrites them."""
        alpha, beta = self._ledger.alpha[self._state.probe], self._ledger.beta[self._state.probe]
        state = self._state
        self.commit(state.probe, state.step, alpha, beta, finished=True, extra=state.extra, rows_needed=[])

    # -- closing -------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close the files and release the lock; a second call does nothing. Collective: yes."""
        driver, self._driver = self._driver, None
        try:
            with attempt(self._world, self._path, "close the store"):
                if driver is not None:
                    driver.close()
        finally:
            self._lock.release()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
