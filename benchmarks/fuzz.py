"""Mutated configurations and damaged run directories: how each ended, and whether a user saw a traceback.

A configuration is loaded; of those that are accepted one in ``--every`` is run on a toy model. A damaged directory is
inspected with --verify, reported where a text file is damaged, and gone on with; a resume must give the undamaged run's
numbers or a sentence.
"""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.frame import Table, benchmark
from hpc_hess.config import ModelSection
from hpc_hess.parallel.world import World
from tests.support import fuzz_config, fuzz_store
from tests.support.toys import toy_directory
from tests.support.trying import Ended

WORDS = {"code": "went through", "refused": "one sentence", "traceback": "traceback", "crash": "crash", "late": "too late"}


def row(what: str, counts: Counter[str]) -> dict[str, Any]:
    """Return one line of the table."""
    return {"what": what, "tried": sum(counts.values()), **{word: counts[key] for key, word in WORDS.items()}}


def mutated(folder: Path, world: World, count: int, every: int, seed: int, bad: list[str]) -> list[dict[str, Any]]:
    """Load, and run some of what is accepted."""
    toy_directory("llama", folder / "model")
    np.save(folder / "tokens.npy", np.random.default_rng(0).integers(3, 96, size=300))
    loaded: Counter[str] = Counter()
    ran: Counter[str] = Counter()
    for number, case in enumerate(fuzz_config.cases(fuzz_config.toy_base(folder), seed, count)):
        try:
            config = fuzz_config.read(folder / "case.toml", case)
        except Exception:
            bad.append(f"configuration {number}: {traceback.format_exc(limit=-2)}")
            loaded["traceback"] += 1
            continue
        loaded["refused" if config is None else "code"] += 1
        whole_demo = config is not None and config.model.source == ModelSection().source  # minutes; nothing was mutated
        if config is not None and loaded["code"] % every == 0 and not whole_demo:
            ended = fuzz_config.try_run(config, folder / f"run-{number}", world)
            note(ran, ended, f"run of configuration {number}", bad)
    return [row("configuration loaded", loaded), row("accepted configuration run", ran)]


def damaged(folder: Path, world: World, count: int, seed: int, bad: list[str]) -> list[dict[str, Any]]:
    """Damage, inspect, report, go on."""
    bases, counts = fuzz_store.bases(folder, world), dict[str, Counter[str]]()
    for number, rng in enumerate(fuzz_store.damages(seed, count)):
        what, ends = fuzz_store.tried(bases[number % len(bases)], rng, folder / "damaged", world)
        for command, ended in ends.items():
            note(counts.setdefault(command, Counter()), ended, f"directory {number}, {what}, {command}", bad)
    return [row(f"damaged directory, {command}", found) for command, found in sorted(counts.items())]


def note(counts: Counter[str], ended: Ended, what: str, bad: list[str]) -> None:
    """Count an end; keep and show the bad ones."""
    counts[ended.how] += 1
    if not ended.good:
        bad.append(f"{what}: {ended.how} {ended.text}")
        print(bad[-1], file=sys.stderr, flush=True)


@benchmark(
    "Mutated configurations and damaged run directories",
    note="The same seed gives the same mutations. A resume that went through gave the numbers of the undamaged run.",
)
def main(table: Table, configurations: int = 18_000, every: int = 20, stores: int = 300, seed: int = 0) -> int:
    """Try both; the exit code says whether all ended well."""
    torch.set_num_threads(1)  # what is tried runs in a fork, which has none of this process's threads
    world, bad = World.join("cpu", 60.0), list[str]()
    said = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what the runs in this process print
    with tempfile.TemporaryDirectory() as a, tempfile.TemporaryDirectory() as b:
        rows = mutated(Path(a), world, configurations, every, seed, bad)
        rows += damaged(Path(b), world, stores, seed, bad)
    os.dup2(said, 1)
    for each in rows:
        table.add(each)
    print(*bad, sep="\n")
    world.leave()
    return int(bool(bad))


if __name__ == "__main__":
    main()
