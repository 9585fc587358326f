"""Kills at random instants: whole runs, killed (SIGKILL) and resumed until they end, against one that was left alone.

Every second kill takes launcher and ranks at once, the others a single rank, after which the launcher must end the rest
by itself. Every fourth kill comes at any instant of start-up, creation included, the others while steps are made. After
each kill the store must open with every checksum right and hold every step that was reported as done but the last, whose
rows may still have been on their way; when a run has ended, alpha, beta and the whole basis must equal, bit for bit,
those of the run that was left alone.
``python -m benchmarks.soak`` kills 100 times; ``--kills 10 10`` is a short form; ``--add --seed 1 --kills 0 20`` adds to an
earlier table.
"""

from __future__ import annotations

import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil

from benchmarks.frame import Table, benchmark
from hpc_hess.storage.events import read_events
from hpc_hess.storage.reader import read_store
from hpc_hess.storage.schema import FILE
from tests.support.launching import launch

_END_S = 90.0  # a job of which a rank was killed has ended by then
_WHOLE_S = 1800.0  # a run that nobody kills has ended by then
_SHARE = 0.4  # of the seconds that all steps take: how long a resumed run is left alone at most
_TOY = ["launch/configs/toy.toml", "lanczos.steps=150", "lanczos.probes=2"]
_PARTS = "store.checkpoint_every=1"  # kills find a product in parts as well
_SMOLLM2 = [
    "launch/configs/smollm2.toml",
    "lanczos.steps=6",
    "data.sequences=4",
    "data.micro_batch=1",
    _PARTS,
    "data.sequence_length=64",
    "operator.step=1e-3",
    "operator.check=false",
]
CASES = {  # name: launch script, configuration and settings
    "toy, rank files": ("torchrun.sh", _TOY),
    "toy, one file over MPI": ("mpirun.sh", _TOY),
    "SmolLM2-135M, rank files": ("torchrun.sh", _SMOLLM2),
    "SmolLM2-135M, one file over MPI": ("mpirun.sh", _SMOLLM2),
}


@dataclass
class Outcome:
    """What became of the kills of one case."""

    kills: int = 0
    before_creation: int = 0  # no store was there yet
    resumed: int = 0  # kills after which a store opened and went on
    lost_steps: int = 0  # reported as done and not in the store: the worst kill
    finished: int = 0  # runs that came to their end
    interrupted: list[int] = field(default_factory=list)  # kills that each of them had survived
    unequal: int = 0  # of those, not bitwise equal


@contextmanager
def started(script: str, settings: list[str], out: Path, ranks: int) -> Iterator[Any]:
    """Start the run that writes to ``out``; whatever is left of it at the end is killed."""
    config, *rest = [*settings, f"run.out={out}"]
    process = launch(script, "-n", str(ranks), config, *(word for s in rest for word in ("--set", s)))
    try:
        yield process
    finally:
        for each in family(process.pid):
            kill(each)
        process.wait()


def family(pid: int) -> list[psutil.Process]:
    """Return the live process ``pid`` and its descendants."""
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill(process: psutil.Process) -> None:
    """SIGKILL; nothing where the process has just ended by itself."""
    with suppress(psutil.NoSuchProcess):
        process.kill()


def is_rank(process: psutil.Process) -> bool:
    """Whether a process is a rank, not a launcher around it."""
    try:
        return "hpc_hess" in process.cmdline()[2:4]
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return False


def reported(out: Path) -> int:
    """Return the number of steps, over all probes, that the run has ever reported as done."""
    furthest: dict[int, int] = {}
    for event in read_events(out):
        if event["event"] == "step":
            furthest[event["probe"]] = max(furthest.get(event["probe"], 0), event["step"])
    return sum(furthest.values())


def committed(out: Path) -> int:
    """Return the number of steps in the store, after checking every row of it. Raises AssertionError."""
    with read_store(out) as view:
        damage = view.verify()
        assert not damage, damage
        return sum(view.state.lengths)


def same_bits(out: Path, reference: Path) -> bool:
    """Whether alpha, beta and every basis row of two finished runs are equal."""
    with read_store(out) as mine, read_store(reference) as theirs:
        for a, b in zip(mine.probes, theirs.probes, strict=True):
            if a.alpha.tobytes() != b.alpha.tobytes() or a.beta.tobytes() != b.beta.tobytes() or a.rows != b.rows:
                return False
            if any(not np.array_equal(a.basis[row], b.basis[row]) for row in a.rows):
                return False
    return True


def soak(script: str, settings: list[str], folder: Path, *, kills: int, ranks: int = 2, seed: int = 0) -> Outcome:
    """Kill and resume ``kills`` times, let the last run end, and tell what became of them.

    Raises
    ------
    AssertionError : a store is damaged, a job hangs after a kill, or a run fails by itself.

    """
    rng, outcome, settings = random.Random(seed), Outcome(), [*settings, "store.keep_basis=true"]
    reference, out = folder / "reference", folder / "run"
    with started(script, settings, reference, ranks) as process:
        began = time.monotonic()
        assert until(lambda: begun(reference), process), process.communicate()[0]
        start_s = time.monotonic() - began
        output, _ = process.communicate()
        assert process.returncode == 0, output
        work_s = time.monotonic() - began - start_s
    survived = 0
    while outcome.kills < kills or out.exists():
        with started(script, settings, out, ranks) as process:
            before, at_work = begun(out), outcome.kills % 4 > 0
            if at_work or outcome.kills == kills:
                until(lambda before=before: begun(out) > before, process)
            pause = rng.uniform(0, _SHARE * work_s if at_work else start_s)
            until(lambda: False, process, pause if outcome.kills < kills else None)
            ended = process.poll() is not None
            if not ended:
                strike(process, rng if outcome.kills % 2 else None)
            output, _ = process.communicate()
        if ended:
            assert process.returncode == 0, output
            outcome.finished += 1
            outcome.interrupted.append(survived)
            outcome.unequal += not same_bits(out, reference)
            shutil.rmtree(out)
            survived = 0
            continue
        outcome.kills += 1
        if not (out / FILE).exists():
            outcome.before_creation += 1
            continue
        survived += 1
        outcome.resumed += 1  # the next turn goes on with it, or fails
        done, there = reported(out), committed(out)
        outcome.lost_steps = max(outcome.lost_steps, done - there)
        print(f"  kill {outcome.kills}: {done} steps were reported, {there} are there", flush=True)
    return outcome


def begun(out: Path) -> int:
    """Return how many times a run has begun to make steps."""
    return sum(event["event"] in ("start", "resume") for event in read_events(out))


def until(condition: Callable[[], Any], process: Any, seconds: float | None = None) -> bool:
    """Wait until ``condition`` holds, the run has ended, or the time is over; return whether it holds.

    What the run prints waits in its pipe. Raises AssertionError where a run that nobody kills does not end.
    """
    deadline = time.monotonic() + (_WHOLE_S if seconds is None else seconds)
    while not (held := bool(condition())) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert seconds is not None or held or process.poll() is not None, f"a run goes on after {_WHOLE_S:.0f} s"
    return held


def strike(process: Any, rng: random.Random | None) -> None:
    """Kill everything at once, or one rank of ``rng``'s choice and wait until the launcher has ended the rest."""
    everyone = family(process.pid)
    ranks = [p for p in everyone if is_rank(p)]
    if rng is None or not ranks:
        for each in everyone:
            kill(each)
        return
    kill(rng.choice(ranks))
    _, alive = psutil.wait_procs(everyone, timeout=_END_S)
    assert not alive, f"{len(alive)} processes go on {_END_S:.0f} s after a rank was killed"


@benchmark("Runs killed at random instants and resumed")
def main(
    table: Table,
    kills: Annotated[tuple[int, ...], "for each case in turn"] = (30, 30, 20, 20),
    seed: int = 0,
    add: Annotated[bool, "to the table that is there; a case of 0 kills is left out"] = False,
) -> None:
    table.settings |= {"ranks": 2, "every second kill": "one rank; else launcher and ranks at once"}
    for row in table.earlier() if add else []:
        table.add(row)
    for (name, (script, settings)), count in zip(CASES.items(), kills, strict=False):
        if not count:
            continue
        print(name, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            found = soak(script, settings, Path(folder), kills=count, seed=seed)
        assert found.lost_steps <= 1, found
        assert not found.unequal, found
        table.add(
            {
                "run": name,
                "seed": seed,
                "kills": found.kills,
                "before a store was there": found.before_creation,
                "resumed": found.resumed,
                "completed steps lost, at most": found.lost_steps,
                "runs finished": found.finished,
                "kills each survived": " ".join(map(str, found.interrupted)),
                "not bitwise equal": found.unequal,
            }
        )


if __name__ == "__main__":
    main()
