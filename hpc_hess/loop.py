"""The loop over groups of probes and their steps: each step is committed before the next begins."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict

import numpy as np
import torch

from hpc_hess.check import check_ritz, relative_difference
from hpc_hess.config import Config
from hpc_hess.curvature.whole_model import ExactOperator
from hpc_hess.errors import ModelError
from hpc_hess.linalg import probes
from hpc_hess.linalg.lanczos import Lanczos, next_products
from hpc_hess.linalg.quadrature import ritz
from hpc_hess.parallel.vector import Basis, Vector, VectorSpace
from hpc_hess.parallel.world import World
from hpc_hess.placement import peak_bytes
from hpc_hess.problem import Problem, check_repeatable
from hpc_hess.products import (
    CurvatureOperator,
    build_operator,
    reference_operator,
    wants_reference,
    what_is_computed,
)
from hpc_hess.report.progress import Progress
from hpc_hess.report.words import probes_text
from hpc_hess.result import Tally
from hpc_hess.stopping import Stopper
from hpc_hess.storage.events import EventLog
from hpc_hess.storage.journal import Member
from hpc_hess.storage.store import Store

Group = dict[int, Lanczos]  # the processes of probes that advance in lock-step


class Loop:
    """Groups of probes, one after the other; the probes of a group take every step together.

    Parameters
    ----------
    exact : the operator's exact products with operator.method = "exact", else None.
    bases : one for each probe of the widest group, the store's one in progress included.
    width : of the groups that begin here.

    """

    def __init__(
        self, config: Config, world: World, problem: Problem, store: Store, *, events: EventLog, progress: Progress,
        stopper: Stopper, exact: ExactOperator | None, bases: list[Basis], width: int,
    ) -> None:  # fmt: skip
        self.config, self.world, self.problem, self.store = config, world, problem, store
        self.events, self.progress, self.stopper, self.bases, self.width = events, progress, stopper, bases, width
        self.space: VectorSpace = problem.model.space
        self.tally = Tally.from_json(store.state.extra)
        self.operator: CurvatureOperator
        self._exact = exact
        self._compared_with: CurvatureOperator | None = None
        self._gradient: Vector | None = None  # at theta_0, where that one needs it
        self._checking = wants_reference(config)

    def run(self) -> str:
        """Return why the run stopped early, or "" when every probe is finished. Collective: yes."""
        wanted, state = self.config.lanczos.probes, self.store.state
        if state.complete(wanted):
            self.progress.note("this run is already finished: rewriting its report")
            return ""
        self.progress.resume_at(sum(state.lengths))
        self.operator = self._operator()
        reason = ""
        if not state.finished:
            reason = self._advance(self._resumed())
        while not reason and (first := self.store.state.group.stop) < wanted:
            reason = self._advance(self._started(range(first, min(first + self.width, wanted))))
        return reason

    def _operator(self) -> CurvatureOperator:
        """Build the operator at theta_0: base gradient, repeatability. Collective: yes."""
        self.progress.phase("gradient at theta_0")
        began = time.perf_counter()
        loss, gradient = self.problem.gradient.at_theta0()
        norm = gradient.norm()
        seconds = self.world.max_over_ranks(time.perf_counter() - began, "gradient time")
        self.progress.note(f"loss {loss:.6f}, |gradient| {norm:.4g}, one gradient {seconds:.1f} s")
        self.events.write("gradient", seconds=seconds, loss=loss, norm=norm)
        self.tally.loss, self.tally.gradient_norm = loss, norm
        self.tally.repeat = max(self.tally.repeat, check_repeatable(self.problem.gradient))
        self.progress.phase("preparing the product")
        operator = build_operator(self.config, self.problem, loss, gradient, self._exact)
        self.tally.computes = what_is_computed(self.config, self.problem)
        if self.config.operator.kind == "perplexity":
            self._gradient = gradient
        if self.tally.operator_state:
            operator.from_state(self.tally.operator_state)
        for note in operator.notes:
            self.progress.note(note)
        return operator

    # -- a group -------------------------------------------------------------------------------------------------

    def _processes(self, group: range) -> Group:
        lanczos = self.config.lanczos
        self.progress.phase(f"{probes_text(group)} of {lanczos.probes}")
        return {
            probe: Lanczos(self.operator, basis, lanczos.steps, lanczos.reorthogonalise)
            for probe, basis in zip(group, self.bases, strict=False)
        }

    def _started(self, group: range) -> Group:
        """Begin with probes that no commit knows yet."""
        lanczos, processes = self.config.lanczos, self._processes(group)
        for probe, process in processes.items():
            vector = self.space.zeros()
            probes.fill(vector.data, *self.space.shard.global_intervals, seed=lanczos.seed, probe=probe,
                        distribution=lanczos.distribution)  # fmt: skip
            process.start(vector)
            self._write_row(probe, process)
        self._commit(processes)
        for probe in processes:
            self.events.write("start", probe=probe)
        return processes

    def _resumed(self) -> Group:
        """Take up the store's unfinished group, as wide as it is: another width would round differently."""
        state = self.store.state
        processes = self._processes(state.group)
        for probe, process in processes.items():
            alpha, beta = self.store.recurrence(probe)
            process.resume(alpha.tolist(), beta.tolist(), state.over(probe))
            for vector in [] if process.finished else process.rows_needed():
                values = self.store.read_row(probe, vector % process.basis.capacity)
                process.basis[vector] = self.space.wrap(torch.from_numpy(values).to(self.space.device))
        self.events.write(
            "resume", probe=state.probe, step=state.step, lock_step=state.width, world_size=self.world.size
        )
        self.progress.note(f"going on with {probes_text(state.group)} after step {state.step}")
        return processes

    def _advance(self, group: Group) -> str:
        """Step until every member has ended; return why it stopped before, or "". Collective: yes."""
        while not all(process.finished for process in group.values()):
            reason = self.stopper.agreed(self.tally.slowest_step_s)
            if reason:
                return reason
            self._step(group)
        return ""

    # -- a step --------------------------------------------------------------------------------------------------

    def _step(self, group: Group) -> None:
        running = {probe: process for probe, process in group.items() if not process.finished}
        began = time.perf_counter()
        products = dict(zip(running, next_products(list(running.values())), strict=True))
        hvp_s = time.perf_counter() - began
        if 0 in running and running[0].step_count == 0 and (exact := self._reference()) is not None:
            self.tally.error_probe = relative_difference(products[0], exact.matvec(running[0].basis[0]))
        began = time.perf_counter()
        for probe, process in running.items():
            process.advance(products.pop(probe))
        lanczos_s = time.perf_counter() - began
        last = running.get(self.config.lanczos.probes - 1)
        if last is not None and last.finished:
            self._check_ritz(last)
        began = time.perf_counter()
        for probe, process in running.items():
            if not process.finished:
                self._write_row(probe, process)
            self.tally.asymmetry = max(self.tally.asymmetry, process.asymmetry)
        record = self.operator.last_record()
        self.tally.note_products(record, len(running))
        self.tally.operator_state = self.operator.to_state()
        self._commit(group)
        spans = [hvp_s - record.calibration_s, lanczos_s, time.perf_counter() - began]
        spans = [self.world.max_over_ranks(span, "step time") for span in spans]
        self.tally.gradient_s = self.world.max_over_ranks(
            statistics.median(self.problem.gradient.seconds), "gradient time"
        )
        self.tally.note_times(*spans)
        self._report(running, spans)

    def _report(self, running: Group, spans: list[float]) -> None:
        """Write one event for each probe that made the step, with its share of the seconds in ``spans``."""
        hvp_s, lanczos_s, checkpoint_s = (span / len(running) for span in spans)
        record = self.operator.last_record()
        for probe, process in running.items():
            self.events.write(
                "step", probe=probe, step=process.step_count, lock_step=len(running), hvp_s=hvp_s, lanczos_s=lanczos_s,
                checkpoint_s=checkpoint_s, alpha=process.alpha[-1], beta=process.beta[-1], eps=record.step,
                realised=record.realised, predicted_error=record.predicted_error,
                calibration_gradients=record.calibration, calibration_s=record.calibration_s, flips=record.flips,
            )  # fmt: skip
        values = [ritz(process.alpha, process.beta).values for process in running.values()]
        self.progress.step(
            probes=list(running), step=max(process.step_count for process in running.values()), hvp_s=hvp_s,
            ritz_min=min(v[0] for v in values), ritz_max=max(v[-1] for v in values),
        )  # fmt: skip

    def _reference(self) -> CurvatureOperator | None:
        """The exact product to compare with, built on first use; None where there is none. Collective: yes."""
        if self._compared_with is None and self._checking:
            try:  # a ModelError is raised on every rank, or on none
                self._compared_with = reference_operator(self.config, self.problem, self.tally.loss, self._gradient)
            except ModelError as error:
                self.progress.note(f"products are not checked against the exact one: {error}")
                self._checking = False
            else:
                for note in self._compared_with.notes:
                    if note not in self.operator.notes:
                        self.progress.note(f"to compare with: {note}")
        return self._compared_with

    def _check_ritz(self, process: Lanczos) -> None:
        """Measure the extreme Ritz pair with the exact product; needs the whole basis."""
        if self.config.lanczos.reorthogonalise == "full" and (exact := self._reference()) is not None:
            self.progress.phase("checking the extreme Ritz vector")
            self.tally.ritz_check = asdict(check_ritz(exact, process))

    def _write_row(self, probe: int, process: Lanczos) -> None:
        """Write the newest vector of a probe."""
        vector, basis = process.step_count, process.basis
        self.store.write_row(probe, vector % basis.capacity, basis[vector].data.cpu().numpy())

    def _commit(self, group: Group) -> None:
        self.tally.peak_bytes = int(
            max(self.tally.peak_bytes, self.world.max_over_ranks(peak_bytes(self.world.device), "peak memory"))
        )
        members = [
            # a finished probe's rows stay readable until the next group takes their place
            Member(np.array(p.alpha), np.array(p.beta), ended=p.finished,
                   rows=None if p.finished else [v % p.basis.capacity for v in p.rows_needed()])
            for p in group.values()
        ]  # fmt: skip
        self.store.commit(min(group), members, self.tally.to_json())

    def recurrences(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return every probe's alpha and beta from the store (a breakdown ends a probe early)."""
        return [self.store.recurrence(probe) for probe in range(self.config.lanczos.probes)]
