"""Space, durability and clean-up of files."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from hpc_hess.errors import HpcHessError, StoreError
from hpc_hess.system import allocate, can_give_back, punch_hole

FILE, RANKS = "krylov.h5", "krylov.ranks"  # of every store: see schema
SAVE_SPACE = (
    "lower lanczos.steps or lanczos.lock_step, set lanczos.reorthogonalise to a window, set store.keep_basis = false, or "
    "put run.out on a larger disk"
)


def size_text(count: int) -> str:
    """Return ``count`` bytes for people, such as "1.2 GB"."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def free_bytes(path: Path) -> int:
    """Return the bytes an ordinary user may still write on the file system of ``path``."""
    info = os.statvfs(path)
    return info.f_bavail * info.f_frsize


def require_space(directory: Path, needed: int, remedy: str = SAVE_SPACE) -> None:
    """Raise StoreError unless ``needed`` bytes are free on the file system of ``directory``."""
    free = free_bytes(directory)
    if needed > free:
        raise StoreError(
            f"the Krylov basis needs {size_text(needed)} ({needed} bytes) but {directory} has {size_text(free)} free "
            f"({free} bytes): {remedy}"
        )


def reserve(path: Path) -> None:
    """Allocate every block of ``path``, so that later writes cannot meet a full disk. Writes no data.

    Where the file system cannot, nothing is reserved; a full disk is met, and survived, when a row is written.
    """
    with open(path, "r+b") as file:
        if allocate(file):
            os.fsync(file.fileno())


def allocated(path: Path) -> int:
    """Return the bytes that a file, or all files of a directory, take on the disk: holes take none."""
    total = 0
    for file in [path] if path.is_file() else path.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # renamed meanwhile by a job at work
            info = file.lstat()
            total += 512 * info.st_blocks if stat.S_ISREG(info.st_mode) else 0
    return total


def not_allocated(path: Path) -> int:
    """Return the bytes of ``path`` that have no place on the disk yet: holes."""
    info = os.stat(path)
    return max(0, info.st_size - 512 * info.st_blocks)


def give_back(path: Path, parts: Iterable[tuple[int, int]]) -> None:
    """Free the blocks of (first byte, length) parts of a file, which then read as zeros; its size stays.

    Where the file system cannot, nothing happens.
    """
    if not can_give_back():
        return
    holes: list[list[int]] = []  # neighbours together: only whole blocks are freed
    for start, length in sorted(parts):
        if holes and sum(holes[-1]) == start:
            holes[-1][1] += length
        else:
            holes.append([start, length])
    with open(path, "r+b") as file:
        for start, length in holes:
            punch_hole(file.fileno(), start, length)
        os.fsync(file.fileno())


def sync_file(path: Path) -> None:
    """Make what a closed file holds durable."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_directory(directory: Path) -> None:
    """Make the entries of ``directory`` durable."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def rename_durably(source: Path, target: Path) -> None:
    """Replace ``target`` by ``source`` atomically: after a crash one of the two states is found, never a mixture."""
    sync_file(source)
    os.replace(source, target)
    sync_directory(target.parent)


def remove(path: Path) -> None:
    """Remove a file or a directory tree if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remedy(path: Path) -> str:
    """Return what to do about a damaged file, or one of a directory's: what a test has tried."""
    directory = path if path.is_dir() else path.parent
    of_store = path.name == FILE or path.is_dir()
    for parent in directory.parents if RANKS in directory.parts else ():
        if parent.name == RANKS:
            directory, of_store = parent.parent, True
    if any((parent / FILE).exists() for parent in list(directory.parents)[:3]):  # RUN/studies/NAME/pieces
        return f"restore it from a copy, or remove {directory} and start the same command again"
    if of_store and (directory / FILE).exists():
        return 'restore it from a copy, or start anew in another run.out or with run.resume = "never"'
    if path.is_dir():
        return "choose another directory"
    return "restore it from a copy, or remove it and start the same command again"


def explain(error: BaseException, path: Path, doing: str) -> StoreError:
    """Turn an error of the operating system or of HDF5 into one sentence with the remedy."""
    code = getattr(error, "errno", None)
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    full = code in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text or "errno = 28" in text
    if not full and isinstance(error, OSError | RuntimeError) and code is None:
        try:  # HDF5 over MPI does not say why it failed
            full = free_bytes(path if path.is_dir() else path.parent) < 1 << 20
        except OSError:
            full = False
    if full:
        return StoreError(
            f"the disk of {path} is full ({doing}): free some space and start the same command again, committed steps "
            f"are safe; to need less, {SAVE_SPACE}"
        )
    if code in (errno.EACCES, errno.EPERM, errno.EROFS):
        return StoreError(f"cannot write in {path} ({os.strerror(code)}): make it writable or choose another run.out")
    reason = text.split("\n", 1)[0].rstrip(". ") or type(error).__name__
    return StoreError(f"{path} cannot be used ({doing}: {reason}): {remedy(path)}")


@contextlib.contextmanager
def explaining(path: Path, doing: str) -> Iterator[None]:
    """Turn whatever goes wrong with a file in the block into a StoreError: h5py and HDF5 raise nearly everything."""
    try:
        yield
    except HpcHessError:
        raise
    except Exception as error:
        raise explain(error, path, doing) from error


def damaged_row(path: Path, probe: int, row: int) -> StoreError:
    """Return the error for a row whose data is not what was written."""
    return StoreError(f"basis row {row} of probe {probe} in {path} is damaged (its checksum does not match): {remedy(path)}")
