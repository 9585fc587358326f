"""Spectra over checkpoints and sample sizes: an ordinary run for each, and one page that compares them.

Schioppa 2024, section 5: R_NEG = |lambda_min| / lambda_max; R_n = lambda_n / lambda_1, where lambda_n is the n-th largest
eigenvalue; an outlier is an eigenvalue with R_n above 20 %, R_1 = 1 included; the gradient mass in the outlier space is
|P g|^2 / |g|^2, with P the projection on the outliers' eigenvectors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_hess.commands.finetune.work import STATE_NAME
from hpc_hess.commands.run.work import run
from hpc_hess.config import Config
from hpc_hess.errors import ConfigError
from hpc_hess.model.sources.source import resolve_source
from hpc_hess.parallel.memory import release_memory
from hpc_hess.parallel.world import World
from hpc_hess.session.problem import fills_a_cache, in_turn
from hpc_hess.session.stopping import EXIT_STOPPED, Stopper
from hpc_hess.storage.agree import attempt
from hpc_hess.storage.lock import RunLock
from hpc_hess.storage.run_files import read_run, write_aside

RECORD_NAME, FORMAT = "dynamics.json", 1
OUTLIER = 0.2  # share of the largest eigenvalue
_EIGENPAIRS = 8  # where the configuration asks for none


@dataclass(frozen=True)
class Point:
    """One run of the study: the spectrum of one model on so many sequences."""

    name: str
    model: str
    step: int | None  # of the training that the model is a checkpoint of
    config: Config


def dynamics(config: Config, world: World, *, models: Sequence[str], sequences: Sequence[int], out: Path) -> int:
    """Run each model on each sample size into OUT/NAME, then write OUT/dynamics.json and OUT/dynamics.html. Collective: yes.

    Runs that are finished are not computed again. Returns the exit code: 75 where a run stopped early.

    Raises
    ------
    HpcHessError : as one sentence for the user; runs keep every committed step.

    """
    shared = any(fills_a_cache(config.model.model_copy(update={"source": model}), config.data) for model in models)
    points = in_turn(world, lambda: plan(config, models, sequences, out), "read the models' configurations", shared=shared)
    with Stopper(world, config.run.time_limit, config.run.grace_s) as stopper:
        for number, point in enumerate(points, 1):
            _say(world, f"\n== {point.name}: {number} of {len(points)}")
            if reason := stopper.agreed(0.0):
                _say(world, f"stopped early before {point.name}: {reason}; run the same command to go on")
                return EXIT_STOPPED
            if code := run(point.config, world, stopper):
                return code
            release_memory()  # of this model, before the next one is loaded
        with RunLock.acquire(out, world), attempt(world, out / RECORD_NAME, "compare the spectra", of=OSError):
            if world.rank == 0:
                from hpc_hess.commands.dynamics.page import write_page  # matplotlib: not on the other ranks

                results = [read_run(point.config.run.out).result for point in points]
                record = {
                    "format": FORMAT,
                    "notes": _notes(config, points, results),
                    "outlier_above": OUTLIER,
                    "runs": [_row(point, result) for point, result in zip(points, results, strict=True)],
                }
                write_aside(out / RECORD_NAME, json.dumps(record, indent=1) + "\n")
                print(f"\n{len(points)} spectra compared: {write_page(out, record, results)}")
    world.barrier("finish")
    return 0


def plan(config: Config, models: Sequence[str], sequences: Sequence[int], out: Path) -> list[Point]:
    """Return the runs in order; reads the models' configurations only. Collective: no.

    Raises
    ------
    ConfigError : nothing to do, the same thing twice, a sample size below 1.
    ModelError : a model is not on disk.

    """
    if not models:
        raise ConfigError("there is no model to study: --models takes directories, such as DIR/step-*")
    if len({*models}) < len(models) or len({*sequences}) < len(sequences):
        raise ConfigError("--models and --sequences should name each model and each number once")
    for count in sequences:
        if count < 1:
            raise ConfigError(f"--sequences {count} is not valid: it should be at least 1")
    studies = dict(config.studies)
    if not studies["eigenpairs"].wanted:
        studies["eigenpairs"] = studies["eigenpairs"].model_copy(update={"count": _EIGENPAIRS})
    points = []
    for model, name in zip(models, _names(models), strict=True):
        section = config.model.model_copy(update={"source": model})
        resolve_source(section)
        for count in sequences or [config.data.sequences]:
            full = f"{name}-{count}-sequences" if sequences else name
            changes = {
                "model": section,
                "studies": studies,
                "data": config.data.model_copy(update={"sequences": count}),
                "run": config.run.model_copy(update={"out": str(out / full)}),
            }
            points.append(Point(full, name, _step(Path(model)), config.model_copy(update=changes)))
    return points


def _names(models: Sequence[str]) -> list[str]:
    """Return a directory name for each model: as many of its path's last parts as tell the models apart."""
    paths = [Path(model).resolve() for model in models]
    paths = [path.parent if path.name == "config.json" else path for path in paths]
    for depth in range(1, max(len(path.parts) for path in paths)):
        names = ["-".join(path.parts[1:][-depth:]) for path in paths]
        if len({*names}) == len(names):
            return names
    raise ConfigError("--models names the same directory twice")


def _step(model: Path) -> int | None:
    """Return after how many updates a checkpoint of ``hpc-hess finetune`` was written."""
    try:
        return int(json.loads((model / STATE_NAME).read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _say(world: World, text: str) -> None:
    if world.rank == 0:
        print(text, flush=True)


# -- what a result says ------------------------------------------------------------------------------------------------


def ratios(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return R_NEG, R_n, outliers of both signs and the gradient mass of each, from a result.json with eigenpairs.

    ``r_n`` lists R_2, R_3, ... as far as positive eigenpairs were found. ``outliers_known`` : the last of them is none, so
    that no outlier was missed. ``negative_outliers`` : eigenvalues below -20 % of lambda_1. What has no value is None.
    """
    pairs = result["eigenpairs"]["pairs"]
    above = sorted((p for p in pairs if p["value"] > 0), key=lambda p: -p["value"])
    below = sorted((p for p in pairs if p["value"] < 0), key=lambda p: p["value"])
    highest = max([result["lambda_max"], *(p["value"] for p in above[:1])])
    lowest = min([result["lambda_min"], *(p["value"] for p in below[:1])])
    first = above[0]["value"] if above else None
    outliers = [p for p in above if first and p["value"] > OUTLIER * first]
    negative = [p for p in below if first and -p["value"] > OUTLIER * first]
    return {
        "lambda_max": highest,
        "lambda_min": lowest,
        "r_neg": max(-lowest, 0.0) / highest if highest > 0 else None,
        "r_n": [p["value"] / first for p in above[1:]],
        "outliers": len(outliers) if above else None,
        "outliers_known": len(outliers) < len(above),
        "negative_outliers": len(negative) if above else None,
        "negative_outliers_known": len(negative) < len(below),
        "gradient_share": _share(outliers),
        "negative_gradient_share": _share(negative),
    }


def _share(pairs: list[dict[str, Any]]) -> float | None:
    """Return |P g|^2 / |g|^2; None where it was not measured (runs of earlier versions, a gradient of zero)."""
    shares = [pair.get("gradient_share") for pair in pairs]
    return None if None in shares else math.fsum(shares)  # type: ignore[arg-type]


def _row(point: Point, result: Mapping[str, Any]) -> dict[str, Any]:
    pairs = sorted(result["eigenpairs"]["pairs"], key=lambda p: -p["value"])
    return {
        "name": point.name,
        "model": point.model,
        "source": point.config.model.source,
        "step": point.step,
        "sequences": point.config.data.sequences,
        "loss": result["loss"],
        "gradient_norm": result["gradient_norm"],
        **ratios(result),
        "trace": result["trace"],
        "eigenvalues": [{key: p.get(key) for key in ("value", "residual", "converged", "gradient_share")} for p in pairs],
    }


def _notes(config: Config, points: Sequence[Point], results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what a reader should know before comparing the runs."""
    notes = []
    if not config.studies["eigenpairs"].wanted:
        notes.append(f"The configuration asks for no eigenpairs: analysis.eigenpairs = {_EIGENPAIRS} was set.")
    data: dict[int, set[str]] = {}
    for point, result in zip(points, results, strict=True):
        asked, given = point.config.data.sequences, result["data"]["sequences"]
        data.setdefault(asked, set()).add(result["data"]["fingerprint"])
        if given < asked:
            notes.append(f"{point.name}: the data give {given} sequences of the {asked} asked for.")
    if any(len(fingerprints) > 1 for fingerprints in data.values()):
        notes.append("The models do not see the same token ids: their tokenizers differ. Set model.tokenizer.")
    late = sum(not all(p["converged"] for p in result["eigenpairs"]["pairs"]) for result in results)
    if late:
        notes.append(
            f"In {late} of {len(results)} runs not every eigenpair converged; more studies.eigenpairs.most_products help."
        )
    if any(p.get("gradient_share") is None for result in results for p in result["eigenpairs"]["pairs"]):
        notes.append("Some runs have no gradient shares: an earlier version made them, or a gradient is zero.")
    return notes
