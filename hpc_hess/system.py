"""What only Linux and its C library have, of files, memory and processes; programs do without where it is missing.

There (a laptop with macOS) one process runs; :func:`missing` says what it lacks.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import os
import platform
import resource
import socket
import sys
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import IO, Any

_PROCESSES = Path("/proc")


def missing(ranks: int) -> str:
    """Return what a user should know that this system cannot do for so many ranks, "" on Linux."""
    lost = []
    if not can_give_back():
        lost.append("disk space is neither reserved ahead nor given back row by row")
    if ranks > 1 and not hasattr(os, "memfd_create"):
        lost.append("ranks exchange parameters through sockets")
    if ranks > 1 and not has_processes():
        lost.append("ranks do not see that their launcher has ended")
    return f"not on Linux: {', '.join(lost)}" if lost else ""


# -- disk space ----------------------------------------------------------------------------------------------------------

_PUNCH_HOLE = 1 | 2  # and keep the size: linux/falloc.h
_NOT_HERE = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV)


def _c_library() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def can_give_back() -> bool:
    """Return whether :func:`allocate` and :func:`punch_hole` can do anything, if the file system lets them."""
    return hasattr(_c_library(), "fallocate")


def allocate(file: IO[bytes]) -> bool:
    """Allocate every block of an open file; return whether system and file system can. Raises OSError.

    fallocate itself, not posix_fallocate: where the file system has none, the latter writes to every block of what may be
    terabytes.
    """
    library = _c_library()
    if not hasattr(library, "fallocate"):
        return False
    size = os.fstat(file.fileno()).st_size
    while size and library.fallocate(file.fileno(), 0, ctypes.c_int64(0), ctypes.c_int64(size)) != 0:
        code = ctypes.get_errno()
        if code in _NOT_HERE:
            return False
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code), str(file.name))
    return True


def punch_hole(file: int, start: int, length: int) -> None:
    """Free the whole blocks of a part of an open file, which then reads as zeros. Where that is not possible: nothing."""
    library = _c_library()
    if hasattr(library, "fallocate"):
        library.fallocate(file, _PUNCH_HOLE, ctypes.c_int64(start), ctypes.c_int64(length))


def drop_pages(file: int, start: int, length: int) -> None:
    """Drop a part of an open file, which is on disk, from memory. Elsewhere the system does so when it needs the memory."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, start, length, os.POSIX_FADV_DONTNEED)


# -- memory of this process ----------------------------------------------------------------------------------------------

# limit, usage, statistics, and there the file pages that can be dropped though they count as used
_VERSION_2 = ("memory.max", "memory.current", "memory.stat", "inactive_file")
_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat", "total_inactive_file")


def group_bytes_free(root: Path = Path("/sys/fs/cgroup"), own: Path = _PROCESSES / "self/cgroup") -> Iterator[int]:
    """Yield what each control group around this process has left: version 2 at ``root`` itself, version 1 in memory/.

    ``own`` lists this process's groups; Slurm limits a job and a step in groups one within the other.
    """
    with contextlib.suppress(OSError):
        for line in own.read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0" or "memory" in controllers.split(","):
                top, names = (root, _VERSION_2) if number == "0" else (root / "memory", _VERSION_1)
                group = Path(path.lstrip("/"))
                for folder in (group, *group.parents):
                    with contextlib.suppress(OSError, ValueError, StopIteration):  # the root has none; "max" is none
                        yield _left(top / folder, *names)


def _left(folder: Path, limit: str, used: str, statistics: str, droppable: str) -> int:
    words = (line.split() for line in (folder / statistics).read_text().splitlines())
    can_go = next(int(value) for key, value in words if key == droppable)
    return int((folder / limit).read_text()) - int((folder / used).read_text()) + can_go


def peak_resident_bytes() -> int:
    """Return the most memory that this process has held. The system's own unit is kB on Linux, bytes on macOS."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# mallopt's parameters from glibc's malloc.h, and the values that it comes to by itself in a program like this
_MMAP_MAX, _MMAP_THRESHOLD, _TRIM_THRESHOLD = -4, -3, -1
_USUAL = {_MMAP_MAX: 1 << 16, _MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20}
_reusing = False


@contextlib.contextmanager
def reusing_freed_pages() -> Iterator[None]:
    """Inside, freed buffers of any size are kept for the next ones; all go back to the system at the end. glibc only.

    Else each large buffer is mapped afresh and the system clears its pages: a third of a lock-step product's time on a
    CPU, 13 to 25 % of a gradient's. Not for longer than a product: what outlives a buffer's neighbours would leave holes
    of the size of vectors. A block within another changes nothing.
    """
    global _reusing
    if _reusing:
        yield
        return
    try:
        library = _c_library()
        mallopt, trim = library.mallopt, library.malloc_trim
    except (OSError, AttributeError):
        yield
        return
    mallopt(_TRIM_THRESHOLD, -1)
    mallopt(_MMAP_MAX, 0)
    _reusing = True
    try:
        yield
    finally:
        _reusing = False
        for key, value in _USUAL.items():
            mallopt(key, value)
        trim(0)


def give_pages_back() -> None:
    """Give pages that are free in this process back to the system. glibc only."""
    with contextlib.suppress(OSError, AttributeError):
        _c_library().malloc_trim(0)


def ask_for_large_pages(env: MutableMapping[str, str]) -> None:
    """Have torch, which reads it once, put large tensors in huge pages: a third of the page faults, a lower peak."""
    env.setdefault("THP_MEM_ALLOC_ENABLE", "1")


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Look for no garbage inside: modules make a million objects that stay, and each search would visit them all."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


# -- memory that processes share -----------------------------------------------------------------------------------------


def shared_file(size: int) -> int:
    """Open memory of ``size`` bytes as a file that lives as long as a process holds it; return its descriptor.

    Raises OSError or AttributeError where the system does not give it.
    """
    file = os.memfd_create("hpc_hess")
    try:
        os.posix_fallocate(file, 0, size)  # else a full memory would kill at the first touch
    except OSError:
        os.close(file)
        raise
    return file


def open_of(process: int, file: int) -> int:
    """Open a file that another process holds, by its descriptor there, to read and write. Raises OSError."""
    return os.open(f"{_PROCESSES}/{process}/fd/{file}", os.O_RDWR)


def machine() -> str:
    """Return what tells this system, since it was started, and its process numbers from all others; "" where unknown.

    On another machine, or in another container, the same process number is a process that is none of ours.
    """
    try:
        return (_PROCESSES / "sys/kernel/random/boot_id").read_text().strip() + os.readlink(_PROCESSES / "self/ns/pid")
    except OSError:
        return ""


# -- processes -----------------------------------------------------------------------------------------------------------


def has_processes() -> bool:
    """Return whether this system shows processes as files."""
    return (_PROCESSES / "self/stat").exists()


def status_of(process: int) -> tuple[str, int, str]:
    """Return a process' state (Z and X: ended), parent and start. Raises OSError: there is none, or it cannot be told."""
    fields = (_PROCESSES / f"{process}/stat").read_text().rpartition(")")[2].split()  # its name may hold spaces
    return fields[0], int(fields[1]), fields[19]


def name_of(process: int) -> str:
    """Return the name of a process' program. Raises OSError as :func:`status_of`."""
    return (_PROCESSES / f"{process}/comm").read_text().strip()


def variables_of(process: int) -> list[bytes]:
    """Return "NAME=VALUE" of the environment a process was started with. Raises PermissionError: another user's; OSError."""
    return (_PROCESSES / f"{process}/environ").read_bytes().split(b"\0")


def reads_a_terminal(process: int) -> bool:
    """Return whether the input of a process is a terminal. Raises OSError as :func:`variables_of`."""
    return os.readlink(f"{_PROCESSES}/{process}/fd/0").startswith(("/dev/pts/", "/dev/tty"))


# -- the machine ---------------------------------------------------------------------------------------------------------


def cpu_name() -> str:
    """Return the name of the CPU, at least its architecture."""
    try:
        lines = (_PROCESSES / "cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def loopback() -> str:
    """Return the name of the loopback interface: lo on Linux, lo0 on macOS and BSD."""
    return next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), "lo")
