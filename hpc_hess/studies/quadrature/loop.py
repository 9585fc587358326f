"""The loop over groups of probes and their steps.

The rows of a step are written while the next product is computed, and it is committed after that product.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from dataclasses import asdict

import numpy as np

from hpc_hess.console.words import probes_text
from hpc_hess.curvature.exact.whole_model import ExactOperator
from hpc_hess.errors import ModelError, NumericsError, StoreError
from hpc_hess.linalg import probes
from hpc_hess.linalg.lanczos import Lanczos, next_products
from hpc_hess.linalg.quadrature import ritz
from hpc_hess.model.data.trial import reached_finding
from hpc_hess.parallel.memory import peak_bytes
from hpc_hess.parallel.vector import Vector, VectorSpace
from hpc_hess.profiling.flops import FlopCounter
from hpc_hess.session.memory_budget import Bases
from hpc_hess.session.operators import (
    CurvatureOperator,
    build_operator,
    needs_gradient,
    reference_operator,
    spec_of,
    wants_reference,
    what_is_computed,
)
from hpc_hess.session.partial_products import ProductWatch
from hpc_hess.session.problem import Problem, check_repeatable
from hpc_hess.session.reference import check_ends, relative_difference
from hpc_hess.session.session import Session
from hpc_hess.session.stopping import InterruptedProductError
from hpc_hess.storage.journal import Member
from hpc_hess.storage.store import Store
from hpc_hess.studies.quadrature.result import MOST_ERROR, Tally

Group = dict[int, Lanczos]  # the processes of probes that advance in lock-step


class Loop:
    """Groups of probes, one after the other; the probes of a group take every step together.

    Parameters
    ----------
    watch : follows the products of ``problem.gradient`` and ``exact``.
    exact : the operator's exact products with operator.method = "exact", else None.
    bases : where the vectors of a group lie.
    width : of the groups that begin here.

    """

    def __init__(
        self,
        session: Session,
        problem: Problem,
        store: Store,
        watch: ProductWatch,
        exact: ExactOperator | None,
        bases: Bases,
        width: int,
    ) -> None:
        self.session, self.problem, self.store, self.watch = session, problem, store, watch
        self.config, self.world, self.events = session.config, session.world, session.events
        self.progress, self.stopper = session.progress, session.stopper
        self.bases, self.width = bases, width
        self.space: VectorSpace = problem.space
        self.tally = Tally.from_json(store.state.extra)
        self.operator: CurvatureOperator
        self._ready = False
        self._exact = exact
        self._compared_with: CurvatureOperator | None = None
        self._gradient: Vector | None = None  # at theta_0, where that one needs it
        self._checking = wants_reference(session.config)
        self._notes_shown = 0
        self._uncommitted: tuple[int, list[Member], bytes] | None = None

    def run(self) -> str:
        """Return why the run stopped early, or "" when every probe is finished. Collective: yes."""
        wanted, state = self.config.lanczos.probes, self.store.state
        if state.complete(wanted):
            self.progress.note("this run is already finished: rewriting its report")
            return ""
        self.progress.resume_at(sum(state.lengths))
        reason = ""
        try:
            self.ready()
            if not state.finished:
                reason = self._advance(self._resumed())
            while not reason and (first := self.store.state.group.stop) < wanted:
                reason = self._advance(self._started(range(first, min(first + self.width, wanted))))
        except InterruptedProductError as interrupted:
            reason = str(interrupted)
            self._settle()
        except NumericsError:  # on every rank; the steps before it hold
            self._settle()
            raise
        return reason

    def ready(self) -> CurvatureOperator:
        """Return the operator at theta_0, built on the first call. Collective: yes."""
        if not self._ready:
            self.operator, self._ready = self._operator(), True
        return self.operator

    def _operator(self) -> CurvatureOperator:
        """Build the operator at theta_0: base gradient, repeatability. Collective: yes."""
        tally = self.tally
        gradient = None
        # a resumed run knows enough of it, unless products need it or the experts that were chosen for it
        if not tally.gradient_s or tally.routed is not False or needs_gradient(self.config):
            gradient = self._measure_gradient()
        tally.repeat = max(tally.repeat, check_repeatable(self.problem.gradient))
        self.progress.phase("preparing the product")
        operator = build_operator(self.config, self.problem, tally.loss, gradient, self._exact)
        tally.computes = what_is_computed(self.config, self.problem)
        if spec_of(self.config).needs_gradient:
            self._gradient = gradient
        if tally.operator_state:
            operator.from_state(tally.operator_state)
        self._say(operator.notes)
        return operator

    def _say(self, notes: list[str]) -> None:
        """Show those notes of the operator that were not shown yet: products add to them."""
        for note in notes[self._notes_shown :]:
            self.progress.note(note)
        self._notes_shown = len(notes)

    def _measure_gradient(self) -> Vector:
        self.progress.phase("gradient at theta_0")
        began = time.perf_counter()
        with FlopCounter() as counter:
            loss, gradient = self.problem.gradient.at_theta0()
        norm = gradient.norm()
        seconds = self.world.max_over_ranks(time.perf_counter() - began, "gradient time")
        self.progress.note(f"loss {loss:.6f}, |gradient| {norm:.4g}, one gradient {seconds:.1f} s")
        self.events.write({"event": "gradient", "seconds": seconds, "loss": loss, "norm": norm})
        self.tally.loss, self.tally.gradient_norm, self.tally.gradient_s = loss, norm, seconds
        self.tally.gradient_flops = int(self.world.max_over_ranks(counter.flops, "operations of a gradient"))
        finding = reached_finding(self.problem.model, gradient)
        self.problem.intake.add(finding)
        self.tally.reached = asdict(finding)
        self.tally.routed = self.world.any_true(self.problem.gradient.routing.has_router, "routing")
        return gradient

    # -- a group -------------------------------------------------------------------------------------------------

    def _processes(self, group: range) -> Group:
        lanczos = self.config.lanczos
        self.progress.phase(f"{probes_text(group)} of {lanczos.probes}")
        return {
            probe: Lanczos(self.operator, basis, lanczos.steps, lanczos.reorthogonalise)
            for probe, basis in zip(group, self.bases.of(group), strict=True)
        }

    def _started(self, group: range) -> Group:
        """Begin with probes that no commit knows yet."""
        lanczos, processes = self.config.lanczos, self._processes(group)
        for probe, process in processes.items():
            process.start(probes.draw(self.space, seed=lanczos.seed, probe=probe, distribution=lanczos.distribution))
            self._write_row(probe, process)
        self._commit(processes)
        self._settle()
        self.events.write(*({"event": "start", "probe": probe} for probe in processes))
        return processes

    def _resumed(self) -> Group:
        """Take up the store's unfinished group, as wide as it is: another width would round differently."""
        state = self.store.state
        processes = self._processes(state.group)
        for probe, process in processes.items():
            alpha, beta = self.store.recurrence(probe)
            process.resume(alpha.tolist(), beta.tolist(), state.over(probe))
            for vector in [] if process.finished else process.rows_needed():
                process.basis.load(vector, self.store.read_row(probe, vector % process.basis.capacity))
        self.events.write(
            {
                "event": "resume",
                "probe": state.probe,
                "step": state.step,
                "lock_step": state.width,
                "world_size": self.world.size,
            }
        )
        self.progress.note(f"going on with {probes_text(state.group)} after step {state.step}")
        return processes

    def _advance(self, group: Group) -> str:
        """Step until every member has ended; return why it stopped before, or "". Collective: yes."""
        reason = ""
        while not all(process.finished for process in group.values()):
            least_s = self.watch.least_s
            reason = self.stopper.agreed(self.tally.slowest_step_s if least_s is None else least_s)
            if reason:
                break
            self._step(group)
        self._settle()
        return reason

    # -- a step --------------------------------------------------------------------------------------------------

    def _step(self, group: Group) -> None:
        running = {probe: process for probe, process in group.items() if not process.finished}
        began = time.perf_counter()
        key = [self.store.schema.run_id, *running, "step", max(p.step_count for p in running.values())]
        phase = self.world.timers.phase
        self.world.timers.begin()
        self.watch.begin_product(key, self.operator, self.tally.slowest_step_s, self._settle)
        counter = FlopCounter() if self._exact is not None and not self.tally.product_flops else None
        with phase("vectors"), counter or contextlib.nullcontext():
            products = dict(zip(running, next_products(list(running.values())), strict=True))
        self.watch.end_product()
        self._say(self.operator.notes)
        hvp_s = time.perf_counter() - began
        if self.watch.resumed:
            self.progress.note(f"of this product {self.watch.resumed} micro-batches of each rank had been summed before")
        settle_s = self._settle()
        if 0 in running and running[0].step_count == 0 and (exact := self._reference()) is not None:
            self._check_probe(products[0], exact.matvec(running[0].basis[0]))
        began = time.perf_counter()
        with phase("vectors"):
            for probe, process in running.items():
                process.advance(products.pop(probe))
        lanczos_s = time.perf_counter() - began
        last = running.get(self.config.lanczos.probes - 1)
        if last is not None and last.finished:
            self._check_ritz(last)
        began = time.perf_counter()
        for probe, process in running.items():
            if not process.finished:
                with phase("checkpoint"):
                    self._write_row(probe, process)
            self.tally.asymmetry = max(self.tally.asymmetry, process.asymmetry)
        record = self.operator.last_record()
        self.tally.note_products(record, len(running))
        if counter is None:
            self.tally.product_flops = self.tally.product_flops or self.tally.gradient_flops * record.gradients
        elif not self.world.any_true(self.watch.resumed > 0, "was a part computed before?"):  # a rank may have no data
            flops = self.world.max_over_ranks(counter.flops, "operations of a product")
            self.tally.product_flops = int(flops) // len(running)
        self.tally.operator_state = self.operator.to_state()
        self._commit(group)
        spans = [hvp_s - record.calibration_s, lanczos_s, settle_s + time.perf_counter() - began]
        spans = [self.world.max_over_ranks(span, "step time") for span in spans]
        if seconds := self.problem.gradient.seconds:
            self.tally.gradient_s = self.world.max_over_ranks(statistics.median(seconds), "gradient time")
        phases = self._phases()
        self.tally.note_times(*spans)
        self.tally.note_phases(phases)
        try:
            self._report(running, spans, phases)
        except StoreError:  # no room for an event, on every rank; the step itself has its place
            self._settle()
            raise

    def _phases(self) -> dict[str, list[float]]:
        """Return the largest and the mean seconds over the ranks of each phase of the step. Collective: yes."""
        everyone = self.world.gather(self.world.timers.take(), "phases of a step")
        names = sorted({name for seconds in everyone for name in seconds})
        found = {name: [seconds.get(name, 0.0) for seconds in everyone] for name in names}
        return {name: [max(values), statistics.fmean(values)] for name, values in found.items()}

    def _report(self, running: Group, spans: list[float], phases: dict[str, list[float]]) -> None:
        """Write one event for each probe that made the step, with its share of the seconds in ``spans``."""
        hvp_s, lanczos_s, checkpoint_s = (span / len(running) for span in spans)
        record = self.operator.last_record()
        values = {probe: ritz(process.alpha, process.beta).values for probe, process in running.items()}
        self.events.write(
            *(
                {
                    "event": "step",
                    "probe": probe,
                    "step": process.step_count,
                    "lock_step": len(running),
                    "hvp_s": hvp_s,
                    "lanczos_s": lanczos_s,
                    "checkpoint_s": checkpoint_s,
                    "alpha": process.alpha[-1],
                    "beta": process.beta[-1],
                    "ritz_min": float(values[probe][0]),
                    "ritz_max": float(values[probe][-1]),
                    "peak_bytes": self.tally.peak_bytes,
                    "eps": record.step,
                    "realised": record.realised,
                    "predicted_error": record.predicted_error,
                    "calibration_gradients": record.calibration,
                    "calibration_s": record.calibration_s,
                    "flips": record.flips,
                    "phases": phases,
                }
                for probe, process in running.items()
            )
        )
        self.progress.step(
            probes=list(running),
            step=max(process.step_count for process in running.values()),
            hvp_s=hvp_s,
            ritz_min=min(v[0] for v in values.values()),
            ritz_max=max(v[-1] for v in values.values()),
            aside_s=record.calibration_s,
        )

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

    def _check_probe(self, product: Vector, reference: Vector) -> None:
        """Compare the first product with the exact one. Raises NumericsError where they have nothing in common."""
        error, size = relative_difference(product, reference), reference.norm()
        self.tally.error_probe = error
        self.tally.error_probe_absolute = error * size if size > 0 else product.norm()
        if error > MOST_ERROR and size > 0:
            cause = "the loss changes its form within the step, as near a parameter that is zero"
            if choices := self.operator.last_record().choices:
                cause = f"discrete choices of the model ({', '.join(choices)}) changed within the step"
            if self._exact is not None:
                cause = f"{self.config.model.compute_dtype} is too coarse for this model"
            remedy = 'model.compute_dtype = "float32"' if self._exact is not None else 'operator.method = "exact"'
            raise NumericsError(
                f"the first product differs from the exact one by {100 * error:.3g} %: {cause}; no eigenvalue can be given: "
                f"set {remedy}"
            )

    def _check_ritz(self, process: Lanczos) -> None:
        """Measure the extreme Ritz pair with the exact product; needs the whole basis."""
        if self.config.lanczos.reorthogonalise == "full" and (exact := self._reference()) is not None:
            self.progress.phase("checking the extreme Ritz vectors")
            ends = check_ends(exact, process)
            self.tally.ritz_check = asdict(max(ends.values(), key=lambda end: abs(end.theta)))
            self.tally.ritz_ends = {name: asdict(end) for name, end in ends.items()}
            self.tally.ritz_probe = self.config.lanczos.probes - 1

    def _write_row(self, probe: int, process: Lanczos) -> None:
        """Start to write the newest vector of a probe, which stays as it is until that has been settled."""
        vector, basis = process.step_count, process.basis
        self.store.start_row(probe, vector % basis.capacity, basis.stored(vector))

    def _commit(self, group: Group) -> None:
        """Note the state to be committed once its rows are on disk: see :meth:`_settle`."""
        self.tally.peak_bytes = int(
            max(self.tally.peak_bytes, self.world.max_over_ranks(peak_bytes(self.world.device), "peak memory"))
        )
        members = [
            # a finished probe's rows stay readable until the next group takes their place
            Member(
                np.array(p.alpha),
                np.array(p.beta),
                ended=p.finished,
                rows=None if p.finished else [v % p.basis.capacity for v in p.rows_needed()],
            )
            for p in group.values()
        ]
        self._uncommitted = min(group), members, self.tally.to_json()

    def _settle(self) -> float:
        """Commit the last step, whose rows were written meanwhile; return the seconds it took. Collective: yes."""
        began = time.perf_counter()
        if self._uncommitted is not None:
            with self.world.timers.phase("checkpoint"):
                self.store.commit(*self._uncommitted)
            self._uncommitted = None
        return time.perf_counter() - began

    def recurrences(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return every probe's alpha and beta from the store (a breakdown ends a probe early)."""
        return [self.store.recurrence(probe) for probe in range(self.config.lanczos.probes)]
