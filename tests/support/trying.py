"""Try something in a process of its own and name how it ended: what HDF5 or an endless loop can do spoils no test."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import NamedTuple

from hpc_hess.errors import HpcHessError


class Ended(NamedTuple):
    """How a call ended: "code" (an exit code), "refused" (a sentence), "traceback", "crash" or "late"."""

    how: str
    text: str

    @property
    def good(self) -> bool:
        """Whether a user saw a result or a sentence."""
        return self.how in ("code", "refused")


def try_apart(call: Callable[[], object], limit_s: float = 60.0) -> Ended:
    """Fork, call, and return how it ended. ``call`` must not need the threads of this process."""
    receive, send = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os.close(receive)
        signal.alarm(int(limit_s))
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        try:
            answer = ("code", str(call()))
        except HpcHessError as error:
            answer = ("refused", f"{error.exit_code}: {error}")
        except BaseException as error:
            where = "".join(traceback.format_tb(error.__traceback__)[-3:])
            answer = ("traceback", f"{type(error).__name__}: {error}\n{where}")
        with os.fdopen(send, "wb") as pipe:
            pipe.write("\0".join(answer).encode("utf-8", "backslashreplace"))
        os._exit(0)
    os.close(send)
    with os.fdopen(receive, "rb") as pipe:
        said = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return Ended("late" if number == signal.SIGALRM else "crash", signal.Signals(number).name)
    how, _, text = said.partition("\0")
    return Ended(how, text)
