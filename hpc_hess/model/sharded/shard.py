"""ShardedModel: a model cut over the ranks by FSDP2, seen as one flat local vector of master parameters.

Each block is one FSDP group, so at most one block (and the next, prefetched) is ever unsharded; gradients are
reduce-scattered after every micro-batch straight into views of one flat local vector, which FSDP accumulates into.
One process needs no FSDP: its parameters are the shard.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from hpc_hess.errors import LayoutError
from hpc_hess.intake.given import walked
from hpc_hess.model.sharded.blocklist import all_blocks
from hpc_hess.model.sharded.borrowed import gathered_as
from hpc_hess.model.sharded.fsdp import cut_over_ranks, free_gathered
from hpc_hess.model.sharded.placed import Placed, shard_dims
from hpc_hess.model.sharded.precision import honest_casts, whole_rows
from hpc_hess.parallel import kernels
from hpc_hess.parallel.layout import Layout
from hpc_hess.parallel.vector import VectorSpace
from hpc_hess.parallel.world import World


class ShardedModel:
    """A module whose parameters lie over the ranks.

    Attributes
    ----------
    module : the module; its forward and backward are collective when it is sharded.
    space : the vector space of the selected parameters.
    local_parameters : this rank's part of each selected parameter, in piece order, as plain tensors.

    """

    def __init__(self, module: nn.Module, world: World, space: VectorSpace, *, sharded: bool) -> None:
        self.module, self.world, self.space = module, world, space
        self.layout, self.shard = space.layout, space.shard
        self.sharded = sharded
        named = dict(module.named_parameters())
        self._parameters = [named[piece.parameter.name] for piece in self.shard.pieces]
        self._hidden: bool | None = None  # whether some parameters cannot be seen in autograd's graph
        self._others: list[torch.Tensor] = []  # what else the loss depends on: a program's other models
        self._grads_before: list[torch.Tensor | None] = []  # the module is the user's

    @property
    def local_parameters(self) -> list[torch.Tensor]:
        """Return this rank's part of each selected parameter.

        Writing to them changes the model: call :meth:`written` afterwards.
        """
        return [local_part(p.detach()) for p in self._parameters]

    def holds(self, flat: torch.Tensor) -> bool:
        """Whether the module still has the parameters that it had, with the values ``flat``, here. Collective: no."""
        named = dict(self.module.named_parameters())
        same = all(named.get(x.parameter.name) is p for x, p in zip(self.shard.pieces, self._parameters, strict=True))
        return same and all(map(torch.equal, self.local_parameters, self.pieces_of(flat)))

    def pieces_of(self, flat: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield views of a flat local vector, one per selected parameter, in the local parameters' shapes."""
        for piece in self.shard.pieces:
            yield flat[piece.start : piece.stop].view(piece.local_shape)

    def read_parameters(self) -> torch.Tensor:
        """Return a copy of the local parameters as one flat vector."""
        flat = torch.empty(self.space.size_local, dtype=self.space.dtype, device=self.space.device)
        self._foreach(torch._foreach_copy_, list(self.pieces_of(flat)), self.local_parameters)
        return flat

    def write_parameters(self, flat: torch.Tensor) -> None:
        """Set the parameters to ``flat``."""
        self._foreach(torch._foreach_copy_, self.local_parameters, list(self.pieces_of(flat)))
        self.written()

    def move_parameters(
        self, flat: torch.Tensor, direction: torch.Tensor, step: float, *, dither: bool = False
    ) -> torch.Tensor:
        """Set the parameters to ``flat + step * direction``; return this rank's <theta - flat, direction> as stored.

        ``dither``: see :func:`kernels.displace`.
        """
        along = torch.zeros(1, dtype=torch.float64, device=flat.device)
        with torch.no_grad():
            for parameter, base, piece in zip(
                self.local_parameters, self.pieces_of(flat), self.pieces_of(direction), strict=True
            ):
                target = parameter.reshape(-1)  # a view, unless a user's own module holds a transposed parameter
                along += kernels.displace(target, base.reshape(-1), piece.reshape(-1), step, dither=dither)
                if not parameter.is_contiguous():
                    parameter.copy_(target.view_as(parameter))
        self.written()
        return along

    def written(self) -> None:
        """Say that parameters were written: what was gathered of them is dropped. Collective: no."""
        if self.sharded:
            free_gathered(self.module)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Context for forward passes without a backward pass: no graph, and nothing stays gathered. Collective: no."""
        try:
            with torch.no_grad():
                yield
        finally:
            self.written()

    @staticmethod
    def _foreach(function: Any, out: list[torch.Tensor], values: list[torch.Tensor]) -> None:
        with torch.no_grad():
            function(out, values)

    def attach_gradients(self, flat: torch.Tensor) -> None:
        """Make backward accumulate into views of ``flat``."""
        self._grads_before = [parameter.grad for parameter in self._parameters]
        for parameter, view in zip(self._parameters, self.pieces_of(flat), strict=True):
            if isinstance(parameter, DTensor):
                parameter.grad = DTensor.from_local(  # type: ignore[assignment]
                    view,
                    parameter.device_mesh,
                    parameter.placements,
                    run_check=False,
                    shape=parameter.shape,
                    stride=parameter.stride(),
                )
            else:
                parameter.grad = view

    def detach_gradients(self) -> None:
        """Forget the views set by :meth:`attach_gradients`."""
        for parameter, before in zip(self._parameters, self._grads_before, strict=True):
            parameter.grad = before
        self._grads_before = []

    def backward(self, total: torch.Tensor) -> None:
        """Add the gradient of ``total`` to what is attached; other parameters' gradients stay. Collective: if sharded.

        A total that depends on none of the selected parameters adds nothing. Where a part is computed again (reentrant
        checkpointing), autograd cannot know what it depends on before, and others get gradients, too.
        """
        if not total.requires_grad:
            return
        if self._hidden is None:
            leaves = walked(total)[0]
            self._hidden = self.sharded or leaves is None
            if self.sharded and leaves is not None:
                mine = {id(p) for p in [*self.module.parameters(), *gathered_as(self.module).values()]}
                self._others = [leaf for identity, leaf in leaves.items() if identity not in mine]
        if not self._hidden and self.world.num_replicas > 1:  # no accumulation, which the program's own reduction watches
            found = torch.autograd.grad(total, self._parameters, allow_unused=True)
            for parameter, gradient in zip(self._parameters, found, strict=True):
                if gradient is not None and parameter.grad is not None:
                    parameter.grad.add_(gradient)
            return
        before = [(other, other.grad) for other in self._others]
        try:
            for other, _ in before:
                other.grad = None
            total.backward(inputs=None if self._hidden else self._parameters)
        finally:
            for other, gradient in before:  # type: ignore[assignment]
                other.grad = gradient  # type: ignore[assignment]


def local_part(parameter: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a parameter, as a plain tensor. Collective: no."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def select(names: list[str], include: list[str], exclude: list[str]) -> set[str]:
    """Return the names that match a glob of ``include`` and none of ``exclude``.

    Raises
    ------
    LayoutError : a pattern of ``include`` matches nothing, or nothing is left.

    """
    for pattern in include:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise LayoutError(f"parameters.include = '{pattern}' matches no parameter; names look like '{names[0]}'")
    chosen = {
        name
        for name in names
        if any(fnmatchcase(name, p) for p in include) and not any(fnmatchcase(name, p) for p in exclude)
    }
    if not chosen:
        raise LayoutError("parameters.exclude leaves no parameter")
    return chosen


def spanned(module: nn.Module, include: list[str], exclude: list[str]) -> set[str]:
    """Return the names of the parameters that the matrix spans: selected, not empty, and requiring a gradient.

    Raises
    ------
    LayoutError : a pattern of ``include`` matches nothing, or nothing is left.

    """
    named = dict(module.named_parameters())
    selected = select(sorted(named), include, exclude)
    chosen = {name for name in selected if named[name].requires_grad and named[name].numel()}
    if not chosen:
        raise LayoutError(
            f"none of the {len(selected)} selected parameters requires a gradient (the first is '{min(selected)}'): call "
            "requires_grad_(True) on those that the matrix should span"
        )
    return chosen


def choose_shard_dim(shape: tuple[int, ...], num_shards: int) -> int:
    """Return the dimension to shard: 0, unless that would leave one rank with over 1.25 of an even share.

    Expert tensors [E, ...] with few experts are the case in point; FSDP2 wants other dimensions to divide evenly.
    """
    if num_shards == 1 or not shape:
        return 0
    largest = math.ceil(shape[0] / num_shards) * num_shards
    if largest <= 1.25 * shape[0] or math.prod(shape) < 1 << 10:
        return 0
    return next((dim for dim in range(1, len(shape)) if shape[dim] % num_shards == 0), 0)


def shard_model(
    skeleton: nn.Module,
    world: World,
    *,
    include: list[str] | None = None,
    exclude: list[str] | None = None,
    master_dtype: torch.dtype = torch.float32,
    compute_dtype: torch.dtype = torch.float32,
) -> ShardedModel:
    """Shard a module whose parameters are on the meta device; the shards are allocated, not filled. Collective: yes.

    With one rank the parameters are allocated whole. The matrix spans the selected parameters that require a gradient; the
    others are sharded too, but frozen.

    Raises
    ------
    LayoutError : the selection matches nothing.

    """
    shapes = {name: tuple(p.shape) for name, p in skeleton.named_parameters()}
    selected = spanned(skeleton, include or ["*"], exclude or [])
    sharded = world.connected and world.size > 1
    dims = {name: choose_shard_dim(shape, world.shard_size) for name, shape in shapes.items()} if sharded else {}
    layout = Layout(shapes, world.shard_size, dims, selected if len(selected) < len(shapes) else None)
    for name, parameter in skeleton.named_parameters():
        parameter.requires_grad_(name in selected)
    skeleton.to(dtype=master_dtype)
    blocks = all_blocks(skeleton)
    if sharded:
        cut_over_ranks(skeleton, blocks, world, dims, master_dtype, compute_dtype)
    _allocate(skeleton, world.device)
    return ShardedModel(skeleton, world, VectorSpace(world, layout, master_dtype), sharded=sharded)


def whole_model(
    module: nn.Module, include: list[str] | None = None, exclude: list[str] | None = None, placed: Placed | None = None
) -> ShardedModel:
    """Wrap a user's module as it lies in this process, or over the ranks of ``placed``: its parameters are used in place.

    The matrix spans the selected parameters that require a gradient; these share one dtype and device. Collective: no.

    Raises
    ------
    LayoutError : nothing is left, or their dtypes or devices differ. ModelError : they lie in a way that is not known.

    """
    named = dict(module.named_parameters())
    selected = spanned(module, include or ["*"], exclude or [])
    first = min(selected)
    dtype, device = named[first].dtype, named[first].device
    for name in sorted(selected):
        if named[name].dtype != dtype or named[name].device != device:
            raise LayoutError(
                f"parameter '{name}' is {named[name].dtype} on {named[name].device}, '{first}' {dtype} on {device}: move "
                "them together, or select parameters that agree by include and exclude"
            )
    placed = placed or Placed(module, World.alone(str(device)))
    shapes = {n: tuple(p.shape) for n, p in named.items()}
    dims = shard_dims(module, selected) if placed.sharded else None
    layout = Layout(shapes, placed.world.shard_size, dims, selected if len(selected) < len(named) else None)
    return ShardedModel(module, placed.world, VectorSpace(placed.world, layout, dtype), sharded=placed.sharded)


def _allocate(module: nn.Module, device: torch.device) -> None:
    """Give meta parameters memory (ties kept, buffers untouched)."""
    if not any(p.is_meta for p in module.parameters()):
        module.to(device)
        return
    buffers = {id(b): b for b in module.buffers()}
    owners = [(m, key, id(b)) for m in module.modules() for key, b in m._buffers.items() if b is not None]
    ties = [(m, key, id(p)) for m in module.modules() for key, p in m._parameters.items() if p is not None]
    module.to_empty(device=device)
    for m, key, identity in owners:
        m._buffers[key] = buffers[identity].to(device)
    first: dict[int, nn.Parameter] = {}
    for m, key, identity in ties:  # to_empty gives each place a parameter of its own
        current = m._parameters[key]
        assert current is not None
        m._parameters[key] = first.setdefault(identity, current)


def checkpoint_blocks(module: nn.Module) -> None:
    """Recompute each block's activations in the backward pass, inside FSDP's hooks: its parameters are there then.

    Call it after Routing has wrapped the blocks, so that a recomputed router repeats its frozen choice.
    """
    from contextlib import contextmanager, nullcontext
    from functools import partial

    from torch.utils.checkpoint import checkpoint

    @contextmanager
    def again() -> Iterator[None]:  # the backward pass has left the forward's contexts
        with honest_casts(next(module.parameters()).dtype), whole_rows(module):
            yield

    def contexts() -> tuple[Any, Any]:
        return nullcontext(), again()

    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False, "context_fn": contexts}
    for block in all_blocks(module) or []:
        block.forward = partial(checkpoint, block.forward, **options)  # type: ignore[method-assign]
