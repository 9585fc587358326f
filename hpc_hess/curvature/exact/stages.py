"""What the sweeps do with one stage of a model, as functions of tensors alone: so they can be traced, and shared by layers.

Each is a function (shared, each) -> (shared, each) of trees of tensors and constants: ``shared`` is the same for all
directions, ``each`` is one direction's. ``shared`` begins with the stage's parameters, what it reads beside them (a list),
and the tensors that come in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from hpc_hess.curvature.exact.cross_entropy import Start, starting_cotangents
from hpc_hess.curvature.exact.projections import Projections
from hpc_hess.curvature.exact.tangents import Pull, Several, Tensors, Way, pull_again, push, push_keeping
from hpc_hess.model.blocks.blocks import SplitModel
from hpc_hess.model.blocks.splice import buffer_places, buffers_at, given_buffers
from hpc_hess.model.sharded.micro_batch import MicroBatch

Tree = Any  # of tensors, and of constants that are the same at every call
Function = Callable[[Tree, Tree], tuple[Tree, Tree]]
Wanted = Literal["all", "narrow", "none"]

_WANTED = {
    "all": lambda inputs, outputs: True,
    "narrow": lambda inputs, outputs: outputs < inputs,
    "none": lambda inputs, outputs: False,
}


@dataclass(frozen=True)
class Work:
    """One function of a stage. ``role`` tells it from the stage's others; it needs ``stage`` and ``role`` alone."""

    stage: Stage
    role: str
    function: Function


@dataclass(frozen=True)
class Stage:
    """A stage of a model: y = f(parameters, rest, x) of its parameters, what else it reads, and the tensors that come in.

    ``names`` of its parameters, of which ``selected`` have a direction; ``rest`` of one micro-batch.
    """

    title: str
    f: Callable[[Tensors, Tree, Several], Several]
    names: tuple[str, ...]
    selected: tuple[str, ...]
    rest: Tree
    way: Way

    def inputs(self, full: Tensors) -> Tree:
        """Return what ``shared`` begins with, but for the tensors that come in."""
        return [full[n] for n in self.names], self.rest

    def push(self, wanted: Wanted) -> Work:
        """(parameters, rest, x), (V, x_dot) -> (y, values kept), (y_dot, their tangents)."""

        def function(shared: Tree, each: Tree) -> tuple[Tree, Tree]:
            (full, rest, x), (V, x_dot) = shared, each
            kept = Projections(_WANTED[wanted])
            W, f = self._at(full, rest)
            y, y_dot = push(f, W, self._along(V), x, x_dot, self.way, kept)
            values, tangents = [v and v[0] for v in kept.values], [v and v[1] for v in kept.values]
            return (y, values), (y_dot, tangents)

        return Work(self, f"there, keeping {wanted}", function)

    def pull(self, wanted: Wanted, *, gauss_newton: bool) -> Work:
        """(parameters, rest, x, values kept, y_bar), (V, x_dot, their tangents, y_bar_dot) -> x_bar, (W_bar_dot, x_bar_dot)

        with a dot for tangents along the direction, and a bar for cotangents: derivatives of the loss.
        """

        def function(shared: Tree, each: Tree) -> tuple[Tree, Tree]:
            (full, rest, x, values, y_bar), (V, x_dot, tangents, y_bar_dot) = shared, each
            pairs = zip(values, tangents, strict=True)
            kept = Projections(_WANTED[wanted], [None if v is None else (v, v_dot) for v, v_dot in pairs])
            W, f = self._at(full, rest)
            pull = pull_again(f, W, self._along(V), x, x_dot, self.way, gauss_newton=gauss_newton, kept=kept)
            W_bar_dot, x_bar_dot, x_bar = pull(y_bar_dot, y_bar)
            return x_bar, (list(W_bar_dot.values()), x_bar_dot)

        return Work(self, f"back, having kept {wanted}", function)

    def keeping(
        self, full: Tensors, V: Tensors, x: Several, x_dot: Several, *, gauss_newton: bool
    ) -> tuple[Several, Several, Pull]:
        """Return y, y_dot, and the way back with everything kept: not a function of tensors alone."""
        W, f = self._at([full[n] for n in self.names], self.rest)
        return push_keeping(f, W, V, x, x_dot, self.way, gauss_newton=gauss_newton)

    def loss(self, start: Start) -> Work:
        """From head inputs to the loss's derivatives and back.

        (parameters, rest, rows, targets, scale, counted), (V, rows_dot) -> rows_bar, (W_bar_dot, rows_bar_dot). ``counted``
        [tokens, 1] is 0 for rows that only fill up, or None where there are none.
        """

        def function(shared: Tree, each: Tree) -> tuple[Tree, Tree]:
            (full, rest, rows, targets, scale, counted), (V, rows_dot) = shared, each
            W, f = self._at(full, rest)
            (z,), (z_dot,), back = push_keeping(
                f, W, self._along(V), rows, rows_dot, self.way, gauss_newton=not start.second
            )
            g_dot, g = starting_cotangents(start, z, z_dot, targets, scale)
            if counted is not None:
                counted = counted.to(g_dot.dtype)
                g_dot, g = g_dot * counted, None if g is None else g * counted
            W_bar_dot, rows_bar_dot, rows_bar = back((g_dot,), None if g is None else (g,))
            return rows_bar, (list(W_bar_dot.values()), rows_bar_dot)

        return Work(self, "from the head's input to the loss and back", function)

    def _at(self, full: list[Any], rest: Tree) -> tuple[Tensors, Callable[[Tensors, Several], Several]]:
        parameters = dict(zip(self.names, full, strict=True))
        return {n: parameters[n] for n in self.selected}, lambda W, x: self.f({**parameters, **W}, rest, x)

    def _along(self, V: list[Any]) -> Tensors:
        return dict(zip(self.selected, V, strict=True))


def block_stage(split: SplitModel, number: int, arguments: list[Any], selected: tuple[str, ...], way: Way) -> Stage:
    """Return the stage of block call ``number``, called with ``arguments`` beside the tensors that come in."""
    places = buffer_places(split.blocks[split.known.calls[number].block])

    def f(parameters: Tensors, rest: Tree, x: Several) -> Several:
        arguments, buffers = rest
        with given_buffers(places, buffers):
            return (split.block(number, parameters, arguments, *x),)

    rest = (arguments, buffers_at(places))
    return Stage(split.describe(1 + number), f, tuple(split.names_of(1 + number)), selected, rest, way)


def prologue_stage(split: SplitModel, batch: MicroBatch, selected: tuple[str, ...], way: Way) -> Stage:
    """Return the stage before the first block."""
    return Stage(split.describe(0), lambda W, rest, x: split.prologue(W, batch), tuple(split.names_of(0)), selected, (), way)


def final_stage(split: SplitModel, batch: MicroBatch, selected: tuple[str, ...], way: Way) -> Stage:
    """Return the stage from the last block to the head's input."""
    names = tuple(split.known.final)
    return Stage(
        "the final norm",
        lambda W, rest, x: (split.final(W, batch, x[0]),),
        names,
        tuple(n for n in selected if n in names),
        (),
        way,
    )


def logits_stage(split: SplitModel, selected: tuple[str, ...], way: Way) -> Stage:
    """Return the stage from the head's input [tokens, width] to the logits [tokens, vocabulary]."""
    names = tuple(split.known.logits)
    return Stage(
        "the head", lambda W, rest, x: (split.logits(W, x[0]),), names, tuple(n for n in selected if n in names), (), way
    )
