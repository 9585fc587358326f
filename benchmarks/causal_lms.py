"""Every causal language model of transformers, tiny: exact products against double backward, differences, ranks.

Each model is a process of its own, ended where it takes too long. Rows that are there are kept: the benchmark goes on where
it was stopped.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.frame import Option, Table, benchmark
from benchmarks.tiny_models import VOCABULARY, names, tiny_config, tiny_model
from hpc_hess.curvature.differences.finite_difference import FiniteDifferenceHessian
from hpc_hess.curvature.exact.whole_model import ExactOperator, WholeModel
from hpc_hess.errors import HpcHessError
from hpc_hess.model.sharded.precision import honest_casts
from hpc_hess.parallel.world import World
from hpc_hess.session.operators import exact_operator
from hpc_hess.session.problem import Problem
from tests.support.exact_case import error, reference
from tests.support.problems import direction, problem_of
from tests.support.sharded import from_global
from tests.support.spawn import run_ranks

LENGTH, SEQUENCES = 20, 3
EXACT, ROUNDED, RANKS, DIFFERENCES = 1e-9, 1e-5, 1e-12, 1e-3
STEP = 1e-5  # of central differences: no search for a better one is needed in float64
_SLOW_S = 600
_FAILS = "fails"

Row = dict[str, Any]


class _Rounding(TorchDispatchMode):
    """Sees whether numbers of 64 bits are rounded to fewer."""

    found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].dtype == torch.float64:
            self.found |= out.dtype in (torch.float32, torch.bfloat16, torch.float16)
        return out


def saved(kind: str, folder: Path) -> torch.nn.Module:
    """Save the tiny model of a type and tokens for it; return the model. Raises whatever transformers raises."""
    warnings.filterwarnings("ignore")
    model = tiny_model(kind, causal=True)
    with torch.no_grad():
        model(input_ids=torch.arange(3, 3 + LENGTH)[None], use_cache=False)
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(folder)
    if model.config.model_type not in names():  # transformers finds the text model by the configuration around it alone
        tiny_config(kind, causal=True).save_pretrained(folder)
    np.save(folder / "tokens.npy", np.random.default_rng(0).integers(3, VOCABULARY, LENGTH * SEQUENCES))
    return model


def settings(folder: Path) -> dict[str, Any]:
    """Return the configuration of exact products in float64; everything else is the default."""
    return {
        "model": {"source": str(folder), "master_dtype": "float64", "compute_dtype": "float64"},
        "data": {"source": f"tokens:{folder}/tokens.npy", "sequence_length": LENGTH, "sequences": SEQUENCES},
        "operator": {"method": "exact", "compile": "off"},
    }


@contextmanager
def told(row: Row, column: str) -> Iterator[None]:
    """Let a part fail: ``row`` says so, and why."""
    try:
        yield
    except Exception as failed:  # whatever it is, it is what the table is to find
        text = " ".join(str(failed).split())
        row[column] = _FAILS
        row["why"] = f"{column}: {text if isinstance(failed, HpcHessError) else f'{type(failed).__name__}: {text}'}"[:200]


def product_of(world: World, folder: Path) -> tuple[Problem, ExactOperator, Any, Any]:
    """Return problem, operator, a direction and the exact product with it. Collective: yes."""
    from hpc_hess.config import make_config

    problem = problem_of(world, settings(folder))
    v = from_global(problem.space, direction(problem.space.size))
    operator = exact_operator(make_config(settings(folder)), problem)
    return problem, operator, v, operator.matvec(v)


def alone(world: World, kind: str, place: str) -> Row:
    """Measure on one rank, and leave model, product and gradient behind for the others."""
    folder, row = Path(place), Row(why="")
    try:
        model = saved(kind, folder)
    except Exception as failed:  # as below
        return {"runs": "no", "why": f"{type(failed).__name__}: {' '.join(str(failed).split())}"[:200]}
    row |= {"runs": "yes", "parameters": sum(p.numel() for p in model.parameters())}
    with told(row, "exact"):
        problem, operator, v, product = product_of(world, folder)
        row |= {"attention": problem.attention, "product": "whole model" if isinstance(operator, WholeModel) else "blocks"}
        module = model.double()
        rounding = _Rounding()
        with torch.no_grad(), rounding, honest_casts(torch.float64):
            problem.objective.contribution(module, 0)
        row["rounds inside"] = "yes" if rounding.found else ""
        row["exact"] = error(product, reference(module, problem.model, problem.objective, v))
    if "product" in row:
        with told(row, "differences"):
            _, gradient = problem.gradient()
            found = FiniteDifferenceHessian(problem.gradient, "central", STEP).matvec(v)
            row["differences"] = error(found, product.data)
            torch.save((gradient.data, product.data), folder / "alone.pt")
    return row


def together(world: World, place: str) -> float:
    """Return how far gradient and product of these ranks are from those of one, the larger. Collective: yes."""
    problem, _, _, product = product_of(world, Path(place))
    differences = []
    for mine, whole in zip((problem.gradient()[1], product), torch.load(Path(place) / "alone.pt"), strict=True):
        one = from_global(problem.space, whole)
        differences.append(mine.axpy_(-1.0, one).norm() / one.norm())
    return max(differences)


def measured(kind: str) -> Row:
    """Return the row of a type."""
    with tempfile.TemporaryDirectory() as folder:
        row = _within(lambda: run_ranks(_this("alone"), 1, kind, folder, timeout_s=_SLOW_S)[0], "exact")
        if (Path(folder) / "alone.pt").exists():
            found = _within(lambda: {"2 ranks": max(run_ranks(_this("together"), 2, folder, timeout_s=_SLOW_S))}, "2 ranks")
            row |= found | {"why": "; ".join(filter(None, (row["why"], found.get("why"))))}
    return row


def _within(measure: Callable[[], Row], column: str) -> Row:
    """Return what a process measured; where it raised, died or hung, its last line."""
    try:
        return measure()
    except AssertionError as ended:
        return {column: _FAILS, "why": f"{column}: {str(ended).strip().splitlines()[-1]}"[:200]}


def _this(name: str) -> Callable[..., Any]:
    """Return a function of this module as other processes find it."""
    from benchmarks import causal_lms

    return getattr(causal_lms, name)  # type: ignore[no-any-return]


def agrees(row: Row) -> bool:
    """Whether everything that was measured of a model is within what was asked."""

    def within(column: str, limit: float) -> bool:
        value = row.get(column)
        return isinstance(value, float) and value <= limit

    exact = within("exact", ROUNDED if row.get("rounds inside") else EXACT)
    return exact and within("2 ranks", RANKS) and within("differences", DIFFERENCES)


def counts(rows: list[Row], known: int) -> Row:
    """Return what stands over the table."""
    ran = [row for row in rows if row["runs"] == "yes"]
    right = sum(row["agrees"] == "yes" for row in ran)
    return {
        "names in transformers": known,
        "measured": len(rows),
        "run a forward pass when tiny": len(ran),
        "agree": right,
        "share": f"{100 * right / max(1, len(ran)):.1f} %",
        "block by block": sum(row.get("product") == "blocks" for row in ran),
    }


@benchmark(
    "Every causal language model of transformers: tiny models, products in float64",
    asked=f"95 % of those that run: exact {EXACT:.0e}, {ROUNDED:.0e} where the model rounds inside; 2 ranks {RANKS:.0e}",
)
def main(
    table: Table,
    types: Annotated[tuple[str, ...], Option("measure these only, keep the other rows", positional=True)] = (),
    again: Annotated[bool, "measure those that do not agree anew"] = False,
) -> None:
    order = names()
    chosen = types or tuple(order)
    kept = [
        {key: row[key] for key in _COLUMNS} for row in table.earlier() if row["type"] in order and row["type"] not in types
    ]
    table.rows = [row for row in kept if not again or row["agrees"] == "yes" or row["type"] not in chosen]

    def put(row: Row) -> None:
        table.rows = [other for other in table.rows if other["type"] != row["type"]]
        row["agrees"] = ("yes" if agrees(row) else "no") if row["runs"] == "yes" else ""
        table.settings |= counts([*table.rows, row], len(order))
        table.add({key: row.get(key, "") for key in _COLUMNS})
        table.rows.sort(key=lambda row: list(order).index(row["type"]))

    for kind, name in order.items():
        if kind in chosen and kind not in {row["type"] for row in table.rows}:
            row = {"type": kind, "class": name, "runs": "yes", **measured(kind)}
            put(row | {"why": ". ".join(filter(None, (_REASONS.get(kind), row["why"])))})
    table.settings |= counts(table.rows, len(order))


_DRAFTER = "A drafter: its forward takes embeddings, keys and values of another model, not tokens"
_CODES = "AutoModelForCausalLM gives it the configuration of the whole model; it predicts codes of sound, not tokens"
_REASONS = {  # found by reading transformers' code
    "gemma4_assistant": _DRAFTER,
    "gemma4_unified_assistant": _DRAFTER,
    "musicgen": _CODES,
    "musicgen_melody": _CODES,
    "reformer": "Its own backward pass wants training mode, in which hashing is random, and has no second derivatives",
    "xglm": "Its mask holds the least float64 in a tensor of torch's default dtype, so it cannot be computed in float64",
    "hrm_text": "Measured with L_bp_cycles = [3, 3]: by default most cycles have no gradient, so it is not that of the loss",
}
_COLUMNS = (
    "type",
    "class",
    "runs",
    "agrees",
    "parameters",
    "attention",
    "product",
    "exact",
    "rounds inside",
    "differences",
    "2 ranks",
    "why",
)

if __name__ == "__main__":
    main()
