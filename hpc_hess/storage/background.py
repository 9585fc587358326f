"""Work that goes on beside the program: one thread, one thing at a time, no error lost. No communication."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class Background:
    """Runs functions one after the other in a thread of its own; without ``threads`` at once, in the caller's."""

    def __init__(self, *, threads: bool) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="store") if threads else None

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Return a Future of ``function(*arguments)``, whose result() raises what the function raised."""
        if self._pool is not None:
            return self._pool.submit(function, *arguments)
        future: Future[Any] = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future

    def close(self, *, wait: bool = True) -> None:
        """Start nothing more; wait for what is running unless told not to."""
        if self._pool is not None:
            self._pool.shutdown(wait=wait, cancel_futures=not wait)
