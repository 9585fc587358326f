"""A rank whose launcher is gone: it ends as by SIGTERM, instead of waiting for ranks that nobody starts or ends any more.

The launcher of a rank is its nearest ancestor that does not have the launcher's variables itself: torchrun's agent, mpirun
or its daemon, slurmstepd; shells that wrap the rank have them. It is looked at from a thread. (The system can send a
signal instead, but does so when the thread of the parent ends: some launchers start ranks from threads of their own.)
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Mapping
from typing import NamedTuple

from hpc_hess.system import name_of, status_of, variables_of

_EVERY_S = 1.0
_TRIES = 10
# what only a rank's own environment holds: by hand, nobody sets these
_MARKERS = (
    "TORCHELASTIC_RUN_ID",
    "OMPI_COMM_WORLD_RANK",
    "MPI_LOCALRANKID",
    "PALS_LOCAL_RANKID",
    "JSM_NAMESPACE_RANK",
    "MV2_COMM_WORLD_RANK",
    "SLURM_STEP_ID",
)


# what a rank whose launcher ended has for a parent, unless that is a launcher itself: in a container it may be process 1
_REAPERS = ("systemd", "init")
_LAUNCHERS = ("python", "torch", "mpi", "orte", "prte", "hydra", "pals", "jsm", "slurm")


class Process(NamedTuple):
    """A process: its number, and when it started, since numbers are used again."""

    number: int
    started: str


def find_launcher(env: Mapping[str, str]) -> Process | None:
    """Return the process that started this rank, None where no launcher is known or the system does not tell.

    It may be gone already: then the rank has been given to another parent. Collective: no.
    """
    marker = next((name for name in _MARKERS if name in env), "")
    for _ in range(_TRIES if marker else 0):
        try:
            return _nearest_without(marker)
        except (OSError, ValueError):  # a process ended while it was looked at
            time.sleep(0.01)
    return None


def _nearest_without(marker: str) -> Process | None:
    """Return the nearest ancestor that was started without a variable. Raises OSError: one has ended."""
    number = os.getppid()
    while number > 0:
        _, parent, started = status_of(number)
        try:
            variables = variables_of(number)
        except PermissionError:  # another user's, so not a wrapper of ours
            variables = []
        if not any(variable.startswith(f"{marker}=".encode()) for variable in variables):
            return _GONE if _is_reaper(number) else Process(number, started)
        number = parent
    return None


_GONE = Process(0, "")


def _is_reaper(number: int) -> bool:
    name = name_of(number)
    return name in _REAPERS or (number == 1 and not any(part in name for part in _LAUNCHERS))


def is_gone(process: Process) -> bool:
    """Return whether a process has ended, or is but not yet waited for."""
    try:
        state, _, started = status_of(process.number)
    except (OSError, ValueError):
        return True
    return state in "ZX" or started != process.started


def end_with_launcher(env: Mapping[str, str]) -> None:
    """From now on, send this process SIGTERM when its launcher ends. Collective: no.

    Before there is anything to commit that ends the process; a run commits what it can, and ends with code 75.
    """
    launcher = find_launcher(env)
    if launcher is not None:
        threading.Thread(target=_watch, args=(launcher,), name="launcher", daemon=True).start()


def _watch(launcher: Process) -> None:
    while not is_gone(launcher):
        time.sleep(_EVERY_S)
    _keep_writable()
    with contextlib.suppress(OSError, ValueError):
        print("hpc-hess: the launcher is gone: stopping as at a signal", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)


def _keep_writable() -> None:
    """Let what is printed go nowhere where it went to the launcher: no command fails because nobody reads it."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for file in (1, 2):
        poll = select.poll()
        poll.register(file, 0)
        if any(events & (select.POLLERR | select.POLLHUP | select.POLLNVAL) for _, events in poll.poll(0)):
            os.dup2(nowhere, file)
    os.close(nowhere)
