"""The crash-safe store of one run: rows of the Krylov basis, recurrence coefficients, one committed step at a time.

Probes go in groups that advance in lock-step; a probe on its own is a group of one. A step is a row for each member
(written at once or beside the next product; durable on every rank, agreed) and one ``commit`` for all (small data, then
one of two commit slots). A kill at any instant loses at most the step that was not committed. Everything is created
whole, aside, and renamed.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpc_hess.errors import CollectiveError, HpcHessError, StoreError
from hpc_hess.parallel.layout import Layout, Shard
from hpc_hess.parallel.world import World
from hpc_hess.storage.agree import attempt
from hpc_hess.storage.build import allocate_again, build, sum_checksums
from hpc_hess.storage.checksum import partial_checksum
from hpc_hess.storage.commit import Committed, Ledger
from hpc_hess.storage.disk import SAVE_SPACE, damaged_row
from hpc_hess.storage.drivers import Driver, choose_driver, open_driver
from hpc_hess.storage.journal import Journal, Member, Plan, write_plan
from hpc_hess.storage.lock import RunLock
from hpc_hess.storage.opening import adopt, clear, communicator, rebuild
from hpc_hess.storage.replicas import share_with_replicas
from hpc_hess.storage.schema import FILE, Header, Schema, dtype_name
from hpc_hess.storage.writing import Writer

_abandoned: list[Driver] = []


def store_exists(run_dir: Path, world: World) -> bool:
    """Return whether ``run_dir`` holds a store, as rank 0 sees it. Collective: yes."""
    return world.broadcast((Path(run_dir) / FILE).exists(), "look for a store")


class Store:
    """One run on disk, open for reading and writing by all ranks; use :meth:`create` or :meth:`open`.

    Every method but the plain properties is collective. With HSDP only replica 0 touches files; the other replicas take
    part in agreement and receive what is read.
    """

    def __init__(self, run_dir: Path, header: Header, *, shard: Shard, world: World, lock: RunLock, comm: Any) -> None:
        self._path, self._header, self.schema = run_dir / FILE, header, header.schema
        self._shard, self._world, self._lock, self._comm = shard, world, lock, comm
        self._driver: Driver | None = None
        self._closed = False
        self._writer = Writer(self._path, shard, world, comm)
        self._journal = Journal(header.schema, header.ledger, self._path)
        self._open_files()

    def _open_files(self) -> None:
        with attempt(self._world, self._path, "open the store", meet=self._comm is not None):
            if self._world.replica == 0:
                self._driver = open_driver(self._path, self.schema, self._shard, self._comm)

    # -- opening -------------------------------------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        run_dir: Path,
        *,
        layout: Layout,
        shard: Shard,
        world: World,
        probes: int,
        steps: int,
        rows: int,
        attributes: dict[str, Any],
        driver: str = "auto",
        keep_basis: bool = False,
        dtype: Any = "float32",
        width: int = 1,
        extra_bytes: int = 1 << 16,
        replace_existing: bool = False,
        lock: RunLock | None = None,
        save_space: str = SAVE_SPACE,
    ) -> Store:
        """Create the store of a new run, with all its space allocated. Collective: yes.

        Parameters
        ----------
        steps, rows : length of alpha and beta; number of basis rows (fewer than ``steps`` for a ring).
        width : how many probes may advance together.
        keep_basis : a basis for each probe, instead of ``width`` bases that the next group overwrites.
        dtype : of the rows: float32, float64 (NumPy or torch) or bfloat16, whose rows are given as their bits (uint16).
        attributes : JSON-able values kept with the run: configuration, fingerprints.
        extra_bytes : capacity of the resume state that a commit carries besides.
        lock : the run directory's lock if the caller holds it already; closed with the store.
        save_space : the remedy where the disk has no room.

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
                    clear(run_dir, replace_existing=replace_existing)
            run_id, generation = world.broadcast((uuid.uuid4().hex, uuid.uuid4().hex[:12]), "name the run")
            schema = Schema(
                run_id=run_id,
                driver=kind,
                generation="" if kind == "mpio" else generation,
                num_shards=world.shard_size,
                num_params=layout.num_params,
                fingerprint=layout.fingerprint,
                dtype=dtype_name(dtype),
                probes=probes,
                width=min(width, probes),
                steps=steps,
                rows=rows,
                keep_basis=keep_basis,
                extra_bytes=extra_bytes,
            )
            comm = communicator(world, kind)
            ledger = Ledger.empty(schema.slots, steps)
            build(
                run_dir,
                schema,
                layout=layout,
                shard=shard,
                world=world,
                comm=comm,
                attributes=attributes,
                ledger=ledger,
                save_space=save_space,
            )
            return cls(run_dir, Header(schema, attributes, {}, ledger), shard=shard, world=world, lock=lock, comm=comm)
        except BaseException:
            lock.release()
            raise

    @classmethod
    def open(
        cls,
        run_dir: Path,
        *,
        layout: Layout,
        shard: Shard,
        world: World,
        driver: str = "auto",
        probes: int = 0,
        steps: int = 0,
        rows: int = 0,
        width: int = 0,
        keep_basis: bool | None = None,
        lock: RunLock | None = None,
    ) -> Store:
        """Open the store of a run, on any number of ranks and with either driver. Collective: yes.

        A store that this job cannot write as it is (rank files of another layout, the other driver, more ``probes``,
        ``steps``, ``rows`` or ``width`` than it has room for, another ``keep_basis``) is rebuilt aside with the rows that
        are still needed, and replaced.

        Raises
        ------
        StoreError : no run, another model's, damaged, incomplete, locked, of a newer format; no space to rebuild it.

        """
        lock = lock or RunLock.acquire(run_dir, world)
        try:
            run_dir = Path(run_dir).resolve()
            wanted = {"probes": probes, "steps": steps, "rows": rows, "width": width, "keep_basis": keep_basis}
            header, comm = adopt(run_dir, driver, wanted, layout, shard, world)
            return cls(run_dir, header, shard=shard, world=world, lock=lock, comm=comm)
        except BaseException:
            lock.release()
            raise

    # -- what is there -------------------------------------------------------------------------------------------

    @property
    def state(self) -> Committed:
        """The newest committed state. Collective: no."""
        return self._journal.state

    @property
    def attributes(self) -> dict[str, Any]:
        """The attributes given at creation. Collective: no."""
        return self._header.attributes

    def recurrence(self, probe: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return copies of (alpha, beta) of the committed steps. Collective: no."""
        return self._journal.recurrence(probe)

    # -- rows ----------------------------------------------------------------------------------------------------

    def write_row(self, probe: int, row: int, values: NDArray) -> None:
        """Write ``values`` (this rank's flat shard, of the store's dtype) as row ``row``, durably. Collective: yes.

        The row counts once a commit names it. A row that the last commit needs cannot be written (ValueError), except
        by the next group after a finished one.

        Raises
        ------
        StoreError : it failed on some rank (a full disk); the committed state is untouched.

        """
        self.start_row(probe, row, values)
        self.finish_rows()

    def start_row(self, probe: int, row: int, values: NDArray) -> None:
        """As :meth:`write_row`, in the background: ``values`` must stay as they are until :meth:`finish_rows`."""
        if values.dtype != self.schema.numpy_dtype or values.shape != (self._shard.size,):
            raise ValueError(f"a row is {self._shard.size} x {self.schema.dtype}, not {values.shape} x {values.dtype}")
        if self._journal.begin_row(probe, row):
            self._write(self._journal.release())
            self._journal.begin_row(probe, row)
        self._writer.start(self._driver, self.schema.basis_index(probe), (probe, row), values)

    def finish_rows(self) -> None:
        """Wait until every row that was started is durable on every rank. Collective: yes. Raises as :meth:`write_row`."""
        for (probe, row), checksum in self._writer.finish(self._driver):
            self._journal.end_row(probe, row, checksum)

    def row_reader(self, probe: int) -> Callable[[int, int, NDArray], None]:
        """Return read(row, start, out), which reads entries start..start+len(out)-1 of this rank's shard of a row.

        For any thread, without communication and without a look at the checksum. Collective: no.
        """
        driver, basis = self._driver, self.schema.basis_index(probe)
        assert driver is not None  # of replicas only the first reads

        def read(row: int, start: int, out: NDArray) -> None:
            driver.read_row(basis, row, out, start)

        return read

    def read_row(self, probe: int, row: int, out: NDArray | None = None, *, verify: bool = True) -> NDArray:
        """Return this rank's shard of a row, in ``out`` (flat, contiguous) if given. Collective: yes.

        Raises
        ------
        StoreError : it cannot be read, or (unless ``verify`` is False) it is not what was written.

        """
        self.finish_rows()
        values = np.empty(self._shard.size, self.schema.numpy_dtype) if out is None else out
        checksum = self._read(probe, row, values)
        if verify and checksum != self._journal.checksum(probe, row):
            raise damaged_row(self._path, probe, row)
        share_with_replicas(self._world, values)
        return values

    def verify_rows(self, probe: int, rows: Iterable[int]) -> list[int]:
        """Return those of ``rows`` whose data does not match their checksum. Collective: yes."""
        self.finish_rows()
        values = np.empty(self._shard.size if self._driver else 0, self.schema.numpy_dtype)
        return [row for row in rows if self._read(probe, row, values) != self._journal.checksum(probe, row)]

    def _read(self, probe: int, row: int, out: NDArray) -> int:
        """Read this rank's part of a row and return the whole row's checksum."""
        self._journal.check_row(probe, row)
        part = 0
        with attempt(self._world, self._path, "read a basis row"):
            if self._driver is not None:
                self._driver.read_row(self.schema.basis_index(probe), row, out)
                part = partial_checksum(out, *self._shard.file_intervals)
        return sum_checksums(self._world, [part], False, "read a basis row")[0][0]

    # -- commits -------------------------------------------------------------------------------------------------

    def commit(self, probe: int, members: Sequence[Member], extra: bytes = b"") -> None:
        """Make ``members``, the probes from ``probe`` on, the state that a resume finds. Collective: yes.

        A group is committed at once or not at all, and goes on until all its members have ended; the next one begins
        with the probe after it. Members that have not ended are at the same step.

        Parameters
        ----------
        members : at most ``width``, the same on every rank.
        extra : resume state, up to the store's ``extra_bytes``.

        Raises
        ------
        StoreError : it failed on some rank; the store then holds this commit or the one before.

        """
        self.finish_rows()
        self._write(self._journal.plan(probe, members, extra))

    def _write(self, plan: Plan) -> None:
        with attempt(self._world, self._path, "commit a step", meet=self._comm is not None):
            if self._driver is not None:
                write_plan(self._driver, plan)
        self._journal.accept(plan)

    def give_back(self) -> None:
        """Free the disk space of the rows that the last commit does not need, where the file system can. Collective: yes."""
        self.finish_rows()
        group = self.state.group
        needed = {(self.schema.basis_index(k), row) for k in group for row in self.state.rows_of(k)}
        bases = {self.schema.basis_index(k) for k in group}
        with attempt(self._world, self._path, "give back disk space"):
            if self._driver is not None:
                self._driver.give_back(
                    (basis, row) for basis in bases for row in range(self.schema.rows) if (basis, row) not in needed
                )

    def take_back(self) -> None:
        """Allocate what was given back of the disk space of all rows. Collective: yes. Raises StoreError: no room for it."""
        allocate_again(self._path, self.schema, self._world, self._shard if self._driver else None)

    def free_basis(self) -> None:
        """Give up the rows of finished probes: a store without a basis takes this one's place. Collective: yes.

        Later probes need one of their own: :meth:`open` with ``rows``. A kill leaves the old store or the new one.

        Raises
        ------
        StoreError : the disk has no room for the small store; the old one stays, and is open.

        """
        if not self.schema.rows:
            return
        if not self.state.finished:
            raise ValueError("the basis of a group that is going on is needed")
        self.finish_rows()
        with attempt(self._world, self._path, "close the store", meet=self._comm is not None):
            if self._driver is not None:
                self._driver.close()
        self._driver = None
        try:
            self._header = rebuild(
                self._path.parent,
                self._header,
                self.schema.driver,
                {"rows": 0, "keep_basis": False},
                layout=self._shard.layout,
                shard=self._shard,
                world=self._world,
                comm=self._comm,
                state=self.state,
            )
        except StoreError:
            self._open_files()
            raise
        self.schema = self._header.schema
        self._journal = Journal(self.schema, self._header.ledger, self._path)
        self._open_files()

    # -- closing -------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close the files and release the lock; a second call does nothing. Collective: yes."""
        if self._closed:
            return
        self._writer.close()
        driver, self._driver, self._closed = self._driver, None, True
        try:
            with attempt(self._world, self._path, "close the store", meet=self._comm is not None):
                if driver is not None:
                    driver.close()
        finally:
            self._lock.release()

    def abandon(self) -> None:
        """Release the lock, and this rank's files where that needs no other rank. For a dying job. Collective: no."""
        self._writer.close(wait=False)
        driver, self._driver, self._closed = self._driver, None, True
        if driver is not None and self._comm is not None and self._comm.Get_size() > 1:
            _abandoned.append(driver)  # to forget its files would close them, together with ranks that will not come
        elif driver is not None:
            with contextlib.suppress(Exception):
                driver.close()
        self._lock.release()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None or (issubclass(kind, HpcHessError) and not issubclass(kind, CollectiveError)):
            self.close()
        else:
            self.abandon()
