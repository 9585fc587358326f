"""Exact curvature products of a sharded causal LM: no step size, no second backward through FSDP."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import nn

from hpc_hess.curvature.exact.cross_entropy import HESSIAN, Start
from hpc_hess.curvature.exact.repaying import Repaying
from hpc_hess.curvature.exact.self_check import Choice, choose_way, kinds
from hpc_hess.curvature.exact.streaming import Settings, Sweeps
from hpc_hess.curvature.exact.tangents import Way
from hpc_hess.errors import ModelError, NumericsError, SplitError
from hpc_hess.model.blocks.blocks import SplitModel
from hpc_hess.model.blocks.exchange import Exchange
from hpc_hess.model.blocks.recording import record
from hpc_hess.model.blocks.splice import differentiable_kernels
from hpc_hess.model.sharded.accumulation import Unwatched, Watch
from hpc_hess.model.sharded.loss import TokenObjective
from hpc_hess.model.sharded.precision import honest_casts
from hpc_hess.model.sharded.shard import ShardedModel
from hpc_hess.parallel.in_step import in_step
from hpc_hess.parallel.memory import reusing_freed_pages
from hpc_hess.parallel.vector import Vector


class StreamedOperator:
    """A curvature matrix of the token-weighted mean loss, by products streamed block by block.

    Attributes
    ----------
    space : the vectors it acts on.
    num_products : directions multiplied so far.
    watch : sees the sums over micro-batches grow.
    start : what the way back starts with at the logits: it makes the matrix. Of the class.
    arithmetic : a context that products are made in.
    notes : sentences for the log and the report: kernels that were switched, a slower way that was needed. Products add to
        them what is compiled, and what cannot be.
    repaying : whether the blocks are compiled.

    Parameters
    ----------
    model : holds the shards of the parameters.
    objective : the micro-batches of this rank; every rank has equally many.
    plain : the model without FSDP's hooks, its parameters on the meta device; needed when the model is sharded
        (a deepcopy of the skeleton, made before sharding).
    compute_dtype : of the sweeps; tangents are summed in the vectors' dtype.
    settings : how the sweeps run; its ``way`` and ``lock_step`` are what is tried first.
    choose : finds the way that suits the model's blocks.

    Construction records one forward pass and checks every kind of block against plain double backward on the first
    micro-batch. Collective: yes.

    Raises
    ------
    SplitError : the model cannot be split into blocks.
    ModelError : dropout is on, the loss is not the causal LM's, no second derivative. On every rank, if on any.

    """

    start: Start = HESSIAN

    def __init__(
        self,
        model: ShardedModel,
        objective: TokenObjective,
        *,
        plain: nn.Module | None = None,
        compute_dtype: torch.dtype | None = None,
        settings: Settings | None = None,
        choose: Callable[..., Choice] = choose_way,
    ) -> None:
        if not isinstance(objective, TokenObjective):
            raise ModelError(
                "exact products block by block need the default loss of tokens (they take its derivatives in closed form): "
                'use operator.method = "finite_difference" with a loss of your own'
            )
        if model.sharded and plain is None:
            raise ModelError("a sharded model needs its skeleton without hooks for exact products: pass plain")
        self.space, self.num_products = model.space, 0
        self.watch: Watch = Unwatched()
        self.arithmetic: Callable[[], AbstractContextManager[None]] = nullcontext
        self._model, self._scale = model, 1.0 / objective.num_tokens
        self._batches = [batch.to(objective.device) for batch in objective.micro_batches]
        self._exchange = Exchange(model, compute_dtype)
        if plain is not None:
            move_buffers(plain, model.space.device)
        module = plain if plain is not None else model.module
        self._settings = replace(settings or Settings(), start=self.start)
        apart = SplitError(f"cannot split {type(module).__name__}: the ranks' data take different ways through its blocks")
        with (
            in_step(model.world, "preparing the exact product", apart) as agree_on,
            differentiable_kernels(module) as notes,
            honest_casts(self._exchange.dtype),
        ):

            def fetch(names: list[str]) -> dict[str, torch.Tensor]:
                agree_on(names)
                with model.world.guard("preparing the exact product"):
                    return self._exchange.parameters(names)

            self._split = SplitModel(module)
            boundaries = record(self._split, self._batches[0], fetch, self._batches[1:])
            choice = choose(self._split, self._batches[0], boundaries, fetch)
        self.notes = [*notes, *choice.notes]
        self.repaying = Repaying(self._settings, model.world, len(kinds(self._split)), self._kernels, self.notes)
        agree = model.world.all_true
        way: Way = "dual" if agree(choice.way == "dual", "the exact product's way") else "reverse"
        self._settings = replace(
            self._settings,
            way=way,
            lock_step=agree(choice.lock_step and self._settings.lock_step, "the exact product's lock-step"),
        )

    def follow(self, watch: Watch) -> None:
        """Have ``watch`` see the sums grow from here on."""
        self.watch = watch

    @property
    def lock_step(self) -> bool:
        """Whether several directions share a sweep: the same on every rank."""
        return self._settings.lock_step

    def matvec(self, v: Vector) -> Vector:
        """Return the product with ``v`` as a new Vector. Collective: yes.

        Raises
        ------
        NumericsError : a tangent is not finite; names the part of the model where it first was not.

        """
        return self.matmat([v])[0]

    def matmat(self, vectors: Sequence[Vector]) -> list[Vector]:
        """Return the products with several vectors, sharing all work that does not depend on the vector.

        Memory grows with the number of vectors: one block's directions and tangents, all boundary tangents.
        Collective: yes. Raises NumericsError as :meth:`matvec`.
        """
        results = [self.space.zeros() for _ in vectors]
        groups = [range(len(vectors))] if self._settings.lock_step else [[k] for k in range(len(vectors))]
        with self._kernels(), reusing_freed_pages(), self.arithmetic():
            for group in groups:
                self._exchange.begin([vectors[k].data for k in group], [results[k].data for k in group])
                with self.repaying.programs(len(group), self.space.device) as programs:
                    sweeps = Sweeps(self._split, self._exchange, self._settings, programs)
                    sweeps.run(self._batches, self._scale, self.watch, more=group is not groups[-1])
                    self._exchange.finish()
                for k in group:
                    sweeps.health.note("the tangents of a weight gradient", [results[k].data.sum()])
                self._require_finite(sweeps)
        self.num_products += len(vectors)
        return results

    @contextmanager
    def _kernels(self) -> Iterator[None]:
        """Have every operation of the model differentiable, and of its precision."""
        with differentiable_kernels(self._split.module), honest_casts(self._exchange.dtype):
            yield

    def _require_finite(self, sweeps: Sweeps) -> None:
        checks = sweeps.health.checks
        bad = ~torch.stack([ok for _, ok in checks])
        flags = self._model.world.sum_over_ranks(bad.double(), "finite tangents")
        if not bool((flags == 0).all()):
            where = checks[int(flags.nonzero()[0])][0]
            raise NumericsError(
                f"the exact product is not finite, first in {where}: check the weights and model.compute_dtype"
            )


class ExactHessian(StreamedOperator):
    """Hessian of the mean loss."""


def move_buffers(module: nn.Module, device: torch.device) -> None:
    """Take a module's buffers to ``device``; its parameters stay where they are."""
    for owner in module.modules():
        for key, buffer in owner._buffers.items():
            if buffer is not None and buffer.device != device:
                owner._buffers[key] = buffer.to(device)
