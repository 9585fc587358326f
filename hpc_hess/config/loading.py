"""The whole configuration: one TOML file, read, overridden and checked."""

from __future__ import annotations

import copy
import difflib
import json
import math
import re
import tomllib
from datetime import date, time
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hpc_hess.config.sections import Config, Section, registered_settings
from hpc_hess.errors import ConfigError
from hpc_hess.registry.operators import OPERATORS
from hpc_hess.registry.tasks import TASKS

PACKAGE = Path(__file__).resolve().parents[1]  # holds launch/configs and launch/data
DEMO = str(PACKAGE / "launch/configs/smollm2.toml")
TOY = str(PACKAGE / "launch/configs/toy.toml")


_ROUNDED = {"bfloat16": 40, "tf32": 2.5}  # least error of a difference in it, in %: docs/regimes.md


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a TOML file, apply ``section.key=value`` overrides, validate.

    ``launch/configs/NAME.toml`` is the package's own where the working directory has none.

    Raises
    ------
    ConfigError : no such file, not TOML, unknown key (with the nearest valid one), wrong type or value.

    """
    path = Path(path)
    if not path.exists() and (PACKAGE / path).is_file():
        path = PACKAGE / path
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"no such configuration file: {path}") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    return make_config(values, overrides)


def make_config(values: dict[str, Any], overrides: list[str] | None = None) -> Config:
    """Build a validated Config from nested dictionaries and ``table.key=value`` overrides. Raises ConfigError."""
    values = copy.deepcopy(values)
    _give_studies_their_keys(values)
    for text in overrides or []:
        _override(values, text)
    tables = values.pop("studies", {})
    if not isinstance(tables, dict):
        raise ConfigError("'studies' is a section of the configuration, not a value")
    registered = registered_settings()
    for name in tables:
        if name not in registered:
            near = difflib.get_close_matches(name, registered, n=1, cutoff=0.0)
            raise ConfigError(f"unknown study 'studies.{_printable(name)}': did you mean 'studies.{near[0]}'?")
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None
    studies = {}
    for name, settings in registered.items():
        try:
            studies[name] = settings.model_validate(tables.get(name, {}))
        except ValidationError as error:
            raise ConfigError(_explain(error, ("studies", name))) from None
    config = config.model_copy(update={"studies": studies})
    _check_combinations(config)
    return config


def _give_studies_their_keys(values: dict[str, Any]) -> None:
    """Put the keys of [analysis], where all studies had theirs, into the tables of the studies. Raises ConfigError."""
    old = values.get("analysis", {})
    if not isinstance(old, dict):
        raise ConfigError("'analysis' is a section of the configuration, not a value")
    for key, value in old.items():
        for study, own in _places(key):
            table = values.setdefault("studies", {})
            table = table.setdefault(study, {}) if isinstance(table, dict) else {}
            if isinstance(table, dict) and table.setdefault(own, value) != value:
                raise ConfigError(
                    f"analysis.{key} = {value!r} and studies.{study}.{own} = {table[own]!r} contradict each other: they are "
                    "the same setting, leave the first one out"
                )
    values.pop("analysis", None)


def _places(former: str) -> list[tuple[str, str]]:
    """Return the (study, key) that a key of [analysis] stands for. Raises ConfigError."""
    names: dict[str, list[tuple[str, str]]] = {}
    for study, settings in registered_settings().items():
        for key, old in settings.former.items():
            names.setdefault(old, []).append((study, key))
    if former not in names:
        near = difflib.get_close_matches(former, names, n=1, cutoff=0.0)
        study, key = names[near[0]][0]
        unknown = f"analysis.{_printable(former)}"
        raise ConfigError(f"unknown configuration key '{unknown}': did you mean 'studies.{study}.{key}'?")
    return names[former]


def _override(values: dict[str, Any], text: str) -> None:
    match = re.fullmatch(r"(studies\.\w+|\w+)\.(\w+)=(.*)", text, re.DOTALL)
    if not match:
        raise ConfigError(f"--set takes section.key=value, not '{_printable(text)}'")
    section, key, value = match.groups()
    try:
        parsed = tomllib.loads(f"x = {value}")["x"]
    except tomllib.TOMLDecodeError:
        parsed = value  # a bare word is a string
    if isinstance(parsed, date | time | dict):
        parsed = value  # so is "01:30:00"
    places = [(section, key)]
    if section == "analysis":
        places = [(f"studies.{study}", own) for study, own in _places(key)]
    for where, name in places:
        table = values
        for part in where.split("."):
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise ConfigError(f"'{where}' is a section of the configuration, not a value")
        table[name] = parsed


def _printable(text: str) -> str:
    """Return a user's text as a part of one line."""
    return text if text.isprintable() else repr(text)[1:-1]


def sections() -> dict[str, type[Section]]:
    """Return all tables of a configuration by name, such as "lanczos" and "studies.trace"."""
    own = {name: type(field.default) for name, field in Config.model_fields.items() if name != "studies"}
    return own | {f"studies.{name}": settings for name, settings in registered_settings().items()}


def _explain(error: ValidationError, within: tuple[str, ...] = ()) -> str:
    """Turn pydantic's first complaint, of the table ``within``, into one sentence with the remedy."""
    first = error.errors()[0]
    depth = 2 - min(1, len(within))  # of what a message names: section and key, or key
    where = [_printable(str(part)) for part in first["loc"]]
    name = ".".join([*within, *where[:depth]])
    if first["type"] == "extra_forbidden":
        is_section = not within and len(where) == 1
        valid = [s if is_section else f"{s}.{k}" for s, table in sections().items() for k in table.model_fields]
        near = difflib.get_close_matches(name, dict.fromkeys(valid), n=1, cutoff=0.0)
        kind = "section" if is_section else "key"
        return f"unknown configuration {kind} '{name}': did you mean '{near[0]}'?"
    if first["type"] == "model_type":
        return f"'{name}' is a section of the configuration, not a value"
    shown = repr(first["input"])
    reasons = dict.fromkeys(
        str(e["msg"]).replace("Input should be ", "") for e in error.errors() if e["loc"][:depth] == first["loc"][:depth]
    )
    return f"{name} = {shown} is not valid: it should be {' or '.join(reasons)}"


_OF_OWN = ("master_dtype", "compute_dtype", "activation_checkpointing")  # keys of [model] that hold for own problems, too


def _check_own_problem(config: Config) -> None:
    """Refuse what a problem of one's own has no use for. Raises ConfigError."""
    build, model, usual = config.problem.build, config.model, Config()
    if not build:
        if config.problem.settings:
            raise ConfigError("[problem] has settings and no build: set problem.build to FILE.py:FUNCTION")
        return
    for name, table, default in (("model", model, usual.model), ("data", config.data, usual.data)):
        for key in type(table).model_fields:
            if key not in _OF_OWN and getattr(table, key) != getattr(default, key):
                raise ConfigError(f"problem.build = '{build}' gives the model and the data: leave {name}.{key} out")
    if model.compute_dtype != model.master_dtype:
        raise ConfigError(
            f"a problem of one's own is computed in the type of its parameters: set model.compute_dtype = "
            f'"{model.master_dtype}"'
        )
    try:
        json.dumps(config.problem.settings)
    except TypeError as error:
        raise ConfigError(f"[problem] has a value that is no number, text or list of them: {error}") from None


def _check_combinations(config: Config) -> None:
    _check_own_problem(config)
    model, operator, lanczos = config.model, config.operator, config.lanczos
    if operator.method == "finite_difference" and model.compute_dtype in _ROUNDED:
        raise ConfigError(
            f"finite differences cannot be computed in {model.compute_dtype}: the forward pass rounds the step away "
            f"(measured error over {_ROUNDED[model.compute_dtype]} % at every step size); set "
            'model.compute_dtype = "float32", or operator.method = "exact", which takes no step'
        )
    spec = OPERATORS[operator.kind]
    if operator.method not in spec.methods:
        raise ConfigError(f'operator.kind = "{operator.kind}" needs operator.method = {spec.by}')
    if spec.of_tokens and TASKS[model.task].predicts != "token":
        raise ConfigError(
            f'operator.kind = "{operator.kind}" is of a loss over tokens, and model.task = "{model.task}" predicts labels: '
            'set operator.kind = "hessian"'
        )
    if isinstance(operator.step, float) and not 0 < operator.step < math.inf:
        raise ConfigError(f'operator.step = {operator.step} is not valid: it should be "auto" or greater than 0')
    if isinstance(lanczos.reorthogonalise, int) and lanczos.reorthogonalise < 1:
        raise ConfigError('lanczos.reorthogonalise should be "full", "none" or a window of at least 1')
    if isinstance(lanczos.lock_step, int):
        if lanczos.lock_step < 1:
            raise ConfigError('lanczos.lock_step should be "auto" or at least 1')
        if lanczos.lock_step > 1 and operator.method == "finite_difference":
            raise ConfigError(
                f"lanczos.lock_step = {lanczos.lock_step} saves nothing with finite differences, which share no work "
                'between probes: set operator.method = "exact", or lanczos.lock_step = 1'
            )
    if (model.master_dtype == "float64") != (model.compute_dtype == "float64"):
        raise ConfigError('float64 needs both model.master_dtype = "float64" and model.compute_dtype = "float64"')
    if config.store.checkpoint_every and operator.method == "exact" and config.parallel.replicate > 1:
        raise ConfigError(
            "store.checkpoint_every needs parallel.replicate = 1 with exact products, whose replicas are summed at the end"
        )
    for name, settings in config.studies.items():
        if settings.wanted and settings.of_parameters and config.operator.sketched:
            raise ConfigError(
                f"studies.{name} is a study of parameters, of which operator.sketched = true leaves random combinations: "
                "take one of the two out"
            )
        if settings.wanted:
            settings.check(config)
    if config.run.time_limit:
        parse_time_limit(config.run.time_limit)


def parse_time_limit(text: str) -> float:
    """Return seconds from "HH:MM:SS" or "D-HH:MM:SS". Raises ConfigError."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)", text)
    if not match:
        raise ConfigError(f"run.time_limit = '{_printable(text)}' is not valid: it should be HH:MM:SS or D-HH:MM:SS")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
