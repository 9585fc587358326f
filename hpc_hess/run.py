"""One SPMD run: wires the parts; owns the loop over probes and steps, the cadence of commits, and the early stop."""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from hpc_hess.check import check_ritz, relative_difference
from hpc_hess.config import Config
from hpc_hess.errors import ModelError, StoreError
from hpc_hess.linalg import probes
from hpc_hess.linalg.lanczos import Lanczos, basis_rows
from hpc_hess.linalg.quadrature import ritz
from hpc_hess.parallel.vector import Basis, Vector, VectorSpace
from hpc_hess.parallel.world import World
from hpc_hess.placement import exact_product_bytes, peak_bytes, place_basis, used_bytes
from hpc_hess.problem import Problem, check_repeatable, load_problem
from hpc_hess.products import (
    CurvatureOperator,
    build_operator,
    reference_operator,
    wants_reference,
    what_is_computed,
)
from hpc_hess.report.progress import Progress, make_progress
from hpc_hess.report.rundir import write_aside
from hpc_hess.report.screen import print_summary
from hpc_hess.result import RESULT_NAME, Tally, make_result, to_json
from hpc_hess.stopping import EXIT_STOPPED, Stopper
from hpc_hess.storage.agree import attempt
from hpc_hess.storage.events import EventLog
from hpc_hess.storage.lock import RunLock
from hpc_hess.storage.schema import FILE, read_header
from hpc_hess.storage.store import Store


def run(config: Config, world: World) -> int:
    """Compute what the configuration asks for, or go on with it. Returns the exit code. Collective: yes.

    Raises
    ------
    HpcHessError : as one sentence for the user; the run directory keeps every committed step.

    """
    world.make_mesh(config.parallel.replicate)
    out = Path(config.run.out)
    baseline_bytes = used_bytes(world.device)
    total = config.lanczos.steps * config.lanczos.probes
    with (
        make_progress(world.rank == 0, total) as progress,
        Stopper(world, config.run.time_limit) as stopper,
        contextlib.ExitStack() as held,
    ):
        existing = world.broadcast((out / FILE).exists(), "run directory")
        _check_resume(out, existing, config.run.resume)
        lock = RunLock.acquire(out, world)
        held.callback(lock.release)
        problem = load_problem(config, world, progress)
        basis_device = place_basis(
            world, problem.model.space, config.lanczos, exact_product_bytes(config, problem.model)
        )
        store = held.enter_context(_open_store(config, world, problem, out, existing, lock))
        if world.rank == 0:
            write_aside(out / "config.toml", config.to_toml())
        rows = basis_rows(config.lanczos.reorthogonalise, config.lanczos.steps)
        basis = Basis(problem.model.space, rows, basis_device)
        events = EventLog(out if world.rank == 0 else None)
        loop = _Loop(config, world, problem, store, events, progress, stopper, basis)
        loop.tally.baseline_bytes = baseline_bytes
        reason = loop.run()
        if reason:
            state = store.state
            progress.note(f"stopped early after committing step {state.step} of probe {state.probe + 1}: {reason}; "
                          "run the same command to go on")  # fmt: skip
        else:
            result = make_result(config, world, problem, loop.tally, loop.recurrences())
    if reason:
        world.barrier("stop")  # a launcher may end the others as soon as one rank leaves
        return EXIT_STOPPED
    if world.rank == 0:
        write_aside(out / RESULT_NAME, to_json(result))
        from hpc_hess.report.page import write_report  # matplotlib: not on the other ranks

        report = write_report(out)
        print_summary(result, out, report)
    world.barrier("finish")
    return 0


def _check_resume(out: Path, existing: bool, resume: str) -> None:
    if existing and resume == "never":
        raise StoreError(
            f"{out} already holds a run; go on with it by run.resume = \"auto\", or choose another run.out"
        )
    if not existing and resume == "must":
        raise StoreError(f"{out} holds no run to go on with; drop --resume must to start one")


def _identity(config: Config, problem: Problem) -> dict[str, Any]:
    """What a run directory is bound to: settings that change the numbers, and fingerprints of model and data."""
    return {
        "config": json.dumps(config.identity(), sort_keys=True),
        "model_fingerprint": problem.source.fingerprint,
        "data_fingerprint": problem.samples.fingerprint,
        "layout_fingerprint": problem.model.layout.fingerprint,
    }


def _open_store(
    config: Config, world: World, problem: Problem, out: Path, existing: bool, lock: RunLock
) -> Store:
    lanczos, attributes = config.lanczos, _identity(config, problem)
    place: dict[str, Any] = {"layout": problem.model.layout, "shard": problem.model.shard, "world": world,
                             "driver": config.store.driver, "lock": lock}  # fmt: skip
    if not existing:
        return Store.create(
            out, **place, probes=lanczos.probes, steps=lanczos.steps,
            rows=basis_rows(lanczos.reorthogonalise, lanczos.steps), keep_basis=config.store.keep_basis,
            dtype=problem.model.space.dtype, attributes=attributes,
        )  # fmt: skip
    # compared before anything is rebuilt for this job's ranks
    found: dict[str, Any] = {}
    with attempt(world, out / FILE, "open the store"):
        if world.rank == 0:
            found = read_header(out / FILE).attributes
    found = world.broadcast(found, "read the store's settings")
    _compare(out, found, attributes)
    return Store.open(out, **place, probes=lanczos.probes)


def _compare(out: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    remedy = "choose another run.out, or go back to the settings in its config.toml"
    before, now = json.loads(found["config"]), json.loads(wanted["config"])
    for section, keys in now.items():
        for key, value in keys.items():
            old = before.get(section, {}).get(key)
            if old != value:
                raise StoreError(f"{out} holds a run with {section}.{key} = {old!r}, not {value!r}: {remedy}")
    for key in ("model_fingerprint", "data_fingerprint", "layout_fingerprint"):
        if found[key] != wanted[key]:
            raise StoreError(f"{out} holds a run of another {key.split('_')[0]} ({key} differs): {remedy}")


class _Loop:
    """Probes and steps, each committed before the next begins."""

    def __init__(
        self, config: Config, world: World, problem: Problem, store: Store, events: EventLog, progress: Progress,
        stopper: Stopper, basis: Basis,
    ) -> None:  # fmt: skip
        self.config, self.world, self.problem, self.store = config, world, problem, store
        self.events, self.progress, self.stopper, self.basis = events, progress, stopper, basis
        self.space: VectorSpace = problem.model.space
        self.tally = Tally.from_json(store.state.extra)
        self.operator: CurvatureOperator
        self._reference: CurvatureOperator | None = None
        self._gradient: Vector | None = None  # at theta_0, where the reference needs it
        self._checking = wants_reference(config)

    def run(self) -> str:
        """Return why the run stopped early, or "" when every probe is finished. Collective: yes."""
        lanczos, state = self.config.lanczos, self.store.state
        if state.finished and state.probe >= lanczos.probes - 1:
            self.progress.note("this run is already finished: rewriting its report")
            return ""
        self.progress.resume_at(sum(state.lengths))
        self.operator = self._operator()
        first = state.probe + 1 if state.finished else max(state.probe, 0)
        for probe in range(first, lanczos.probes):
            self.progress.phase(f"probe {probe + 1}/{lanczos.probes}")
            process = Lanczos(self.operator, self.basis, lanczos.steps, lanczos.reorthogonalise)
            if probe == state.probe and not state.finished and state.step > 0:
                self._restore(process, probe)
            else:
                self._start(process, probe)
            while not process.finished:
                reason = self.stopper.agreed(self.tally.slowest_step_s)
                if reason:
                    return reason
                self._step(process, probe)
        return ""

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
        operator = build_operator(self.config, self.problem, loss, gradient)
        self.tally.computes = what_is_computed(self.config, self.problem)
        if self.config.operator.kind == "perplexity":
            self._gradient = gradient
        if self.tally.operator_state:
            operator.from_state(self.tally.operator_state)
        for note in operator.notes:
            self.progress.note(note)
        return operator

    def _start(self, process: Lanczos, probe: int) -> None:
        lanczos = self.config.lanczos
        vector = self.space.zeros()
        probes.fill(vector.data, *self.space.shard.global_intervals, seed=lanczos.seed, probe=probe,
                    distribution=lanczos.distribution)  # fmt: skip
        process.start(vector)
        self._write_row(probe, 0)
        self._commit(process, probe)
        self.events.write("start", probe=probe)

    def _restore(self, process: Lanczos, probe: int) -> None:
        step = self.store.state.step
        alpha, beta = self.store.recurrence(probe)
        process.alpha, process.beta = alpha[:step].tolist(), beta[:step].tolist()
        for vector in process.rows_needed():
            row = vector % self.basis.capacity
            values = self.store.read_row(probe, row)
            self.basis[vector] = self.space.wrap(_as_tensor(values, self.space))
        self.events.write("resume", probe=probe, step=step, world_size=self.world.size)
        self.progress.note(f"going on with probe {probe + 1} after step {step}")

    def _step(self, process: Lanczos, probe: int) -> None:
        began = time.perf_counter()
        product = process.product()
        hvp_s = time.perf_counter() - began
        if probe == 0 and process.step_count == 0 and (exact := self._exact()) is not None:
            self.tally.error_probe = relative_difference(product, exact.matvec(self.basis[0]))
        began = time.perf_counter()
        process.advance(product)
        lanczos_s = time.perf_counter() - began
        if process.finished and probe == self.config.lanczos.probes - 1:
            self._check_ritz(process)
        began = time.perf_counter()
        if not process.finished:
            self._write_row(probe, process.step_count)
        record = self.operator.last_record()
        self.tally.note_product(record)
        self.tally.operator_state = self.operator.to_state()
        self.tally.asymmetry = max(self.tally.asymmetry, process.asymmetry)
        if process.finished:
            self.tally.steps[str(probe)] = process.step_count
        self._commit(process, probe)
        spans = [hvp_s - record.calibration_s, lanczos_s, time.perf_counter() - began]
        hvp_s, lanczos_s, checkpoint_s = (self.world.max_over_ranks(span, "step time") for span in spans)
        self.tally.gradient_s = self.world.max_over_ranks(
            statistics.median(self.problem.gradient.seconds), "gradient time"
        )
        self.tally.note_times(hvp_s, lanczos_s, checkpoint_s)
        self.events.write(
            "step", probe=probe, step=process.step_count, hvp_s=hvp_s, lanczos_s=lanczos_s, checkpoint_s=checkpoint_s,
            alpha=process.alpha[-1], beta=process.beta[-1], eps=record.step, realised=record.realised,
            predicted_error=record.predicted_error, calibration_gradients=record.calibration,
            calibration_s=record.calibration_s, flips=record.flips,
        )  # fmt: skip
        values = ritz(process.alpha, process.beta).values
        self.progress.step(probe=probe, step=process.step_count, hvp_s=hvp_s, ritz_min=values[0], ritz_max=values[-1])

    def _exact(self) -> CurvatureOperator | None:
        """The exact product to compare with, built on first use; None where there is none. Collective: yes."""
        if self._reference is None and self._checking:
            try:  # a ModelError is raised on every rank, or on none
                self._reference = reference_operator(self.config, self.problem, self.tally.loss, self._gradient)
            except ModelError as error:
                self.progress.note(f"products are not checked against the exact one: {error}")
                self._checking = False
            else:
                for note in self._reference.notes:
                    if note not in self.operator.notes:
                        self.progress.note(f"to compare with: {note}")
        return self._reference

    def _check_ritz(self, process: Lanczos) -> None:
        """Measure the extreme Ritz pair with the exact product; needs the whole basis."""
        if self.config.lanczos.reorthogonalise == "full" and (exact := self._exact()) is not None:
            self.progress.phase("checking the extreme Ritz vector")
            self.tally.ritz_check = asdict(check_ritz(exact, process))

    def _write_row(self, probe: int, vector: int) -> None:
        self.store.write_row(probe, vector % self.basis.capacity, self.basis[vector].data.cpu().numpy())

    def _commit(self, process: Lanczos, probe: int) -> None:
        self.tally.peak_bytes = int(
            max(self.tally.peak_bytes, self.world.max_over_ranks(peak_bytes(self.world.device), "peak memory"))
        )
        self.store.commit(
            probe, process.step_count, np.array(process.alpha), np.array(process.beta), finished=process.finished,
            extra=self.tally.to_json(),
            # a finished probe's rows stay readable until the next probe takes their place
            rows_needed=None if process.finished else [v % self.basis.capacity for v in process.rows_needed()],
        )  # fmt: skip

    def recurrences(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return every finished probe's alpha and beta from the store (a breakdown ends a probe early)."""
        steps = [self.tally.steps[str(probe)] for probe in range(self.config.lanczos.probes)]
        stored = [self.store.recurrence(probe) for probe in range(self.config.lanczos.probes)]
        return [(alpha[:count], beta[:count]) for (alpha, beta), count in zip(stored, steps, strict=True)]


def _as_tensor(values: np.ndarray, space: VectorSpace) -> Any:
    import torch

    return torch.from_numpy(values).to(space.device)
