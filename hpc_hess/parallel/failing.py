"""How a job fails: one rank speaks for all, and the others wait a moment before they leave."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import torch.distributed as dist

_KEY = "hpc_hess/failure"
_LINGER_S = 3.0


def first_to_fail(rank: int, *, secondary: bool) -> bool:
    """Elect one rank to speak. A rank that only noticed another's end waits a moment for that one to speak."""
    if secondary:
        time.sleep(1.0 + 0.1 * min(rank, 10))
    try:
        return _store().compare_set(_KEY, "", str(rank)).decode() == str(rank)
    except (RuntimeError, UnicodeDecodeError):
        return not secondary or rank == 1  # rank 0, which serves the store, is gone


def linger(size: int) -> None:
    """Wait a moment for the others to fail too: the first to leave makes the launcher end the rest, unheard.

    Rank 0 may serve the store in which they ask who speaks. A rank that hangs costs the whole moment.
    """
    deadline = time.monotonic() + _LINGER_S
    with contextlib.suppress(RuntimeError):  # the store is gone, and so is its rank
        store = _store()
        here = store.add(_KEY + "/here", 1)
        while here < size and time.monotonic() < deadline:
            time.sleep(0.05)
            here = store.add(_KEY + "/here", 0)


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()
