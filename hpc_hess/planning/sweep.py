"""A scaling study: every combination of some settings, as runs of their own.

config = "launch/configs/smollm2.toml"     # what all runs have in common
out = "runs/study"                         # each goes to a directory of its own there
launcher = "torchrun"                      # torchrun, mpirun or srun

[set]                                      # keys that differ from that configuration, for all runs
"lanczos.steps" = 6
[sweep]                                    # every combination; ranks is no key of the configuration
ranks = [1, 2, 4]
"model.source" = ["a/config.json", "b/config.json"]
[per_rank]                                 # multiplied by the ranks: weak scaling
"data.sequences" = 2
"""

from __future__ import annotations

import itertools
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hpc_hess.errors import ConfigError
from hpc_hess.linalg.lanczos import Window
from hpc_hess.storage.events import EVENTS_NAME, read_events

Value = str | int | float | bool | list[str]


class Study(BaseModel):
    """What a study file holds."""

    model_config = ConfigDict(extra="forbid")

    config: str
    out: str
    launcher: Literal["torchrun", "mpirun", "srun"] = "torchrun"
    set: dict[str, Value] = {}
    sweep: dict[str, list[Value]] = Field(min_length=1)
    per_rank: dict[str, int] = {}


class Point(NamedTuple):
    """One run of a study: its name, which is its directory, its ranks, and its --set options."""

    name: str
    ranks: int
    overrides: list[str]


def read_study(path: Path) -> Study:
    """Read a study file. Raises ConfigError."""
    try:
        study = Study.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"cannot read the study {path}: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg'].lower()}") from None
    ranks = study.sweep.get("ranks", [1])
    if not all(isinstance(n, int) and n > 0 for n in ranks):
        raise ConfigError(f"{path}: sweep.ranks = {ranks} should be numbers of ranks")
    return study


def points(study: Study) -> list[Point]:
    """Return the runs of a study, in the order of its lists."""
    found: list[Point] = []
    for values in itertools.product(*study.sweep.values()):
        chosen = dict(zip(study.sweep, values, strict=True))
        ranks = chosen.pop("ranks", 1)
        assert isinstance(ranks, int)
        keys = {**study.set, **chosen, **{key: ranks * count for key, count in study.per_rank.items()}}
        number = f"{len(found):03d}"
        words = [f"{ranks}-ranks", *(_word(key, value) for key, value in chosen.items())]
        name = "_".join([number, *words])
        keys["run.out"] = str(Path(study.out) / name)
        found.append(Point(name, ranks, [f"{key}={json.dumps(value)}" for key, value in keys.items()]))
    return found


def _word(key: str, value: Any) -> str:
    text = str(value).removesuffix("/config.json").rsplit("/", 1)[-1] if isinstance(value, str) else str(value)
    return f"{key.rsplit('.', 1)[-1]}-{''.join(c if c.isalnum() or c in '.-' else '-' for c in text)}"


@dataclass(frozen=True)
class Measured:
    """What a finished run tells of its cost.

    Attributes
    ----------
    operator : which product: only runs of the same one are comparable.
    steps : for each step of the first group: the vectors it was made orthogonal to, seconds of the product of the group and
        of its Lanczos step, in that order.

    """

    name: str
    operator: str
    num_params: int
    ranks: int
    tokens: int  # of the whole data set
    micro_batches: int  # of a rank
    micro_batch_tokens: int
    rows: int
    width: int
    memory_bytes: int
    steps: list[tuple[int, float, float]]


def measured(folder: Path) -> Measured:
    """Read what a finished run measured. Raises ConfigError where it is not finished."""
    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        config = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
        events = read_events(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} holds no finished run ({type(error).__name__}): run it to its end first") from None
    lanczos, data, ranks = config["lanczos"], result["data"], result["world_size"]
    if "weight" in data:  # a problem of one's own: its batches are what it is made of
        data = {**data, "tokens": data["weight"], "sequences": data["batches"]}
        config["data"]["micro_batch"], data["sequence_length"] = 1, data["weight"] / data["batches"]
    if "tokens" not in data:
        raise ConfigError(f"{folder} is a run on labels, whose cost is not one of tokens: leave this directory out")
    window = Window(lanczos["reorthogonalise"], lanczos["steps"])
    steps = [e for e in events if e.get("event") == "step" and e["probe"] == 0]
    if not steps:
        raise ConfigError(f"{folder / EVENTS_NAME} holds no step of a run: leave this directory out, or run it anew")
    width = max((e.get("lock_step", 1) for e in steps), default=1)
    per_rank = -(-data["sequences"] // ranks)
    batch = min(config["data"]["micro_batch"], per_rank)
    operator: Mapping[str, Any] = result["operator"]
    kind = operator["method"] if operator["method"] == "exact" else f"{operator['scheme']} differences"
    return Measured(
        folder.name,
        f"{operator['name']}, {kind}, {operator['dtype']}",
        result["num_params"],
        ranks,
        data["tokens"],
        -(-per_rank // batch),
        batch * data["sequence_length"],
        window.rows,
        width,
        result["memory"]["peak_bytes"] - result["memory"]["baseline_bytes"],
        [
            (
                0 if window.rule == "none" else len(window.reads(e["step"] - 1)),
                e["lock_step"] * e["hvp_s"],
                e["lock_step"] * e["lanczos_s"],
            )
            for e in steps
        ],
    )
