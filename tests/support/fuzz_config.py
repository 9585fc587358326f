"""Mutated configurations: files and --set options as hands and disks spoil them. Whatever comes in, a sentence comes out."""

from __future__ import annotations

import json
import random
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import tomli_w

from hpc_hess.commands.run.work import run
from hpc_hess.config import Config, load_config, sections
from hpc_hess.errors import HpcHessError
from hpc_hess.parallel.world import World
from hpc_hess.registry.studies import STUDIES
from hpc_hess.registry.table import load
from tests.support.trying import Ended, try_apart

_NUMBERS: list[Any] = [
    0,
    1,
    -1,
    2,
    3,
    7,
    0.0,
    -0.0,
    0.5,
    -1.5,
    1e-300,
    1e308,
    2**31,
    2**32,
    2**63 - 1,
    float("inf"),
    float("-inf"),
    float("nan"),
]
_TEXTS = [
    "",
    " ",
    "auto",
    "full",
    "none",
    "never",
    "must",
    "both",
    "x" * 300,
    "\u00e9\u4e2d\U0001f600",
    "a\nb",
    "../..",
    "/",
    "~",
    "%s",
    "{}",
    "tokens:",
    "text:",
    "tokens:/nowhere.npy",
    "datasets:",
    "00:00:00",
    "99:99:99",
    "1-00:00:01",
    "9" * 30 + ":00:00",
    "float16",
    "bfloat16",
    "float64",
    "cuda",
    "exact",
    "*",
    "[",
    "\\",
    "model.*[",
    "null",
]
_LISTS: list[Any] = [[], [""], ["*"], [1], [[]], ["a", 2], ["layer", "head"], ["model.norm.weight[0]"], ["x[1:2, :]"], ["["]]
_OTHERS: list[Any] = [True, False, {}, {"a": 1}, {"step": {"a": 1}}]
VALUES = [*_NUMBERS, *_TEXTS, *_LISTS, *_OTHERS]


class Case(NamedTuple):
    """A configuration file, as bytes, and --set options."""

    text: bytes
    overrides: list[str]


_DEFAULTS: dict[str, dict[str, Any]] = {name: table().model_dump() for name, table in sections().items()}
_DEFAULTS["analysis"] = {  # what the studies' keys were called
    former: settings.model_fields[key].default
    for settings in (load(spec.settings) for spec in STUDIES.values())
    for key, former in settings.former.items()
}
_KEYS = [(section, key) for section, values in _DEFAULTS.items() for key in values]


def _value(rng: random.Random, section: str, key: str) -> Any:
    """A value near the default, one of its type, or any."""
    default, what = _DEFAULTS[section][key], rng.random()
    if what < 0.4 and isinstance(default, bool):
        return not default
    if what < 0.4 and isinstance(default, int | float):
        return rng.choice([default + 1, -default, default * 1000, float(default), str(default), [default]])
    if what < 0.7:
        same = [v for v in VALUES if type(v) is type(default)]
        return rng.choice(same or VALUES)
    return rng.choice(VALUES)


def _table(values: dict[str, Any], section: str) -> dict[str, Any]:
    """Return a table of the configuration, made where it is not there; an empty one where a value stands in its place."""
    table: Any = values
    for part in section.split("."):
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            return {}
    return table


def _keys_changed(rng: random.Random, values: dict[str, Any]) -> None:
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        section, key = rng.choice(_KEYS)
        what = rng.random()
        if what < 0.85:
            _table(values, section)[key] = _value(rng, section, key)
        elif what < 0.92:
            outer, _, name = section.rpartition(".")
            (_table(values, outer) if outer else values)[name] = rng.choice(VALUES)  # a value in place of a section
        else:  # a key that is misspelt, or in another section
            other = rng.choice([key + "s", key[:-1] or "k", key.upper(), "", "\u00e9", rng.choice(_KEYS)[1]])
            _table(values, rng.choice([section, section[:-1], "extra"]))[other] = rng.choice(VALUES)


def _spoilt(rng: random.Random, text: bytes) -> bytes:
    """Flip, remove, repeat and insert bytes; cut the end."""
    data = bytearray(text)
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = rng.randrange(len(data) + 1)
        what = rng.randrange(6)
        if what == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif what == 1:
            del data[at : at + rng.randrange(1, 20)]
        elif what == 2:
            data[at:at] = data[max(0, at - 30) : at]
        elif what == 3:
            data[at:at] = rng.choice([b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"[", b"]]", b'"', b"=", b"\r", b"'''", b"#"])
        elif what == 4:
            del data[at:]
        else:
            data[at:at] = bytes(rng.randrange(256) for _ in range(3))
    return bytes(data)


def _option(rng: random.Random) -> str:
    section, key = rng.choice(_KEYS)
    value = _value(rng, section, key)
    text = rng.choice([json.dumps(value), str(value), f"{value!r}"])
    return rng.choice(
        [f"{section}.{key}={text}"] * 6
        + [
            f"{section}={text}",
            f"{key}={text}",
            f"{section}.{key}",
            text,
            f"{section}.{key}.x={text}",
            f"{section}.{key}={text}\n",
            f".{key}={text}",
            "",
        ]
    )


def cases(base: dict[str, Any], seed: int, count: int) -> Iterator[Case]:
    """Yield mutations of the configuration ``base``, the same ones for the same seed."""
    rng = random.Random(seed)
    for _ in range(count):
        values: dict[str, Any] = json.loads(json.dumps(base))
        kind = rng.random()
        if kind < 0.7:
            _keys_changed(rng, values)
        text = tomli_w.dumps(values).encode()
        if kind > 0.65:
            text = _spoilt(rng, text)
        yield Case(text, [_option(rng) for _ in range(rng.choice([0, 0, 0, 0, 1, 2]))])


def toy_base(folder: Path) -> dict[str, Any]:
    """A configuration that runs in a second, on the toy in ``folder``; what it says is often mutated."""
    return {
        "model": {"source": str(folder / "model")},
        "parameters": {"include": ["model.norm.weight"]},
        "data": {"source": f"tokens:{folder / 'tokens.npy'}", "sequence_length": 12, "sequences": 2},
        "operator": {"method": "exact", "check": False},
        "lanczos": {"steps": 2, "probes": 1},
        "parallel": {"device": "cpu"},
        "run": {"out": str(folder / "run"), "report": False},
    }


def read(path: Path, case: Case) -> Config | None:
    """Write a case to ``path`` and load it; return None where it was refused with a sentence."""
    path.write_bytes(case.text)
    try:
        config = load_config(path, case.overrides)
    except HpcHessError as error:
        assert str(error).strip()  # noqa: PT017
        return None
    tomllib.loads(config.to_toml())
    return config


def try_run(config: Config, out: Path, world: World, limit_s: float = 60.0) -> Ended:
    """Run what was accepted, in a process and a directory of its own: for so many steps and sequences as are few."""
    few = {
        "lanczos": {"steps": 4, "probes": 3},
        "data": {"sequences": 8, "sequence_length": 32},
        "eigenpairs": {"count": 3, "most_products": 20},
        "trace": {"samples": 8},
        "diagonal": {"samples": 8},
        "deflated": {"steps": 8},
        "inverse": {"products": 8},
        "block_diagonal": {"samples": 4, "steps": 4},
        "class_structure": {"steps": 4},
    }

    def limited(name: str, table: Any) -> Any:
        return table.model_copy(update={key: min(getattr(table, key), most) for key, most in few.get(name, {}).items()})

    run_section = config.run.model_copy(update={"out": str(out), "report": False})
    studies = {name: limited(name, table) for name, table in config.studies.items()}
    few_of = {name: limited(name, getattr(config, name)) for name in ("lanczos", "data")}
    config = config.model_copy(update={"run": run_section, "studies": studies, **few_of})

    def call() -> int:
        with mock.patch("hpc_hess.commands.run.work._limits", return_value=[1e9, 1e9]):
            return run(config, world)

    return try_apart(call, limit_s)


def mutated_by(base: dict[str, Any], *overrides: str) -> Case:
    """Return ``base`` itself with options."""
    return Case(tomli_w.dumps(base).encode(), list(overrides))
