"""Learning how a model's blocks are connected, from one forward pass in which every block is watched.

The pass runs block by block (a block's parameters are asked for just before its call and dropped after it) and keeps
no activations: autograd's graph is built with empty hands, only to see which tensor depends on which.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from hpc_hess.errors import SplitError
from hpc_hess.model.blocks.blocks import Arguments, Call, Parts, SplitModel
from hpc_hess.model.blocks.splice import BufferWatch, plain_forward, substituted
from hpc_hess.model.sharded.micro_batch import MicroBatch

Fetch = Callable[[list[str]], dict[str, torch.Tensor]]


def record(split: SplitModel, batch: MicroBatch, fetch: Fetch, others: Sequence[MicroBatch] = ()) -> list[torch.Tensor]:
    """Set ``split.parts`` and return the boundary tensor before each block call, and after the last.

    ``fetch`` returns full parameters by name. The parts are replayed and compared with what was recorded; the ``other``
    micro-batches must call the same blocks in the same order.
    Collective: as ``fetch``, which is called in the same order on every rank.

    Raises
    ------
    SplitError : the model cannot be split into a chain of blocks; says where it departs from one.

    """
    watch, split.next_token = _Watch(split, fetch), batch.next_token
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda _: None, _never):
        outside = {name: t.detach().requires_grad_() for name, t in fetch(split.names_outside).items()}
        watch.name_parameters(outside)
        buffers = BufferWatch(split.module)
        forwards = [watch.block_forward(i) for i in range(len(split.blocks))]
        try:
            logits = split.run(batch, outside, forwards, watch.on_head)
        except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
            text = str(error).strip().split("\n", 1)[0]
            raise SplitError(f"cannot run {watch.kind} block by block ({text})") from error
        watch.finish(logits)
    split.parts, split.written = watch.parts, buffers.written()
    with torch.no_grad():
        _compare_replay(split, batch, outside, watch)
        for other in others:
            split.arguments({name: outside[name] for name in watch.parts.prologue}, other)
    return watch.boundaries


def _never(_: Any) -> Any:
    raise RuntimeError("the recording keeps no activations")


class _Watch:
    """Follows tensors by identity through one forward pass."""

    def __init__(self, split: SplitModel, fetch: Fetch) -> None:
        self.split, self.fetch = split, fetch
        self.kind = type(split.module).__name__
        self.calls: list[Call] = []
        self.block_names: list[list[str]] = []
        self.boundaries: list[torch.Tensor] = []
        self.arguments: Arguments = []
        self.extras: list[torch.Tensor] = []
        self.outputs: list[torch.Tensor | None] = []  # of the last call, by leaf
        self.names: dict[int, str] = {}  # parameters by identity
        self.made: dict[int, int] = {}  # outputs of block calls by identity -> call
        self.kept: list[torch.Tensor] = []  # identities stay unique while the tensors live
        self.prologue: list[torch.Tensor] = []  # the first boundary tensor, with its graph
        self.hidden: torch.Tensor | None = None
        self.hidden_used: list[str] = []
        self.head_calls = 0

    def name_parameters(self, tensors: dict[str, torch.Tensor]) -> None:
        self.names.update({id(t): name for name, t in tensors.items()})
        self.kept.extend(tensors.values())

    def block_forward(self, block: int) -> Callable[..., Any]:
        split = self.split

        def forward(*args: Any, **kwargs: Any) -> Any:
            number = len(self.calls)
            leaves, structure = tree_flatten((args, kwargs))
            boundary = self._find_boundary(number, leaves)
            call = Call(block, structure, boundary, self._find_extras(number, boundary, leaves))
            if number == 0:
                self.prologue = [leaves[boundary]]
            self.boundaries.append(leaves[boundary].detach())
            self.arguments.append([leaf.detach() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves])
            names = split.names_of_block[block]
            own = {name: t.detach().requires_grad_() for name, t in self.fetch(names).items()}
            self.names.update({id(t): name for name, t in own.items()})
            # a block depends on parameters of the prologue through these tensors only
            for i in (boundary, *call.extras):
                leaves[i] = leaves[i].detach().requires_grad_()
            args, kwargs = tree_unflatten(leaves, structure)
            with substituted(split.places, own):
                out, out_structure = tree_flatten(plain_forward(split.blocks[block])(*args, **kwargs))
            used = {self.names[i] for t in out for i in _sources(t) if i in self.names}
            self.block_names.append(names + sorted(used - set(names)))
            for t in own.values():
                del self.names[id(t)]  # the tensor goes, and its identity may come again
            call.out_structure = out_structure
            call.out_leaves = [None if isinstance(t, torch.Tensor) else t for t in out]
            self.outputs = [t.detach().requires_grad_() if _differentiable(t) else None for t in out]
            passed = [o if o is not None else t for o, t in zip(self.outputs, out, strict=True)]
            for o in self.outputs:
                if o is not None:
                    self.made[id(o)] = number
                    self.kept.append(o)
            self.calls.append(call)
            return tree_unflatten(passed, out_structure)

        return forward

    def _find_boundary(self, number: int, leaves: list[Any]) -> int:
        if number == 0:
            for i, leaf in enumerate(leaves):
                if _differentiable(leaf):
                    return i
            raise SplitError(f"cannot split {self.kind}: no argument of its first block depends on the parameters")
        for i, leaf in enumerate(leaves):
            for j, out in enumerate(self.outputs):
                if out is not None and leaf is out:
                    self.calls[-1].out_boundary = j
                    return i
        raise SplitError(
            f"cannot split {self.kind}: call {number} of a block does not take the tensor that call {number - 1} "
            "returned, so there is computation between the blocks"
        )

    def _find_extras(self, number: int, boundary: int, leaves: list[Any]) -> dict[int, int]:
        extras: dict[int, int] = {}
        for i, leaf in enumerate(leaves):
            if i == boundary or not _differentiable(leaf):
                continue
            known = next((k for k, extra in enumerate(self.extras) if extra is leaf), None)
            if known is None:
                self._refuse_blocks(leaf, f"argument {i} of block call {number}")
                known = len(self.extras)
                self.extras.append(leaf)
            extras[i] = known
        return extras

    def _refuse_blocks(self, tensor: torch.Tensor, what: str, but: torch.Tensor | None = None) -> None:
        for source in _sources(tensor):
            if source in self.made and (but is None or source != id(but)):
                raise SplitError(
                    f"cannot split {self.kind}: {what} depends on the output of block call {self.made[source]}, which "
                    "is not handed from block to block"
                )

    def on_head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Stand in for the head: watch its input and answer for the first token only."""
        self.head_calls += 1
        if not self.calls or self.head_calls > 1:
            raise SplitError(f"cannot split {self.kind}: its head is not called once, after the blocks")
        last = self.calls[-1]
        if last.out_boundary < 0:  # as in the calls before it, or found by what the head depends on
            sources = _sources(hidden)
            last.out_boundary = next((j for j, o in enumerate(self.outputs) if id(o) in sources), -1)
            if last.out_boundary < 0:
                raise SplitError(f"cannot split {self.kind}: its head does not depend on its last block")
        boundary = self.outputs[last.out_boundary]
        assert boundary is not None
        self._refuse_blocks(hidden, "the head's input", boundary)
        self.boundaries.append(boundary.detach())
        self.hidden_used = self._used(hidden)
        self.hidden = hidden.detach().requires_grad_()
        self.kept.append(self.hidden)
        return plain_forward(self.split.head)(self.hidden[:, :1])

    def finish(self, logits: torch.Tensor) -> None:
        if self.hidden is None:
            raise SplitError(f"cannot split {self.kind}: its forward does not call get_output_embeddings()")
        self._refuse_blocks(logits, "what follows the head")
        self.logits = logits.detach()
        used = sorted({name for t in [*self.prologue, *self.extras] for name in self._used(t)})
        self.parts = Parts(
            self.calls, len(self.extras), used, self.block_names, self.hidden_used, self._used(logits), logits.shape[-1]
        )

    def _used(self, tensor: torch.Tensor) -> list[str]:
        return sorted({self.names[i] for i in _sources(tensor) if i in self.names})


def _compare_replay(split: SplitModel, batch: MicroBatch, outside: dict[str, torch.Tensor], watch: _Watch) -> None:
    """Refuse a model whose parts, run one by one, do not give the values of the recorded pass."""
    parts = watch.parts

    def check(new: Any, old: Any, what: str) -> None:
        if isinstance(old, torch.Tensor) and not (isinstance(new, torch.Tensor) and _same(new, old)):
            raise SplitError(
                f"cannot split {watch.kind}: {what} is not the same when the model is run in parts, so it depends on "
                "something that is not handed from block to block (or its forward is random)"
            )

    arguments, tensors = split.arguments({name: outside[name] for name in parts.prologue}, batch)
    check(tensors[0], watch.boundaries[0], "the first block's input")
    for number, (new, old) in enumerate(zip(arguments, watch.arguments, strict=True)):
        call = parts.calls[number]
        for i, leaf in enumerate(old):
            if i in call.extras:
                check(tensors[1 + call.extras[i]], leaf, f"argument {i} of block call {number}")
            elif i != call.boundary:
                check(new[i], leaf, f"argument {i} of block call {number}")
    assert watch.hidden is not None
    final = {name: outside[name] for name in parts.final}
    check(split.final(final, batch, watch.boundaries[-1]), watch.hidden, "the head's input")
    head = {name: outside[name] for name in parts.logits}
    check(split.logits(head, watch.hidden[:, 0]), watch.logits[:, 0], "the logits")


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    tolerance = 2e-2 if a.dtype in (torch.bfloat16, torch.float16) else 1e-4
    a, b = a.detach().double(), b.detach().double()
    finite = torch.isfinite(b)
    scale = float(b[finite].abs().max()) if bool(finite.any()) else 0.0
    return torch.allclose(a, b, rtol=0.0, atol=tolerance * scale, equal_nan=True)


def _differentiable(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.requires_grad


def _sources(tensor: Any) -> set[int]:
    """Return the identities of the leaves of autograd's graph that ``tensor`` depends on."""
    if not _differentiable(tensor):
        return set()
    if tensor.grad_fn is None:
        return {id(tensor)}
    found, seen, todo = set(), set(), [tensor.grad_fn]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        todo.extend(after for after, _ in node.next_functions if after is not None)
    return found
