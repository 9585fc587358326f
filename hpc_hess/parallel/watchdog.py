"""Who hangs, and in what: each rank's thread tells the others what its rank is doing, and ends it when it waits too long.

Collectives of gloo and of GPUs have timeouts of their own, but do not say who did not come; MPI's have none at all, nor has
a file system. What a rank does is told every few seconds through a connection of its own to the ranks' store, so that a
rank that is stopped, dead or cut off is known by its silence.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

_KEY = "hpc_hess/doing/"
_SLACK_S = 3.0  # a collective that ends by its own timeout does so first, and its rank says more
_SILENT = 2.5  # intervals without a word from a rank that lives
_AT_MOST = 4  # ranks that a message names


class Watchdog:
    """What this rank is doing, for the other ranks, and for how long it may.

    Parameters
    ----------
    connect : opens another connection to the store that all ranks share.
    timeout_s : how long an operation may take.

    """

    def __init__(self, rank: int, size: int, connect: Callable[[], Any], timeout_s: float) -> None:
        self._rank, self._size, self._timeout_s = rank, size, timeout_s
        self._interval_s = min(5.0, timeout_s / 4)
        self._doing: list[tuple[str, float]] = []  # innermost last
        self._store = connect()
        self._lock = threading.Lock()  # the store's connection answers one question at a time
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def doing(self, what: str, *, gil_held: bool = False) -> Iterator[None]:
        """Say that this rank is in ``what``, for no longer than the timeout.

        ``gil_held``: no thread of Python runs meanwhile (h5py in a collective of MPI), so a timer without Python ends the
        process, with a traceback for a message.
        """
        self._doing.append((what, time.monotonic()))
        if gil_held:
            faulthandler.dump_traceback_later(self._timeout_s + 2 * _SLACK_S, exit=True)
        try:
            yield
        finally:
            if gil_held:
                faulthandler.cancel_dump_traceback_later()
            self._doing.pop()

    def close(self) -> None:
        """Watch no longer."""
        self._over.set()
        self._thread.join(self._interval_s)

    def absent(self) -> str:
        """Return what is known of the ranks that may be missed, as "; rank 3 ...", or "". Collective: no."""
        keys = [f"{_KEY}{rank}" for rank in range(self._size)]
        told = self._ask(lambda store: store.multi_get(keys))
        if told is None:
            return "; rank 0, through which ranks find each other, does not answer: it is gone or hangs"
        mine = self._here()
        words = []
        for rank, text in enumerate(told):
            at, what, for_s = json.loads(text)
            silent_s = time.time() - at
            if rank == self._rank or (silent_s < _SILENT * self._interval_s and what == mine):
                continue
            heard = f"has not been heard of for {silent_s:.0f} s, then " if silent_s >= _SILENT * self._interval_s else ""
            words.append((not heard, f"rank {rank} {heard}was in '{what}' for {for_s:.0f} s"))
        words.sort()  # the silent ones first
        more = f", and {len(words) - _AT_MOST} ranks more" if len(words) > _AT_MOST else ""
        return "".join(f"; {text}" for _, text in words[:_AT_MOST]) + more

    def _here(self) -> str:
        doing = list(self._doing)
        return doing[-1][0] if doing else "its own work"

    def _run(self) -> None:
        while not self._over.is_set():
            self._tell()
            self._over.wait(self._interval_s)
            now = time.monotonic()
            for what, since in list(self._doing):
                if now - since > self._timeout_s + _SLACK_S and not self._over.is_set():
                    self._end(what, now - since)

    def _tell(self) -> None:
        doing = list(self._doing)
        what, since = doing[-1] if doing else ("its own work", time.monotonic())
        text = json.dumps([time.time(), what, time.monotonic() - since])
        self._ask(lambda store: store.set(f"{_KEY}{self._rank}", text))

    def _ask(self, question: Callable[[Any], Any]) -> Any:
        """Ask the store; None once it has failed: c10d complains at length about every further attempt."""
        with self._lock:
            try:
                return None if self._store is None else question(self._store)
            except RuntimeError:
                self._store = None
                return None

    def _end(self, what: str, seconds: float) -> None:
        """End this process, whose main thread waits where no exception can reach it."""
        text = f"'{what}' did not end within {seconds:.0f} s{self.absent()}"
        print(f"hpc-hess: error [rank {self._rank}]: {text}; parallel.timeout_s is the limit", file=sys.stderr, flush=True)
        os._exit(1)
