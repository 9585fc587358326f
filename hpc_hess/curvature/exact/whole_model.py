"""Exact products of a model taken as one stage: where its blocks cannot be told apart, and for a loss of one's own.

All parameters and a direction are gathered on every rank, which differentiates its own micro-batches; the tangents are
reduced and scattered once, at the end. That needs memory for several copies of the parameters, so it is estimated and
agreed upon before anything is gathered. Whatever depends on the parameters is seen by autograd itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from hpc_hess.curvature.exact.cross_entropy import HESSIAN, Start, starting_cotangents
from hpc_hess.curvature.exact.exact import StreamedOperator, move_buffers
from hpc_hess.curvature.exact.self_check import disagreement, widened
from hpc_hess.curvature.exact.streaming import Settings
from hpc_hess.curvature.exact.tangents import Several, Stage, Tensors, Way, pull_again, push, push_keeping
from hpc_hess.errors import ModelError, NumericsError, SplitError, first_line
from hpc_hess.model.blocks.blocks import require_eval
from hpc_hess.model.blocks.exchange import Exchange
from hpc_hess.model.blocks.splice import (
    BufferWatch,
    Places,
    differentiable_kernels,
    own_buffers,
    parameter_places,
    plain_forward,
    replaced_forwards,
    substituted,
)
from hpc_hess.model.sharded.loss import LabelObjective, TokenObjective
from hpc_hess.model.sharded.own_loss import CallableObjective
from hpc_hess.model.sharded.precision import honest_casts
from hpc_hess.model.sharded.shard import ShardedModel
from hpc_hess.parallel.memory import device_bytes_free, gigabytes
from hpc_hess.parallel.vector import Vector

_TANGENTS = 4  # of one micro-batch: the gradient and its tangent; their sum; what is sent to the other ranks
_GRAPH = 4  # what two derivatives hold over what one forward pass saves: measured 2.3 to 4.0 on a Llama


class WholeModel:
    """A curvature matrix of a mean loss, by products through the whole model at once.

    Attributes, ``matvec`` and ``matmat`` as of StreamedOperator; directions are multiplied one after the other.

    Parameters
    ----------
    model, plain, compute_dtype : as for StreamedOperator.
    objective : of tokens or labels, or a loss of one's own (the Hessian).
    start : what the way back starts with at the logits: it makes the matrix.
    reason : why the model is not split into blocks, for the notes.
    reserved : bytes of this rank's memory that are spoken for, though still free.

    Construction runs the loss of one micro-batch twice and compares two ways to a product. Collective: yes.

    Raises
    ------
    ModelError : it does not fit into memory (says what it needs and what is free), it has no second derivative, it is
        random, or in training mode. On every rank, if on any.

    """

    lock_step = False

    def __init__(
        self,
        model: ShardedModel,
        objective: LabelObjective | CallableObjective,
        start: Start = HESSIAN,
        *,
        plain: nn.Module | None = None,
        compute_dtype: torch.dtype | None = None,
        reason: str = "",
        reserved: int = 0,
    ) -> None:
        own_loss = isinstance(objective, CallableObjective)
        if own_loss and start is not HESSIAN:
            raise ModelError("of a loss of one's own only the Hessian is known")
        if isinstance(objective, LabelObjective) and start is not HESSIAN and objective.loss != "cross_entropy":
            raise ModelError('the labels are numbers, of which only the Hessian is known: set operator.kind = "hessian"')
        if model.sharded and plain is None:
            raise ModelError("a sharded model needs its skeleton without hooks for exact products: pass plain")
        self.space, self.num_products, self._start = model.space, 0, start
        self._model, self._objective, self._own_loss = model, objective, own_loss
        self._module = plain if plain is not None else model.module
        move_buffers(self._module, model.space.device)
        self._exchange = Exchange(model, compute_dtype)
        self._places = parameter_places(self._module)
        self._selected = [parameter.name for parameter in model.layout.parameters]
        # a loss of one's own may hold parameters of any dtype, which stay where they are unless they are sharded
        own_places = own_loss and not model.sharded
        self._names = self._selected if own_places else [name for name, _ in self._module.named_parameters()]
        self._way: Way = "dual"
        self._written: Places = []  # buffers that a forward pass writes
        self._batches = [i for i in range(objective.num_micro_batches) if not self._is_dummy(i)]
        self._reason, self._reserved = reason, reserved
        self.notes: list[str] = []
        self.arithmetic: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
        self._prepare()

    def matvec(self, v: Vector) -> Vector:
        """Return the product with ``v`` as a new Vector. Collective: yes.

        Raises
        ------
        NumericsError : a tangent is not finite; names the first parameter that is not finite, or whose tangent is not.

        """
        result = self.space.zeros()
        self._exchange.begin([v.data], [result.data])
        guard = self._model.world.guard
        with guard("exact product, parameters of the whole model"):
            full, stacked = self._exchange.fetch(self._names)
        W = {name: full[name] for name in stacked}
        V = {name: rows[0] for name, rows in stacked.items()}
        total = {name: torch.zeros(t.shape, dtype=self.space.dtype, device=t.device) for name, t in W.items()}
        with self._model.world.together("exact product"), self._running(full), self.arithmetic():
            for index in self._batches:
                for name, tangent in self._tangents(index, W, V, self._way).items():
                    total[name].add_(tangent)
        with guard("exact product, tangents of the whole model"):
            self._exchange.add({name: t[None] for name, t in total.items()})
        self._exchange.finish()
        self._require_finite(W, total)
        self.num_products += 1
        return result

    def matmat(self, vectors: Sequence[Vector]) -> list[Vector]:
        """Return the products with several vectors, one after the other. Collective: yes."""
        return [self.matvec(v) for v in vectors]

    # -- the stage ---------------------------------------------------------------------------------------------------

    def _tangents(self, index: int, W: Tensors, V: Tensors, way: Way) -> Tensors:
        """Return one micro-batch's share of the product."""
        if self._start is HESSIAN:
            pull = pull_again(lambda W, _: self._loss(index, W), W, V, (), (), way, gauss_newton=False)
            return pull((torch.zeros_like(self._unit),), (self._unit,))[0]
        assert isinstance(self._objective, LabelObjective)
        targets = self._objective.micro_batches[index].targets().flatten().to(self.space.device)
        predicted = (targets >= 0).nonzero().flatten()

        def f(W: Tensors, _: Several) -> Several:
            return (self._logits(index, W)[predicted],)

        (z,), (z_dot,), pull = push_keeping(f, W, V, (), (), way, gauss_newton=not self._start.second)
        scale = 1.0 / self._objective.num_tokens
        g_dot, g = starting_cotangents(self._start, z, z_dot, targets[predicted], scale)
        return pull((g_dot,), None if g is None else (g,))[0]

    def _loss(self, index: int, W: Tensors) -> Several:
        with substituted(self._places, W), own_buffers(self._written):
            return (self._objective.contribution(self._module, index).total,)

    def _logits(self, index: int, W: Tensors) -> torch.Tensor:
        assert isinstance(self._objective, LabelObjective)
        with substituted(self._places, W), own_buffers(self._written):
            return self._objective.outputs(self._module, index)[0].flatten(0, -2)

    def _is_dummy(self, index: int) -> bool:
        return isinstance(self._objective, LabelObjective) and self._objective.micro_batches[index].num_tokens == 0

    @contextlib.contextmanager
    def _running(self, full: Tensors) -> Iterator[list[str]]:
        """Let the module compute with ``full``, by kernels that have derivatives; yields the kernels' notes."""
        # of a causal LM the class's forwards, as in the streamed product: not checkpointing, nor a replay of routing
        wrapped = [] if self._own_loss else [m for m in self._module.modules() if "forward" in m.__dict__]
        with (
            torch.no_grad(),
            differentiable_kernels(self._module) as notes,
            contextlib.nullcontext() if self._own_loss else honest_casts(self._exchange.dtype),
            replaced_forwards([(m, plain_forward(m)) for m in wrapped]),
            substituted(self._places, full),
        ):
            yield notes

    # -- before the first product ------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """See that it fits, that the loss repeats itself, and which way of differentiating suits it."""
        world = self._model.world
        numbers = {name: p.numel() for name, p in self._module.named_parameters()}
        item = max(4, torch.empty(0, dtype=self._exchange.dtype).element_size())  # the ways are compared in fp32
        selected, everything = (item * sum(numbers[n] for n in names) for names in (self._selected, self._names))
        copied = everything if self._model.sharded or self._exchange.dtype != self.space.dtype else 0
        work = (1 + _TANGENTS) * selected
        with world.together("exact product of the whole model"):
            if not self._own_loss:
                require_eval(self._module)
        self._require_memory(copied + work, "for its parameters and their tangents alone")
        with world.guard("preparing the exact product"):
            full = self._exchange.parameters(self._names)
        with world.together("exact product of the whole model"):
            graph = self._try(full) if self._batches else 0
            if self._own_loss:
                self._require_own_places(full)
        self._require_memory(work + graph, f"beside its parameters, {gigabytes(graph)} of them for activations")
        with world.together("exact product of the whole model"):
            way = self._choose_way(full) if self._batches else "dual"
        self._way = "dual" if world.all_true(way == "dual", "the exact product's way") else "reverse"
        if self._reason:
            size = gigabytes(world.max_over_ranks(copied + work + graph, "memory of the whole model"))
            self.notes.insert(0, f"{self._reason}: exact products take the model as a whole, about {size} on each rank")

    def _require_memory(self, need: int, what: str) -> None:
        world = self._model.world
        need = int(world.max_over_ranks(need, "memory of the whole model"))
        free = -int(world.max_over_ranks(-(device_bytes_free(world) - self._reserved), "free memory"))
        if need > free:
            reason = f"{self._reason}; " if self._reason else ""
            raise ModelError(
                f"{reason}the exact product of the whole model needs {gigabytes(need)} on each rank ({what}), and "
                f'{gigabytes(free)} are free: use method = "finite_difference", fewer parameters, or more memory a rank'
            )

    def _try(self, full: Tensors) -> int:
        """Run one micro-batch's loss twice; return the bytes that its derivatives will keep."""
        kept = {t.untyped_storage().data_ptr() for t in full.values()}
        saved = 0

        def count(t: torch.Tensor) -> Any:
            nonlocal saved
            saved += t.numel() * t.element_size() * (t.untyped_storage().data_ptr() not in kept)

        index = max(self._batches, key=self._size)
        with self._running(full) as notes:
            try:
                buffers = BufferWatch(self._module)
                leaves = {name: full[name].detach().requires_grad_() for name in self._selected}
                with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda _: _):
                    (first,) = self._loss(index, leaves)
                self._written = buffers.written()
                (second,) = self._loss(index, leaves)
            except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
                raise ModelError(f"cannot run {type(self._module).__name__} ({first_line(error)})") from error
        self._unit = torch.ones_like(second)
        self.notes += notes
        if not bool(((first - second).abs() <= 100 * torch.finfo(first.dtype).eps * second.abs()).all()):
            raise ModelError(
                f"the loss of {type(self._module).__name__} is not the same when it is computed again: dropout or "
                "another random operation is on (or it is not finite); make it deterministic"
            )
        return _GRAPH * saved

    def _require_own_places(self, full: Tensors) -> None:
        """Refuse a module or a loss that reads parameters elsewhere than in their modules: they would be constants."""
        named = dict(self._module.named_parameters())
        own = [named[name] for name in self._selected if named[name].requires_grad]
        with self._running(full), torch.enable_grad():
            (loss,) = self._loss(self._batches[0], {name: full[name].detach().requires_grad_() for name in self._selected})
            found = torch.autograd.grad(loss, own, allow_unused=True) if own and loss.requires_grad else ()
        if any(g is not None for g in found):
            raise ModelError(
                f"{type(self._module).__name__} or its loss reads parameters elsewhere than in the modules that own them "
                '(copies, flattened weights), so exact products would miss them: use method = "finite_difference"'
            )

    def _size(self, index: int) -> int:
        if isinstance(self._objective, LabelObjective):
            return self._objective.micro_batches[index].size
        return 0  # a batch of the user's may be anything: take the first

    def _choose_way(self, full: Tensors) -> Way:
        """Compare the ways on one micro-batch, with a random direction, in fp32 at least."""
        if not self._own_loss:  # whose batches may come in the parameters' own dtype only
            full = {name: widened(t) for name, t in full.items()}
        W = {name: full[name] for name in self._selected}
        generator = torch.Generator(device=self.space.device).manual_seed(0)
        V = {
            name: t.square().mean().sqrt().clamp_min(1e-3)
            * torch.randn(t.shape, generator=generator, dtype=t.dtype, device=t.device)
            for name, t in W.items()
        }
        index, name = self._batches[0], type(self._module).__name__
        loss: Stage = lambda W, _: self._loss(index, W)  # noqa: E731
        with self._running(full):
            try:
                push(loss, W, V, (), (), "reverse")  # sees functions that can be differentiated once only
                reference = list(self._tangents(index, W, V, "reverse").values())
            except (NotImplementedError, RuntimeError) as error:
                raise ModelError(f"{name} has no second derivative ({first_line(error)}): use finite differences") from error
            if reference[0].dtype in (torch.bfloat16, torch.float16):
                return "reverse"  # rounding would hide a wrong derivative
            try:
                wrong = disagreement(list(self._tangents(index, W, V, "dual").values()), reference)
                why = f"its forward derivative, differentiated, is off by {wrong:.0e}" if wrong else ""
            except (NotImplementedError, RuntimeError) as error:
                why = first_line(error)
        if why:
            self.notes.append(f"{name}: exact products by double backward, which costs more ({why})")
        return "reverse" if why else "dual"

    def _require_finite(self, W: Tensors, total: Tensors) -> None:
        flags = torch.stack([~torch.isfinite(t.sum()) for t in [*W.values(), *total.values()]]).double()
        flags = self._model.world.sum_over_ranks(flags, "finite tangents")
        if bool(flags.any()):
            first, names = int(flags.nonzero()[0]), list(W)
            where = f"the weights '{names[first]}'" if first < len(W) else f"the tangents of '{names[first - len(W)]}'"
            raise NumericsError(
                f"the exact product is not finite, first in {where}: check the weights and model.compute_dtype"
            )


ExactOperator = StreamedOperator | WholeModel


def exact_or_whole(
    kind: type[StreamedOperator],
    model: ShardedModel,
    objective: LabelObjective | CallableObjective,
    *,
    plain: nn.Module | None = None,
    compute_dtype: torch.dtype | None = None,
    settings: Settings | None = None,
    reserved: int = 0,
) -> ExactOperator:
    """Return the streamed operator, or the whole model's where its blocks cannot be told apart. Collective: yes.

    Raises ModelError where neither is possible. Arguments as of StreamedOperator and WholeModel.
    """
    options: dict[str, Any] = {"plain": plain, "compute_dtype": compute_dtype}
    own = isinstance(objective, CallableObjective)
    reason = "the loss is not the default one of tokens" if own else "the model's labels are not of its tokens"
    if isinstance(objective, TokenObjective):
        try:
            return kind(model, objective, settings=settings, **options)
        except SplitError as error:
            reason = str(error)
    return WholeModel(model, objective, kind.start, reason=reason, reserved=reserved, **options)
