"""A causal LM as a chain of functions: prologue, blocks, final, logits. No architecture-specific code.

    boundary, *extras = prologue(parameters)            embedding, masks, rotary tables
    boundary = block(k, parameters, boundary, *extras)  one call of one block
    hidden = final(parameters, boundary)                what follows the last block, up to the head
    logits = logits(parameters, hidden)                 the head and what follows it, token by token

Each is the model's own forward with its blocks or its head replaced for a moment, and a function of the parameters it
is given: the module's own may be on the meta device. How the parts are connected is learnt from one recorded forward
pass; whatever does not fit this picture is refused, because treating it as constant would be silently wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from hpc_hess.errors import ModelError, SplitError
from hpc_hess.model.blocks.splice import (
    Forward,
    Places,
    own_buffers,
    parameter_places,
    plain_forward,
    replaced_forwards,
    substituted,
)
from hpc_hess.model.sharded.blocklist import find_blocks
from hpc_hess.model.sharded.micro_batch import MicroBatch
from hpc_hess.model.sharded.precision import whole_rows

Tensors = Mapping[str, torch.Tensor]
Arguments = list[list[Any]]  # per block call the flattened arguments, None where boundary and extra tensors go


@dataclass
class Call:
    """One call of a block: which block, where its boundary and extra tensors go in and come out."""

    block: int
    structure: TreeSpec
    boundary: int  # leaf of the arguments
    extras: dict[int, int]  # leaf of the arguments -> number of the extra tensor
    out_structure: TreeSpec | None = None
    out_leaves: list[Any] = field(default_factory=list)  # constants of the output; None at tensors
    out_boundary: int = -1


@dataclass
class Parts:
    """What a recording found: the calls in order and the parameters each part depends on."""

    calls: list[Call]
    num_extras: int
    prologue: list[str]
    blocks: list[list[str]]  # by call
    final: list[str]
    logits: list[str]
    vocabulary: int


class Finished(BaseException):
    """Leaves the model's forward early, once the part that was asked for is computed."""


def require_eval(module: nn.Module) -> None:
    """Raise ModelError where a part of ``module`` is in training mode."""
    training = next((name for name, m in module.named_modules() if m.training), None)
    if training is not None:
        raise ModelError(f"module '{training}' is in training mode, so dropout may be on: call model.eval() first")


class SplitModel:
    """The parts of a causal LM as functions.

    ``module`` needs no memory for parameters and carries no hooks that matter (see splice). Eval mode.

    Raises
    ------
    SplitError : no list of blocks, no output head.
    ModelError : dropout left on.

    """

    def __init__(self, module: nn.Module) -> None:
        blocks = find_blocks(module)
        if blocks is None:
            raise SplitError(f"cannot split {type(module).__name__}: no nn.ModuleList of repeated blocks was found")
        find_head: Any = getattr(module, "get_output_embeddings", lambda: None)
        head = find_head()
        if not isinstance(head, nn.Module):
            raise SplitError(f"cannot split {type(module).__name__}: get_output_embeddings() returns no module")
        require_eval(module)
        self.module, self.blocks, self.head = module, list(blocks), head
        self.places: dict[str, Places] = parameter_places(module)
        self.shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
        by_identity = {id(p): name for name, p in module.named_parameters()}
        self.names_of_block = [[by_identity[id(p)] for p in b.parameters()] for b in self.blocks]
        in_blocks = {name for names in self.names_of_block for name in names}
        self.names_outside = [name for name in self.places if name not in in_blocks]
        self.parts: Parts | None = None  # set by record.record()
        self.written: Places = []  # buffers that a forward pass writes; likewise
        self.next_token = True  # as micro-batches have it; likewise

    @property
    def num_calls(self) -> int:
        """Number of block calls in one forward pass."""
        return len(self.known.calls)

    def names_of(self, stage: int) -> list[str]:
        """Return the parameters of a stage: 0 the prologue, 1..num_calls the block calls, then final and logits."""
        parts = self.known
        if stage == 0:
            return parts.prologue
        if stage <= len(parts.calls):
            return parts.blocks[stage - 1]
        return sorted({*parts.final, *parts.logits})

    def describe(self, stage: int) -> str:
        """Return a stage's name for messages."""
        if stage == 0:
            return "the embedding"
        return f"block {self.known.calls[stage - 1].block}" if stage <= self.num_calls else "the head"

    @property
    def known(self) -> Parts:
        """What the recording found."""
        if self.parts is None:
            raise RuntimeError("record() a forward pass first")
        return self.parts

    # -- the parts -----------------------------------------------------------------------------------------------

    def arguments(self, parameters: Tensors, batch: MicroBatch) -> tuple[Arguments, list[torch.Tensor]]:
        """Return what the blocks are called with beside boundary and extra tensors, and those [boundary, *extras]."""
        parts, seen, found = self.known, list[list[Any]](), dict[int, torch.Tensor]()

        def on_block(number: int, leaves: list[Any]) -> Any:
            call = parts.calls[number]
            if number == 0:
                found[0] = leaves[call.boundary]
            for leaf, extra in call.extras.items():
                found.setdefault(1 + extra, leaves[leaf])
            passed = {call.boundary, *call.extras}
            seen.append([None if i in passed else leaf for i, leaf in enumerate(leaves)])
            if number == len(parts.calls) - 1:
                raise Finished
            return self._output(call, leaves[call.boundary])

        self._forward(batch, parameters, on_block, lambda hidden: hidden)
        return seen, [found[i] for i in range(1 + parts.num_extras)]

    def prologue(self, parameters: Tensors, batch: MicroBatch) -> tuple[torch.Tensor, ...]:
        """Return (boundary [rows, length, width], *extras) before the first block."""
        return tuple(self.arguments(parameters, batch)[1])

    def block(self, number: int, parameters: Tensors, arguments: list[Any], *tensors: torch.Tensor) -> torch.Tensor:
        """Return the boundary tensor after call ``number``.

        ``tensors`` are the boundary tensor before it and the extra tensors that :meth:`extras_of` the call names.
        """
        call, extras = self.known.calls[number], self.extras_of(number)
        leaves = list(arguments)
        leaves[call.boundary] = tensors[0]
        for leaf, extra in call.extras.items():
            leaves[leaf] = tensors[1 + extras.index(extra)]
        args, kwargs = tree_unflatten(leaves, call.structure)
        with substituted(self.places, parameters), own_buffers(self.written), whole_rows(self.blocks[call.block]):
            out = plain_forward(self.blocks[call.block])(*args, **kwargs)
        return tree_flatten(out)[0][call.out_boundary]

    def extras_of(self, number: int) -> list[int]:
        """Return the numbers of the extra tensors that call ``number`` takes."""
        return sorted(set(self.known.calls[number].extras.values()))

    def final(self, parameters: Tensors, batch: MicroBatch, boundary: torch.Tensor) -> torch.Tensor:
        """Return the head's input [rows, length, width] from the boundary tensor after the last block."""
        parts, found = self.known, list[torch.Tensor]()

        def on_block(number: int, leaves: list[Any]) -> Any:
            call = parts.calls[number]
            last = number == len(parts.calls) - 1
            return self._output(call, boundary if last else leaves[call.boundary])

        def on_head(hidden: torch.Tensor) -> Any:
            found.append(hidden)
            raise Finished

        self._forward(batch, parameters, on_block, on_head)
        return found[0]

    def logits(self, parameters: Tensors, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits [tokens, vocabulary] of head inputs [tokens, width]."""
        one = torch.tensor([[1]], device=hidden.device)  # a constant, also where this is traced
        # everything before the head is computed for one token and dropped
        token = MicroBatch([0], one, one, one, next_token=self.next_token)
        head = plain_forward(self.head)
        parts = self.known

        def on_block(number: int, leaves: list[Any]) -> Any:
            return self._output(parts.calls[number], leaves[parts.calls[number].boundary])

        out = self._forward(token, parameters, on_block, lambda _: head(hidden[None]))
        return out[0]

    # -- the model's own forward -----------------------------------------------------------------------------------

    def _forward(
        self,
        batch: MicroBatch,
        parameters: Tensors,
        on_block: Callable[[int, list[Any]], Any],
        on_head: Callable[[torch.Tensor], Any],
    ) -> Any:
        """Run the model with blocks and head replaced; parameters that are not given are zeros without memory."""
        count, calls = 0, self.known.calls

        def depart(what: str) -> SplitError:
            return SplitError(
                f"{type(self.module).__name__} {what} differently from when it was recorded: its forward depends on the "
                "data, and exact products cannot split it"
            )

        def replacement(block: int) -> Forward:
            def forward(*args: Any, **kwargs: Any) -> Any:
                nonlocal count
                leaves, structure = tree_flatten((args, kwargs))
                if count >= len(calls) or calls[count].block != block or calls[count].structure != structure:
                    raise depart(f"calls block {block}")
                count += 1
                return on_block(count - 1, leaves)

            return forward

        def after_blocks(hidden: torch.Tensor) -> Any:
            if count < len(calls):
                raise depart("calls its head")
            return on_head(hidden)

        return self.run(batch, parameters, [replacement(i) for i in range(len(self.blocks))], after_blocks)

    def run(self, batch: MicroBatch, parameters: Tensors, forwards: list[Forward], on_head: Forward) -> Any:
        """Run the model's forward with these forwards in the blocks and the head; logits, or None when it Finished."""
        device = batch.input_ids.device
        dtype = next((t.dtype for t in parameters.values()), torch.float32)
        rest = {
            name: torch.zeros((), dtype=dtype, device=device).expand(self.shapes[name])
            for name in self.names_outside
            if name not in parameters
        }
        replacements = [*zip(self.blocks, forwards, strict=True), (self.head, on_head)]
        with (
            substituted(self.places, {**rest, **parameters}),
            replaced_forwards(replacements),
            whole_rows(self.module),
            own_buffers(self.written),
        ):
            try:
                return plain_forward(self.module)(**batch.arguments()).logits
            except Finished:
                return None

    def _output(self, call: Call, boundary: torch.Tensor) -> Any:
        """Return what the block would, with another boundary tensor."""
        leaves = list(call.out_leaves)
        leaves[call.out_boundary] = boundary
        assert call.out_structure is not None
        return tree_unflatten(leaves, call.out_structure)
