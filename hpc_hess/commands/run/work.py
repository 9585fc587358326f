"""One SPMD run: opened, its studies made one after the other, ended with a result or early."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hpc_hess.commands.run.finished import digest, finished_result
from hpc_hess.commands.run.opening import begin, goes_on
from hpc_hess.commands.run.screen import print_summary
from hpc_hess.commands.run.tracking import Tracking, check_installed
from hpc_hess.config import Config
from hpc_hess.console.words import probes_text
from hpc_hess.curvature.exact.exact import StreamedOperator
from hpc_hess.curvature.exact.whole_model import ExactOperator, WholeModel
from hpc_hess.parallel import devices
from hpc_hess.parallel.world import World
from hpc_hess.profiling.flops import measure_limits
from hpc_hess.report.spectrum import warnings
from hpc_hess.session.memory_budget import Bases, Place
from hpc_hess.session.partial_products import ProductWatch, open_product_store, remove_product_store
from hpc_hess.session.problem import Problem, dtype_of, read_inputs
from hpc_hess.session.session import Session, opened
from hpc_hess.session.starts import progress_mark
from hpc_hess.session.stopping import EXIT_STOPPED, Stopper
from hpc_hess.storage.agree import attempt
from hpc_hess.storage.run_files import write_aside
from hpc_hess.studies.quadrature.loop import Loop
from hpc_hess.studies.quadrature.result import RESULT_NAME, make_result, refuse_meaningless, to_json
from hpc_hess.studies.runner import run_studies


def run(config: Config, world: World, stopper: Stopper | None = None) -> int:
    """Compute what the configuration asks for, or go on with it. Returns the exit code. Collective: yes.

    ``stopper`` : of a command that runs more than this; else signals and run.time_limit count from here on.

    Raises
    ------
    HpcHessError : as one sentence for the user; the run directory keeps every committed step.

    """
    check_installed(config, world)
    total = config.lanczos.steps * config.lanczos.probes
    with opened(config, world, Path(config.run.out), total, stopper=stopper) as session:
        existing = goes_on(session)
        limits = [] if existing else _limits(config, world)
        inputs = read_inputs(config, world)
        if existing and (result := finished_result(session, inputs)) is not None:
            session.progress.note("this run is already finished: rewriting its report")
            return _ended(session, result, Tracking(session))
        begun = begin(session, inputs, existing=existing)
        tracking = Tracking(session)
        problem, store, place = begun.problem, begun.store, begun.place
        before = progress_mark(session.out, sum(store.state.lengths)) if world.rank == 0 else []
        with _watched(session, problem, begun.exact, place) as watch:
            bases = Bases(place, problem.space, config.lanczos, store)
            loop = Loop(session, problem, store, watch, begun.exact, bases, begun.width)
            loop.tally.baseline_bytes = problem.program_bytes
            loop.tally.limits = loop.tally.limits or limits
            reason, where, found = run_studies(loop, begun.attributes)
        if not reason:
            return _ended(session, _result(loop, found), tracking)
        _say_stopped(loop, reason, where)
        session.progressed = world.rank == 0 and before != progress_mark(session.out, sum(store.state.lengths))
        session.count_stop(reason)
    world.barrier("stop")  # a launcher may end the others as soon as one rank leaves
    return EXIT_STOPPED


def _say_stopped(loop: Loop, reason: str, where: str) -> None:
    """Say where a run stopped, and how it goes on. ``where`` : the study; "" in the quadrature."""
    state, part = loop.store.state, ", and a part of the next product" if loop.watch.kept else ""
    if not where:
        where = (
            f"after committing step {state.step} of {probes_text(state.group)}" if state.width else "before the first step"
        )
    again = "" if loop.config.run.resume != "never" else ' with run.resume = "auto"'
    loop.progress.note(f"stopped early {where}{part}: {reason}; run the same command{again} to go on")


def _result(loop: Loop, found: dict[str, Any]) -> dict[str, Any]:
    """Make the result and write it under the lock: another job may wait for it. Collective: yes. Raises StoreError."""
    config, world, path = loop.config, loop.world, loop.session.out / RESULT_NAME
    remove_product_store(world, loop.session.out)
    if loop.tally.ritz_probe >= config.lanczos.probes:  # of a probe that is not asked for any more
        loop.tally.ritz_check, loop.tally.ritz_ends = {}, {}
    result = make_result(config, world, loop.problem, loop.tally, loop.recurrences()) | found
    refuse_meaningless(result)
    result["cautions"] = warnings(result)
    result["digest"] = digest(config, json.loads(to_json(result)))
    with attempt(world, path, "write the result"):
        if world.rank == 0:
            write_aside(path, to_json(result))
    return result


def _ended(session: Session, result: dict[str, Any], tracking: Tracking) -> int:
    """Write the report of a finished run and show its result; return the exit code. Collective: yes. Raises StoreError."""
    world, out, report = session.world, session.out, None
    session.got_through()
    if session.config.run.report:
        with attempt(world, out / "report.html", "write the report", of=OSError):
            if world.rank == 0:
                from hpc_hess.commands.run.page import write_report  # matplotlib: not on the other ranks

                report = write_report(out)
    if world.rank == 0:
        session.progress.close()
        print_summary(result, out, report)
        tracking.finish(result)
    world.barrier("finish")
    return 0


def _limits(config: Config, world: World) -> list[float]:
    """Return what every rank reaches at least of a matrix product and of a copy. Collective: yes."""
    dtype = config.model.compute_dtype
    with devices.tf32() if dtype == "tf32" else contextlib.nullcontext():
        mine = measure_limits(world.device, dtype_of(dtype))
    return [-world.max_over_ranks(-rate, "speed of the machine") for rate in mine]


@contextlib.contextmanager
def _watched(session: Session, problem: Problem, exact: ExactOperator | None, place: Place) -> Iterator[ProductWatch]:
    """Let products be kept within and given up in time, as far as they can be. Collective: yes."""
    config = session.config
    with contextlib.ExitStack() as held:
        store, every = None, config.store.checkpoint_every
        if isinstance(exact, WholeModel) and every:
            session.progress.note(
                "store.checkpoint_every has no effect: exact products of the whole model are not kept in parts"
            )
            every = 0
        store = open_product_store(
            config,
            session.world,
            problem.model.space,
            session.out,
            every,
            place.width,
            shared=exact is not None and exact.lock_step,
        )
        if store is not None:
            held.enter_context(store)
        watch = ProductWatch(session.stopper, store, every, place.width)
        problem.gradient.follow(watch)
        if isinstance(exact, StreamedOperator):
            exact.follow(watch)
        yield watch
