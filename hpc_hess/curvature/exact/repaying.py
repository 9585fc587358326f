"""Whether a model's stages are compiled: the products that are left must repay it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hpc_hess.curvature.exact.programs import Kernels, Programs, why_not
from hpc_hess.curvature.exact.streaming import Settings
from hpc_hess.parallel.world import World

PROGRAM_S = 25.0  # of compiling one function of a stage: benchmarks/results/compiled.md
GAIN = 0.25  # the share of a product's time that compiling saves: there too


class Repaying:
    """Gives the programs to a product, or none.

    With "auto" a product is computed without them at first. As many vectors as are expected are then taken to be left, or as
    many as there were already: so programs cost at most about what they would have saved.

    Attributes
    ----------
    widths : numbers of directions for which programs are used.

    """

    def __init__(self, settings: Settings, world: World, num_kinds: int, kernels: Kernels, notes: list[str]) -> None:
        self._mode, self._expected, self._world, self._notes = settings.compile, settings.products, world, notes
        self._count = 2 * num_kinds + 1  # there and back of each kind of block, and the loss
        self._kernels, self._directory = kernels, settings.programs
        self._programs: Programs | None = None
        self._done = dict[int, int]()  # vectors multiplied without programs, by width
        self.widths: set[int] = set()

    @property
    def seconds(self) -> float:
        """Spent on making programs."""
        return 0.0 if self._programs is None else self._programs.seconds

    @contextmanager
    def programs(self, width: int, device: torch.device) -> Iterator[Programs | None]:
        """Give what runs the stages in a product with ``width`` vectors. Collective: yes."""
        if (self._mode == "on" or width in self.widths) and self._able(device):
            yield self._programs
            return
        began = time.perf_counter()
        yield None
        if self._mode == "auto":
            self._weigh(width, time.perf_counter() - began, device)

    def _weigh(self, width: int, seconds: float, device: torch.device) -> None:
        """Decide for the products that follow, the same on every rank. ``seconds`` of a product that was not compiled."""
        self._done[width] = self._done.get(width, 0) + width
        left = max(self._expected - sum(self._done.values()), self._done[width])
        each_s = self._world.max_over_ranks(seconds, "time of an exact product") / width
        cost_s = PROGRAM_S * self._count
        if GAIN * each_s * left > cost_s and self._able(device):
            self.widths.add(width)
            self._notes.append(
                f"from here on compiled: about {left} products of {each_s:.3g} s are left, and {self._count} programs take "
                f"{cost_s / 60:.0f} min, once"
            )

    def _able(self, device: torch.device) -> bool:
        """Return whether all ranks can compile, or none will. Collective: yes, the first time."""
        if self._programs is None and self._mode != "off":
            reason = why_not(device)
            if self._world.all_true(not reason, "can every rank compile?"):
                self._programs = Programs(self._kernels, self._directory, self._notes)
            else:
                self._notes.append(f"exact products are not compiled: {reason or 'another rank cannot'}")
                self._mode = "off"
        return self._programs is not None
