"""Runs in the test's own process or on ranks, to the end or stopped by a signal after so many micro-batches."""

from __future__ import annotations

import os
import signal
from unittest import mock

import torch

from hpc_hess.commands.run.work import run
from hpc_hess.config import Config
from hpc_hess.parallel.world import World
from hpc_hess.session.partial_products import ProductWatch


class Signals:
    """Counts the micro-batches that a run adds to its sums; sends this process USR1 after ``at`` of them."""

    def __init__(self, at: int | None) -> None:
        self.at, self.added = at, 0

    def __enter__(self) -> Signals:
        original = ProductWatch.added

        def added(watch: ProductWatch, index: int, sums: list[torch.Tensor], *, more: bool = True) -> None:
            self.added += 1
            if self.added == self.at:
                os.kill(os.getpid(), signal.SIGUSR1)
            original(watch, index, sums, more=more)

        self._patches = [mock.patch.object(ProductWatch, "added", added)]
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(self, *exc: object) -> None:
        for patch in self._patches:
            patch.stop()


def go(world: World, config: Config, at: int | None = None) -> tuple[int, int]:
    """Return the exit code and the micro-batches that were computed; every rank gets the signal."""
    with Signals(at) as signals:
        return run(config, world), signals.added


def on_ranks(world: World, config: Config) -> int:
    """``run`` as run_ranks calls it."""
    return run(config, world)
