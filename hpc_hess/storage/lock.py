"""The lock of a run directory: one job at a time, and none left behind by a job that died.

lockf, because it works across nodes on NFS too. Rank 0 holds byte 0 and rank r byte 1 + r; a new job must first get all
of them, since the other ranks of a killed job live about one second longer and could still write. The trap of lockf:
closing any descriptor of the file drops the locks of the process, so nothing else here may open it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from datetime import datetime
from pathlib import Path

from hpc_hess.errors import StoreError
from hpc_hess.parallel.world import World
from hpc_hess.storage.agree import attempt

NAME = "run.lock"
_held: set[Path] = set()  # by this process, which lockf would let in again


class RunLock:
    """The lock of one run directory; use :meth:`acquire`, as a context manager or not."""

    def __init__(self, directory: Path, handle: int, *, head: bool) -> None:
        self._directory, self._handle, self._head = directory, handle, head

    @classmethod
    def acquire(cls, run_dir: Path, world: World, *, wait_s: float = 5.0) -> RunLock:
        """Create ``run_dir`` if need be and lock it for this job. Collective: yes.

        Raises
        ------
        StoreError : another job holds it for longer than ``wait_s``; the directory cannot be written, is not shared
            by all nodes, or is on a file system without locks.

        """
        directory = Path(run_dir).absolute()
        head = world.rank == 0
        lock: RunLock | None = None
        text = ""
        with attempt(world, directory, "lock the run directory"):
            if head:
                directory = directory.resolve()
                text = _describe(world)
                lock = cls._take_all(directory, wait_s)
                try:
                    os.ftruncate(lock._handle, 0)
                    os.pwrite(lock._handle, text.encode(), 0)
                    fcntl.lockf(lock._handle, fcntl.LOCK_UN, 0, 1)
                except BaseException:
                    lock.release(clear=False)
                    raise
        text = world.broadcast(text, "lock the run directory")
        try:
            with attempt(world, directory, "lock the run directory"):
                if not head:
                    directory = directory.resolve()
                    lock = cls._join(directory, text, world, wait_s)
        except StoreError:
            if lock is not None:
                lock.release()
            raise
        assert lock is not None
        return lock

    @classmethod
    def _take_all(cls, directory: Path, wait_s: float) -> RunLock:
        """Lock every byte, of rank 0 and of all ranks that may still be alive, of the file that is there in the end.

        While a job waits, the one that it waits for may put the directory aside, with the lock file that is waited for.
        """
        while True:
            directory.mkdir(parents=True, exist_ok=True)
            lock = cls(directory, cls._open(directory, os.O_CREAT), head=True)
            try:
                lock._take(0, 0, wait_s)
                if os.path.samestat(os.fstat(lock._handle), os.stat(directory / NAME)):
                    return lock
            except FileNotFoundError:
                pass
            except BaseException:
                lock.release(clear=False)
                raise
            lock.release(clear=False)

    @classmethod
    def _join(cls, directory: Path, text: str, world: World, wait_s: float) -> RunLock:
        """Take this rank's byte of a lock that rank 0 holds; a file system's caches may lag behind."""
        deadline = time.monotonic() + wait_s
        while not (directory / NAME).exists():
            if time.monotonic() > deadline:
                raise StoreError(
                    f"rank {world.rank} on {socket.gethostname()} does not see {directory}: run.out must lie on a file "
                    "system that all nodes share"
                )
            time.sleep(0.1)
        lock = cls(directory, cls._open(directory, 0), head=False)
        try:
            lock._take(1, 1 + world.rank, wait_s)
            while lock._text() != text:
                if time.monotonic() > deadline:
                    raise StoreError(
                        f"rank {world.rank} on {socket.gethostname()} sees another {directory} than rank 0: run.out "
                        "must lie on a file system that all nodes share"
                    )
                time.sleep(0.1)
        except BaseException:
            lock.release()
            raise
        return lock

    @staticmethod
    def _open(directory: Path, flags: int) -> int:
        if directory in _held:
            raise StoreError(f"this process has {directory} open already: close that store first")
        handle = os.open(directory / NAME, os.O_RDWR | os.O_CLOEXEC | flags, 0o644)
        _held.add(directory)
        return handle

    def _take(self, length: int, start: int, wait_s: float) -> None:
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.lockf(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
                return
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise StoreError(
                        f"the file system of {self._directory} has no locks ({error.strerror}): mount it with locks "
                        "(Lustre: -o flock) or choose another run.out"
                    ) from error
            if time.monotonic() > deadline:
                holder = self._text().strip() or "unknown"
                raise StoreError(
                    f"another job is using {self._directory} ({holder}): wait for it, stop it, or choose another run.out"
                )
            time.sleep(0.1)

    def _text(self) -> str:
        return os.pread(self._handle, 4096, 0).decode(errors="replace")

    def release(self, *, clear: bool = True) -> None:
        """Give the lock back; a second call does nothing. Collective: no."""
        if self._handle < 0:
            return
        if self._head and clear:
            os.ftruncate(self._handle, 0)
        os.close(self._handle)  # the file itself stays: removing it would let two jobs lock two files of one name
        self._handle = -1
        _held.discard(self._directory)

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()


def _describe(world: World) -> str:
    job = next((os.environ[k] for k in ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID") if os.environ.get(k)), "none")
    since = datetime.now().astimezone().isoformat(timespec="seconds")
    return f"host {socket.gethostname()}, pid {os.getpid()}, job {job}, {world.size} ranks, since {since}\n"
