"""The gradient of an objective at the parameters the model holds now."""

from __future__ import annotations

import math
import time

import torch

from hpc_hess.errors import NumericsError
from hpc_hess.model.sharded.accumulation import Unwatched, Watch
from hpc_hess.model.sharded.loss import Objective
from hpc_hess.model.sharded.routing import Routing
from hpc_hess.model.sharded.shard import ShardedModel
from hpc_hess.parallel.memory import reusing_freed_pages
from hpc_hess.parallel.vector import Vector


class Gradient:
    """Loss and gradient over the whole data set.

    ``seconds`` holds the duration of every full evaluation on this rank. ``routing`` freezes (or counts)
    mixture-of-experts decisions. The watch sees the sums grow.
    """

    def __init__(self, model: ShardedModel, objective: Objective, routing: Routing | None = None) -> None:
        self.model, self.objective = model, objective
        self.routing = routing or Routing(model.module, "free")
        self.watch: Watch = Unwatched()
        self.seconds: list[float] = []

    def follow(self, watch: Watch) -> None:
        """Have ``watch`` see the sums grow from here on."""
        self.watch = watch

    def over(self, objective: Objective) -> Gradient:
        """Return the gradient of another objective of the same model."""
        return Gradient(self.model, objective, self.routing)

    @property
    def num_evaluations(self) -> int:
        """Full evaluations so far."""
        return len(self.seconds)

    def __call__(self, out: Vector | None = None, *, micro_batches: int | None = None) -> tuple[float, Vector]:
        """Return (loss, gradient) at the current parameters; the gradient is written to ``out`` if given.

        ``micro_batches`` limits the sum to the first ones (self-checks). The loss is nan where the watch had a part of
        the sum already. Collective: yes.

        Raises
        ------
        NumericsError : the loss is not finite; names the first sample whose loss is not.
        CollectiveError : another rank died or hangs.

        """
        model = self.model
        if out is None:
            out = model.space.zeros()
        else:
            out.data.zero_()
        count = min(self.objective.num_micro_batches, micro_batches or 1 << 62)
        whole = micro_batches is None
        began = time.perf_counter()
        first = self.watch.begin([out.data], count) if whole else 0
        model.attach_gradients(out.data)
        parts: list[torch.Tensor] = []
        ids: list[int] = []
        self.routing.begin()
        try:
            with reusing_freed_pages():
                for index in range(first, count):
                    self.routing.micro_batch = index
                    with model.world.guard(f"gradient, micro-batch {index + 1} of {count}"):
                        with model.world.timers.phase("forward"):
                            contribution = self.objective.contribution(model.module, index)
                        with model.world.timers.phase("backward"):
                            model.backward(contribution.total)
                    parts.append(contribution.per_sample.double())
                    ids.extend(contribution.sample_ids)
                    if whole:
                        self.watch.added(index, [out.data])
        finally:
            self.routing.end()
            model.detach_gradients()
        if not model.sharded:  # FSDP has summed what is sharded
            model.world.sum_over_replicas(out.data, "gradient")
        if not parts:
            return math.nan, out
        losses = torch.cat(parts)
        self._check_losses(losses, ids)
        total = model.world.sum_over_ranks(losses.sum().reshape(1), "loss")
        loss = float(total)  # waits for the device
        if first:
            return math.nan, out
        if whole:
            self.seconds.append(time.perf_counter() - began)
        return loss, out

    def at_theta0(self) -> tuple[float, Vector]:
        """Return (loss, gradient); record the experts' routing for perturbed gradients to repeat. Collective: yes."""
        self.routing.recording = True
        try:
            return self()
        finally:
            self.routing.recording = False

    def _check_losses(self, losses: torch.Tensor, ids: list[int]) -> None:
        finite = torch.isfinite(losses)
        first = math.inf if finite.all() else min(ids[i] for i in (~finite).nonzero().flatten().tolist())
        lowest = -self.model.world.max_over_ranks(-first, "loss check")
        if math.isfinite(lowest):
            raise NumericsError(
                f"the loss of sample {int(lowest)} is not finite at the current parameters; check that sample, the "
                "weights, and model.compute_dtype"
            )
