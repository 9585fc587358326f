"""Which way of differentiating suits a model: each kind of block is compared with plain double backward."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from hpc_hess.curvature.exact.projections import Projections
from hpc_hess.curvature.exact.tangents import Several, Stage, Tensors, Way, pull_again, push
from hpc_hess.errors import ModelError, first_line
from hpc_hess.model.blocks.blocks import SplitModel
from hpc_hess.model.sharded.micro_batch import MicroBatch

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2, torch.bfloat16: 0.2, torch.float16: 0.1}
_FLOOR = 1e-3  # of the largest tensor's norm: what is exactly zero (a key's bias) comes out as rounding


@dataclass
class Choice:
    """The way to take, whether directions can go in lock-step, and why not where they cannot."""

    way: Way = "dual"
    lock_step: bool = True
    notes: list[str] = field(default_factory=list)


def choose_way(
    split: SplitModel, batch: MicroBatch, boundaries: list[torch.Tensor], fetch: Callable[[list[str]], Tensors]
) -> Choice:
    """Compare the ways on one block of each kind, with random directions, in fp32 at least. Collective: as ``fetch``.

    Raises
    ------
    ModelError : a block has no second derivative at all.

    """
    choice = Choice()
    with torch.no_grad():
        arguments, tensors = split.arguments(fetch(split.names_of(0)), batch)
        for number in kinds(split):
            full = {n: widened(t) for n, t in fetch(split.names_of(1 + number)).items()}
            leaves = [widened(leaf) for leaf in arguments[number]]
            x = (widened(boundaries[number]), *(widened(tensors[1 + e]) for e in split.extras_of(number)))

            def f(W: Tensors, x: Several, number: int = number, leaves: list[Any] = leaves) -> Several:
                return (split.block(number, W, leaves, *x),)

            _check_block(split, number, f, full, x, choice)
    return choice


def _check_block(split: SplitModel, number: int, f: Stage, W: Tensors, x: Several, choice: Choice) -> None:
    generator = torch.Generator(device=x[0].device).manual_seed(number)

    def like(t: torch.Tensor, rows: int = 2) -> torch.Tensor:
        scale = t.square().mean().sqrt().clamp_min(1e-3)
        return scale * torch.randn((rows, *t.shape), generator=generator, dtype=t.dtype, device=t.device)

    V, x_dot = {n: like(t) for n, t in W.items()}, tuple(like(t) for t in x)
    unit = torch.ones_like(x[0])
    bar, bar_dot = like(unit, 1)[0], like(unit)

    def derivatives(way: Way, V: Tensors, x_dot: Several, bar_dot: torch.Tensor) -> list[torch.Tensor]:
        kept = Projections(lambda inputs, outputs: inputs >= outputs)
        _, (y_dot,) = push(f, W, V, x, x_dot, way, kept)
        pull = pull_again(f, W, V, x, x_dot, way, gauss_newton=False, kept=kept)
        tangents, x_bar_dot, x_bar = pull((bar_dot,), (bar,))
        assert x_bar is not None
        return [y_dot, *x_bar_dot, *x_bar, *tangents.values()]

    block = split.describe(1 + number)
    one = {n: v[0] for n, v in V.items()}, tuple(t[0] for t in x_dot), bar_dot[0]
    try:
        reference = derivatives("reverse", *one)
    except (NotImplementedError, RuntimeError) as error:
        raise ModelError(f"{block} has no second derivative ({first_line(error)}): use finite differences") from error
    if choice.way == "dual":
        try:
            wrong = disagreement(derivatives("dual", *one), reference)
            why = f"its forward derivative, differentiated, is off by {wrong:.0e}" if wrong else ""
        except (NotImplementedError, RuntimeError) as error:
            why = first_line(error)
        if why:
            choice.way, choice.lock_step = "reverse", False
            choice.notes.append(f"{block}: exact products by double backward, which costs more ({why})")
    if choice.lock_step:
        try:
            both = torch.vmap(lambda V, x_dot, bar_dot: tuple(derivatives("dual", V, x_dot, bar_dot)))(V, x_dot, bar_dot)
            wrong = disagreement([t[0] for t in both], reference)
            why = f"off by {wrong:.0e}" if wrong else ""
        except (NotImplementedError, RuntimeError, ValueError) as error:
            why = first_line(error)
        if why:
            choice.lock_step = False
            choice.notes.append(f"{block}: several directions are multiplied one after the other ({why})")


def disagreement(found: list[torch.Tensor], reference: list[torch.Tensor]) -> float:
    """Return the largest relative difference of a tensor if it is beyond rounding, else 0."""
    floor = _FLOOR * max((float(r.norm()) for r in reference), default=0.0)
    errors = [0.0]
    for f, r in zip(found, reference, strict=True):
        difference, scale = float((f - r).norm()), float(r.norm()) + floor
        if difference != 0.0:  # two zeros agree
            errors.append(difference / scale if scale > 0 and math.isfinite(difference) else math.inf)
    worst = max(errors)
    return worst if not worst <= _TOLERANCE[reference[0].dtype] else 0.0


def kinds(split: SplitModel) -> list[int]:
    """Return a call of each kind of block: the block's class, its parameters' shapes, the form of its arguments."""
    kinds: dict[Any, int] = {}
    for number, call in enumerate(split.known.calls):
        block = split.blocks[call.block]
        submodules = tuple((name, type(m).__name__) for name, m in block.named_modules())
        shapes = tuple(split.shapes[n] for n in split.names_of_block[call.block])
        kinds.setdefault((submodules, shapes, str(call.structure)), number)
    return sorted(kinds.values())


def widened(leaf: Any) -> Any:
    """Return half-precision tensors in fp32: bf16 would hide an error in rounding."""
    low = isinstance(leaf, torch.Tensor) and leaf.dtype in (torch.bfloat16, torch.float16)
    return leaf.float() if low else leaf
