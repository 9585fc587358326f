"""What the commands beside ``run`` are asked: a dataclass each. Their command lines are made from its fields.

Defaults and meanings stand here once. Nothing heavy is imported: --help answers at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import types
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hpc_hess.errors import ConfigError
from hpc_hess.registry.operators import OPERATORS

OF_SKETCHES = "fisher"  # of --precondition: the matrix that the sketches themselves make


def parse_steps(text: str) -> tuple[int, ...]:
    """Return the numbers of "0,10,50". Raises ConfigError."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ConfigError(f"--save-at '{text}' is not valid: it should be steps such as 0,10,50,100") from None


def _option(default: Any, meaning: str, metavar: str | None = None, **how: Any) -> Any:
    """Return a field that is an option.

    ``default_is``: its default in words; ``read``: what makes its value of a text; ``choices``: returns the values it takes.
    """
    return field(default=default, metadata={"meaning": meaning, "metavar": metavar, **how})


@dataclass(frozen=True)
class Training:
    """What is trained and kept: ``steps`` updates on ``batch`` sequences each.

    Raises
    ------
    ConfigError : a value makes no sense.

    """

    out: Path = field(metadata={"meaning": "checkpoints go to DIR/step-NNNNNN", "metavar": "DIR"})
    steps: int = _option(200, "updates")
    learning_rate: float = _option(1e-5, "learning rate, constant", "RATE")
    batch: int = _option(32, "sequences of an update")
    save_at: tuple[int, ...] = _option(
        (0,), "updates after which to keep a checkpoint; the last always", "0,10,50", read=parse_steps
    )
    optimizer: Literal["sgd", "adamw"] = _option("sgd", "AdamW's other settings are torch's")
    seed: int = _option(0, "seed of the order of the sequences")

    def __post_init__(self) -> None:
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} {getattr(self, name)} is not valid: it should be at least 1")
        _check_seed(self.seed)
        if not 0 < self.learning_rate < math.inf:
            raise ConfigError(f"--learning-rate {self.learning_rate} is not valid: it should be greater than 0")
        beyond = [step for step in self.save_at if not 0 <= step <= self.steps]
        if beyond:
            raise ConfigError(f"--save-at {beyond[0]} is not within 0 to {self.steps}: leave it out, or raise --steps")

    @property
    def points(self) -> list[int]:
        """Steps after which there is to be a checkpoint; the last one always."""
        return sorted({*self.save_at, self.steps})


def preconditioners() -> list[str]:
    """Return what --precondition takes: nothing, the sketches' own matrix, or one of operator.kind."""
    return ["none", OF_SKETCHES, *(kind for kind in OPERATORS if kind != OF_SKETCHES)]


@dataclass(frozen=True)
class Query:
    """What attribution is asked: the gradient of the mean loss of ``text``, or of the first rows of ``data``.

    Raises
    ------
    ConfigError : a value makes no sense.

    """

    text: str = _option("", "the text that examples should speak for")
    data: str = _option("", "or a data source, such as text:FILE", "SOURCE")
    sequences: int = _option(1, "rows of that source; their mean loss is asked about")
    top: int = _option(10, "examples to list, of either sign")
    precondition: str = _option(
        "none",
        f"by the inverse of this matrix, damped, in sketch space; {OF_SKETCHES}: of the sketches themselves",
        choices=preconditioners,
    )
    damping: float | None = _option(None, "damping of that matrix", default_is="a tenth of the sketches' mean eigenvalue")
    products: int = _option(30, "products with a matrix of operator.kind, at most")

    def __post_init__(self) -> None:
        if bool(self.text) == bool(self.data):
            raise ConfigError("a query needs a text: --text 'WORDS', or --data text:FILE (one of the two)")
        for name in ("sequences", "top", "products"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} {getattr(self, name)} is not valid: it should be at least 1")
        if self.precondition not in preconditioners():
            raise ConfigError(f"--precondition {self.precondition} is not one of: {', '.join(preconditioners())}")
        if self.damping is not None and not self.damping > 0:
            raise ConfigError(f"--damping {self.damping} is not valid: it should be greater than 0")


@dataclass(frozen=True)
class Comparison:
    """Which sketches are compared: ``kinds`` x ``bits``, on ``queries`` whole gradients.

    Raises
    ------
    ConfigError : a value makes no sense.

    """

    kinds: tuple[str, ...] = _option(("affd", "afjl", "qk"), "what sketch.kind takes", "KIND")
    bits: tuple[int, ...] = _option((8, 10, 12, 13, 14, 16), "log2 of the dimensions", "B")
    queries: int = _option(4, "gradients kept whole")

    def __post_init__(self) -> None:
        from hpc_hess.config import SketchSection

        known = get_args(SketchSection.model_fields["kind"].annotation)
        unknown = [kind for kind in self.kinds if kind not in known]
        if unknown:
            raise ConfigError(f"--kinds {unknown[0]} is not valid: it should be among {', '.join(known)}")
        if not all(0 < bits < 31 for bits in self.bits):
            raise ConfigError("--bits should be between 1 and 30: the dimension is 2 to that power")
        if self.queries < 1:
            raise ConfigError(f"--queries {self.queries} is not valid: it should be at least 1")


@dataclass(frozen=True)
class Search:
    """How an intrinsic dimension is looked for.

    Raises
    ------
    ConfigError : a value makes no sense.

    """

    smallest: int = _option(16, "dimension to begin with, a power of two", "D")
    largest: int = _option(1 << 16, "dimension of the subspace, a power of two", "D")
    every: int = _option(100, "steps between measurements", "STEPS")
    delta: float = _option(0.1, "gain of the metric between them below which the dimension doubles")
    target: float | None = _option(None, "metric to reach", default_is="--share of what ordinary training gains")
    share: float = _option(0.9, "of the gain of ordinary training, to reach")
    baseline_steps: int = _option(500, "steps of ordinary training", "STEPS")
    baseline_rate: float = _option(1e-3, "Adam's learning rate in ordinary training", "RATE")
    learning_rate: float = _option(1e-2, "Adam's learning rate in the subspace", "RATE")
    batch: int = _option(32, "sequences of a step")
    held_out: int = _option(16, "the last N sequences measure", "N")
    metric: Literal["accuracy", "loss"] = _option("accuracy", "of the next token, in percent; or the loss, negated")
    verify: bool = _option(True, "train anew at half the dimension", default_is="yes")
    seed: int = _option(0, "seed of the order of the sequences")

    def __post_init__(self) -> None:
        for name in ("smallest", "largest"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ConfigError(f"--{name} {value} is not valid: it should be a power of two")
        for name in ("every", "batch", "held_out", "baseline_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)} is not valid: it should be at least 1")
        _check_seed(self.seed)
        if self.smallest > self.largest:
            raise ConfigError(f"--smallest {self.smallest} is larger than --largest {self.largest}")
        for name in ("learning_rate", "baseline_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)} is not valid: it should be above 0")
        if not 0 < self.share <= 1:
            raise ConfigError(f"--share {self.share} is not valid: it should be above 0 and at most 1")
        best, metric = (100, "accuracy is in percent") if self.metric == "accuracy" else (0, "the loss counts negated")
        if self.target is not None and not self.target <= best:
            raise ConfigError(f"--target {self.target} is out of reach: {metric}, so it is at most {best}")


def _check_seed(seed: int) -> None:
    """Raise ConfigError unless ``seed`` and the number of an epoch make a seed of torch's: see finetune.batch_rows."""
    if not -(2**31) <= seed < 2**32:
        raise ConfigError(f"--seed {seed} is not valid: it should be from 0 to {2**32 - 1}")


# -- command lines of them ---------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser, kind: type[Any]) -> None:
    """Add an option for each field of one of these classes; see :func:`filled`."""
    hints = get_type_hints(kind)
    for each in dataclasses.fields(kind):
        how, default = each.metadata, each.default
        shown = how.get("default_is") or ("" if default in (MISSING, None, "") else _shown(default))
        options = {"metavar": how["metavar"]} if how.get("metavar") else {}
        options |= {} if "read" in how else _type(hints[each.name])
        options |= {"choices": how["choices"]()} if "choices" in how else {}
        options |= {"required": True} if default is MISSING else {"default": default}
        option = "--" + each.name.replace("_", "-")
        parser.add_argument(option, dest=each.name, help=how["meaning"] + f" ({shown})" * bool(shown), **options)


def filled(kind: type[Any], args: argparse.Namespace) -> Any:
    """Return the instance of one of these classes that parsed arguments make. Raises ConfigError."""
    values = {}
    for each in dataclasses.fields(kind):
        value = getattr(args, each.name)
        if "read" in each.metadata and isinstance(value, str):
            value = each.metadata["read"](value)
        values[each.name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)


def _type(hint: Any) -> dict[str, Any]:
    """Return how argparse reads values of a type."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):  # X | None
        return _type(parts[0])
    if origin is Literal:
        return {"choices": parts}
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    return {"type": parts[0], "nargs": "+"} if origin is tuple else {"type": hint}


def _shown(default: Any) -> str:
    if isinstance(default, tuple):
        return " ".join(map(str, default))
    return f"{default:g}" if isinstance(default, float) else str(default)
