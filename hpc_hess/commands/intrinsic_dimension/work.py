"""The search for an intrinsic dimension, in one training run on the sharded model; then a check at half of it.

theta = theta_0 + Phi^T w: the gradient by w is the sketch of the gradient by theta. Every rank holds w, its shard of theta_0
and of Phi^T w. What is held out to measure is the end of the data set. The state is kept after every measurement.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from hpc_hess.commands.arguments import Search
from hpc_hess.commands.finetune.trainers import Subspace, Whole
from hpc_hess.commands.finetune.work import batch_rows
from hpc_hess.commands.intrinsic_dimension.rule import DoublingRule, threshold_of
from hpc_hess.config import Config
from hpc_hess.console.words import number
from hpc_hess.errors import ConfigError, NumericsError
from hpc_hess.model.data.data import objective_of
from hpc_hess.model.sharded.loss import LabelObjective
from hpc_hess.parallel.world import World
from hpc_hess.session.problem import Problem, load_problem
from hpc_hess.session.session import Session, opened
from hpc_hess.session.stopping import InterruptedProductError
from hpc_hess.sketch.kinds import SketchSettings
from hpc_hess.sketch.sketch import Sketch
from hpc_hess.storage.agree import attempt
from hpc_hess.storage.identity import must_match
from hpc_hess.storage.run_files import write_aside

RECORD_NAME = "intrinsic_dimension.json"


@dataclass
class Progressed:
    """What is known so far; what a run that goes on begins with."""

    start: float | None = None
    baseline: list[tuple[int, float]] = field(default_factory=list)  # (steps, metric) of ordinary training
    threshold: float | None = None
    search: list[tuple[int, int, float]] = field(default_factory=list)  # (steps, dimension, metric)
    dimension: int | None = None  # found
    failed: bool = False
    half: list[tuple[int, float]] = field(default_factory=list)  # the check at half the dimension
    half_reached: bool | None = None


def intrinsic_dimension(config: Config, world: World, search: Search) -> int:
    """Find the dimension, or go on with it; writes OUT/intrinsic_dimension.{json,html}. Collective: yes.

    Returns the exit code: 0, also where no dimension up to the largest reaches the target.

    Raises
    ------
    HpcHessError : as one sentence for the user.

    """
    out = Path(config.run.out)
    with opened(config, world, out, 1) as session:
        if config.operator.routing != "free":
            config = config.model_copy(update={"operator": config.operator.model_copy(update={"routing": "free"})})
        problem = load_problem(config, world, session.progress)
        if len(problem.samples) <= search.held_out:
            raise ConfigError(
                f"--held-out {search.held_out} leaves nothing of {len(problem.samples)} sequences to train on: raise "
                "data.sequences"
            )
        job = _Job(config, problem, search, session)
        try:
            job.run()
        except InterruptedProductError as interrupted:
            return session.stopped(str(interrupted))
        page = None
        with attempt(world, out / RECORD_NAME, "write the page", of=OSError):
            if world.rank == 0:
                from hpc_hess.commands.intrinsic_dimension.page import (  # matplotlib: not on the other ranks
                    result_text,
                    write_page,
                )

                page = write_page(out, job.record())
    if page is not None:
        print(result_text(job.record()))
        print(f"\nwritten to {out / RECORD_NAME} and {page}")
    world.barrier("finish")
    return 0


class _Job:
    """The phases: measure at theta_0, ordinary training, the search, the check."""

    def __init__(self, config: Config, problem: Problem, search: Search, session: Session) -> None:
        self._problem, self._search, self._out = problem, search, session.out
        self._session, self._world, self._progress, self._stopper = session, session.world, session.progress, session.stopper
        count = len(problem.samples) - search.held_out
        self._train, self._test = range(count), range(count, len(problem.samples))
        settings = SketchSettings.of(config.sketch, dimension=search.largest)
        self._sketch = Sketch(problem.model.layout.num_params_full, settings)
        self._theta0 = problem.model.read_parameters()
        self._row = min(config.data.micro_batch, max(1, search.batch // session.world.size))
        self._slowest_s = 0.0
        self._asked = asdict(search) | {
            "sketch": config.sketch.model_dump() | {"dimension": search.largest},
            "parameters": config.parameters.model_dump(),
            "model_fingerprint": problem.source.fingerprint,
            "data_fingerprint": problem.samples.fingerprint,
            "compute_dtype": config.model.compute_dtype,
        }
        self._asked.pop("verify")
        self.known, self._kept = self._take_up()

    def record(self) -> dict[str, Any]:
        """Return what intrinsic_dimension.json holds."""
        return {
            "format": 1,
            "asked": self._asked,
            "model": self._problem.source.name,
            "num_params": self._problem.model.space.size,
            **asdict(self.known),
        }

    def run(self) -> None:
        """Do what is not done yet. Collective: yes. Raises InterruptedProductError: stop now."""
        known, search = self.known, self._search
        if known.start is None:
            known.start = self._measure()
            self._save(None)
        if known.threshold is None:
            if search.target is None:
                self._progress.phase("ordinary training, to know what can be reached")
                self._baseline()
            best = max([known.start, *(metric for _, metric in known.baseline)])
            if search.target is None and best <= known.start:
                raise ConfigError(
                    f"{search.baseline_steps} steps of ordinary training gain nothing over {number(known.start)} at "
                    "theta_0: choose another --baseline-rate or more --baseline-steps, or give --target"
                )
            known.threshold = search.target if search.target is not None else threshold_of(known.start, best, search.share)
            self._progress.note(f"{search.metric} {number(known.start)} at theta_0, to reach {number(known.threshold)}")
            self._save(None)
        if known.dimension is None and not known.failed:
            self._progress.phase("search")
            self._look()
        if search.verify and known.dimension is not None and known.half_reached is None and known.dimension > 1:
            self._progress.phase(f"check at {known.dimension // 2} dimensions")
            self._check(known.dimension // 2)

    # -- phases --------------------------------------------------------------------------------------------------------

    def _baseline(self) -> None:
        """Train all parameters; forget them afterwards."""
        known, search = self.known, self._search
        trainer = Whole(self._problem, search.baseline_rate)
        self._take_up_training(trainer, known.baseline[-1][0] if known.baseline else 0)
        while trainer.steps < search.baseline_steps:
            self._go_on()
            with self._timed():
                trainer.step(lambda out: self._gradient(trainer.steps, out))
            if trainer.steps % search.every == 0 or trainer.steps == search.baseline_steps:
                known.baseline.append((trainer.steps, self._measure()))
                self._save(trainer)
        self._problem.model.write_parameters(self._theta0)

    def _look(self) -> None:
        known, search = self.known, self._search
        assert known.start is not None
        assert known.threshold is not None
        rule = DoublingRule(known.threshold, search.delta, search.smallest, search.largest, known.start)
        for _, _, metric in known.search:  # what an interrupted search decided already
            rule.decide(metric)
        trainer = Subspace(self._problem, self._sketch, self._theta0, search.learning_rate)
        self._take_up_training(trainer, known.search[-1][0] if known.search else 0)
        while True:
            metric = self._advance(trainer, rule.dimension)
            known.search.append((trainer.steps, rule.dimension, metric))
            decision = rule.decide(metric)
            if decision == "double":
                self._progress.note(f"{number(metric)} after {trainer.steps} steps: on to {rule.dimension} dimensions")
            elif decision != "go on":
                known.dimension, known.failed = (rule.dimension, False) if decision == "found" else (None, True)
            self._save(None if known.dimension or known.failed else trainer)
            if decision in ("found", "failed"):
                return

    def _check(self, dimension: int) -> None:
        """Train anew in half the dimensions, as long as the search took."""
        known = self.known
        assert known.threshold is not None
        trainer = Subspace(self._problem, self._sketch, self._theta0, self._search.learning_rate)
        self._take_up_training(trainer, known.half[-1][0] if known.half else 0)
        while trainer.steps < known.search[-1][0] and not (known.half and known.half[-1][1] >= known.threshold):
            known.half.append((trainer.steps + self._search.every, self._advance(trainer, dimension)))
            self._save(trainer)
        known.half_reached = max(metric for _, metric in known.half) >= known.threshold
        self._save(None)

    def _advance(self, trainer: Subspace, dimension: int) -> float:
        """Take c steps in the first ``dimension`` directions; return the metric after them."""
        for _ in range(self._search.every):
            self._go_on()
            with self._timed():
                trainer.step(dimension, lambda out: self._gradient(trainer.steps, out))
        return self._measure()

    # -- parts ---------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._slowest_s = max(self._slowest_s, self._world.max_over_ranks(time.perf_counter() - began, "step time"))

    def _go_on(self) -> None:
        if reason := self._stopper.agreed(self._slowest_s):
            raise InterruptedProductError(reason)

    def _gradient(self, step: int, out: Any) -> float:
        search, problem = self._search, self._problem
        rows = batch_rows(len(self._train), min(search.batch, len(self._train)), step, search.seed)
        problem.gradient.objective = self._objective(rows)
        try:
            loss, _ = problem.gradient(out)
        except NumericsError as error:
            raise NumericsError(f"in step {step + 1} {error}; or the learning rate is too large") from None
        self._progress.status(f"step {step + 1} | loss {number(loss, 5)}")
        return loss

    def _objective(self, rows: Sequence[int]) -> LabelObjective:
        world, device = self._world, self._problem.model.space.device
        return objective_of(self._problem.samples, rows, world.rank, world.size, self._row, device)

    def _measure(self) -> float:
        """Return the metric on what is held out. Collective: yes."""
        objective, module = self._objective(self._test), self._problem.model.module
        found = torch.zeros(2, dtype=torch.float64, device=self._problem.model.space.device)
        count = objective.num_micro_batches
        with self._problem.model.measuring():
            for index in range(count):
                with self._world.guard(f"measuring, micro-batch {index + 1} of {count}"):
                    logits, targets = objective.logits_and_targets(module, index)
                predicted = targets >= 0
                found[0] += (logits.argmax(1)[predicted] == targets[predicted]).sum()
                found[1] += torch.nn.functional.cross_entropy(
                    logits[predicted], targets[predicted], reduction="sum"
                ).double()
        hits, loss = (self._world.sum_over_ranks(found, "metric") / objective.num_tokens).tolist()
        metric = 100 * hits if self._search.metric == "accuracy" else -loss
        return self._world.broadcast(metric, "metric")  # decisions follow from it

    def _save(self, trainer: Whole | Subspace | None) -> None:
        """Keep what is known, and the state of a training in progress. Collective: yes."""
        state = "" if trainer is None else f"{trainer.steps:08d}-{trainer.file}"
        with attempt(self._world, self._out, "keep the search"):
            if self._world.rank == 0:
                self._out.mkdir(parents=True, exist_ok=True)
        if trainer is not None:  # under a name of its own, which the record gives once it is whole
            trainer.write(self._out / state)
        with attempt(self._world, self._out, "keep the search"):
            if self._world.rank == 0:
                write_aside(self._out / RECORD_NAME, json.dumps(self.record() | {"state": state}, indent=1) + "\n")
                for old in [*self._out.glob(f"*-{Whole.file}"), *self._out.glob(f"*-{Subspace.file}")]:
                    if old.name != state:
                        old.unlink()
        self._kept, self._session.progressed = "", True

    def _take_up(self) -> tuple[Progressed, str]:
        """Return what an earlier run of the same search left: what is known, the file of a training. Collective: yes.

        Raises
        ------
        StoreError : it was another search.

        """
        known, kept = Progressed(), ""
        path = self._out / RECORD_NAME
        with attempt(self._world, path, "take up the search"):
            if self._world.rank == 0 and path.exists():
                record = json.loads(path.read_text(encoding="utf-8"))
                before = {"compute_dtype": self._asked["compute_dtype"]} | record["asked"]  # old records do not say it
                must_match(before, self._asked, f"{path} holds a search", "choose another run.out, or go back to that")
                known, kept = Progressed(**{key: record[key] for key in asdict(known)}), record["state"]
        return self._world.broadcast((known, kept), "state of the search")

    def _take_up_training(self, trainer: Whole | Subspace, steps: int) -> None:
        """Go on with the training that was interrupted, if one was. Collective: yes."""
        if self._kept:
            trainer.take_up(self._out / self._kept, steps)
            self._progress.note(f"going on after step {steps}")
