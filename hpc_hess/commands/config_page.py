"""The configuration described: a commented TOML file and docs/configuration.md, both from the texts in config.py."""

from __future__ import annotations

import json
import textwrap
import types
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

from hpc_hess.config import Config, OneOf
from hpc_hess.registry.table import Registry

# the keys that matter first: what is computed, on what, how long, where
FIRST = (
    "model.source",
    "data.source",
    "data.sequence_length",
    "data.sequences",
    "data.micro_batch",
    "operator.kind",
    "operator.method",
    "lanczos.steps",
    "lanczos.probes",
    "studies.eigenpairs.count",
    "run.out",
    "run.time_limit",
)
_WIDTH = 100
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
_TYPES = {bool: "true or false", int: "integer", float: "number", str: "text"}
_PAGE = """# Configuration

One TOML file. Every key has a default; those of all keys together are the demo. `hpc-hess config > my.toml` writes a file
of all keys with their meanings, `hpc-hess config --minimal` one of the keys that matter first. On the command line
`--set section.key=value` overrides a key. The resolved configuration of a run is `RUN/config.toml`. An unknown key, a value
of the wrong kind and settings that contradict each other are refused by one sentence, before anything is computed.

The keys that matter first: {first}.

`hpc-hess config --markdown` makes this page.
"""


class Key(NamedTuple):
    """A key of the configuration: its name, default, the values it takes, and its meaning."""

    name: str
    default: Any
    values: str
    meaning: str


class Table(NamedTuple):
    """A table of the configuration, such as "lanczos", with its keys."""

    name: str
    meaning: str
    keys: list[Key]


def tables(section: BaseModel | None = None, name: str = "") -> Iterator[Table]:
    """Yield the tables of the configuration, each before those within it."""
    section = section or Config()
    fields = {key: (info, getattr(section, key)) for key, info in type(section).model_fields.items()}
    keys = [
        Key(key, default, _values(info), _meaning(info))
        for key, (info, default) in fields.items()
        if not isinstance(default, BaseModel) and key != "studies"
    ]
    if keys:
        yield Table(name, (type(section).__doc__ or "").split("\n")[0], keys)
    for key, (_, inner) in fields.items():
        if isinstance(inner, BaseModel):
            yield from tables(inner, f"{name}.{key}".lstrip("."))
        elif key == "studies":
            for study, settings in inner.items():
                yield from tables(settings, f"studies.{study}")


def commented_toml(*, minimal: bool = False) -> str:
    """Return a TOML file of all keys, or of the FIRST ones, with their defaults and meanings."""
    parts = []
    for table in tables():
        keys = [key for key in table.keys if not minimal or f"{table.name}.{key.name}" in FIRST]
        if keys:
            parts.append("\n".join([f"[{table.name}] # {table.meaning}", *map(_commented, keys)]))
    return "\n\n".join(parts) + "\n"


def markdown() -> str:
    """Return docs/configuration.md."""
    parts = [_PAGE.format(first=", ".join(f"`{name}`" for name in FIRST))]
    for table in tables():
        rows = [f"| `{key.name}` | `{json.dumps(key.default)}` | {key.values} | {key.meaning} |" for key in table.keys]
        head = ["| key | default | values | meaning |", "|---|---|---|---|"]
        parts.append("\n".join([f"## [{table.name}]\n\n{table.meaning}\n", *head, *rows]) + "\n")
    return "\n".join(parts)


def _commented(key: Key) -> str:
    meaning = textwrap.fill(key.meaning.replace("`", ""), _WIDTH, initial_indent="# ", subsequent_indent="# ")
    line = f"{key.name} = {json.dumps(key.default)}"
    if key.values == "text":
        return f"{meaning}\n{line}"
    if len(line) + len(key.values) <= _WIDTH:
        return f"{meaning}\n{line} # {key.values}"
    return f"{meaning}\n{textwrap.fill(key.values, _WIDTH, initial_indent='# ', subsequent_indent='# ')}\n{line}"


def _registry(info: FieldInfo) -> Registry[Any] | None:
    """Return the registry that a key is about, if it is such a key."""
    found = [check.func.registry if _is_checked(check) else check for check in info.metadata]
    return next((each for each in found if isinstance(each, Registry)), None)


def _is_checked(check: Any) -> bool:
    """Return whether this lets nothing pass but an entry's name."""
    return isinstance(check, BeforeValidator) and isinstance(check.func, OneOf)


def _meaning(info: FieldInfo) -> str:
    """Return the text under a key."""
    text, registry = " ".join((info.description or "").split()), _registry(info)
    return text if registry is None else text.replace("{entries}", registry.listed(lambda entry: entry.said))


def _values(info: FieldInfo) -> str:
    """Return in words which values a key takes."""
    bounds = [
        f"{word} {_number(getattr(bound, name))}"
        for bound in info.metadata
        for name, word in _BOUNDS.items()
        if hasattr(bound, name)
    ]
    registry = _registry(info) if any(map(_is_checked, info.metadata)) else None
    named = _either(info.annotation) if registry is None else _alternatives([json.dumps(name) for name in registry])
    return ", ".join([named, *bounds])


def _number(value: float) -> str:
    power = int(value).bit_length() - 1
    return f"2^{power}" if value > 1 << 20 and value == 1 << power else f"{value:g}"


def _either(annotation: Any) -> str:
    return _alternatives(_choices(annotation))


def _alternatives(choices: list[str]) -> str:
    *others, last = choices
    return " or ".join([*filter(None, [", ".join(others)]), last])


def _choices(annotation: Any) -> list[str]:
    kind, parts = get_origin(annotation), get_args(annotation)
    if kind is Literal:
        return [json.dumps(part) for part in parts]
    if kind in (Union, types.UnionType):
        return [choice for part in parts for choice in _choices(part)]
    return [f"list of {_either(parts[0])}" if kind is list else _TYPES[annotation]]
