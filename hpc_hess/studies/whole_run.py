"""A run in an open session: opened, its studies made one after the other, ended with a result and a report, or early."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hpc_hess.console.words import probes_text
from hpc_hess.curvature.exact.exact import StreamedOperator
from hpc_hess.curvature.exact.whole_model import ExactOperator, WholeModel
from hpc_hess.report.spectrum import warnings
from hpc_hess.session.memory_budget import Bases, Place
from hpc_hess.session.partial_products import ProductWatch, open_product_store, remove_product_store
from hpc_hess.session.problem import Inputs, Problem
from hpc_hess.session.session import Session
from hpc_hess.session.starts import progress_mark
from hpc_hess.storage.agree import attempt
from hpc_hess.storage.run_files import write_aside
from hpc_hess.studies.finished import digest, finished_result
from hpc_hess.studies.opening import begin
from hpc_hess.studies.quadrature.loop import Loop
from hpc_hess.studies.quadrature.result import RESULT_NAME, make_result, refuse_meaningless, to_json
from hpc_hess.studies.runner import run_studies


class Made(NamedTuple):
    """How a run ended: with its ``result``, on rank 0 at least, and perhaps a ``report``; or early, as ``stopped`` says."""

    result: dict[str, Any]
    report: Path | None = None
    stopped: str = ""

    def recurrences(self) -> list[tuple[list[float], list[float]]]:
        """Return alpha and beta of every probe in the result, as they go through JSON: exactly."""
        return [(probe["alpha"], probe["beta"]) for probe in self.result.get("probes", ())]


def make(
    session: Session,
    inputs: Inputs | Problem,
    *,
    existing: bool,
    limits: Sequence[float] = (),
    begun: Callable[[], object] = lambda: None,
) -> Made:
    """Compute what the session's configuration asks for, or go on with it. Collective: yes.

    Parameters
    ----------
    existing : whether the directory holds a run to go on with: :func:`opening.goes_on`.
    limits : what a rank's machine reaches at least, where it has been measured.
    begun : called once the directory is known to be this run's.

    Raises
    ------
    HpcHessError : as one sentence for the user; the run directory keeps every committed step.

    """
    config, world = session.config, session.world
    if existing and (result := finished_result(session, inputs)) is not None:
        session.progress.note("this run is already finished: rewriting its report")
        begun()
        return Made(result, _report(session))
    run = begin(session, inputs, existing=existing)
    begun()
    problem, store, place = run.problem, run.store, run.place
    before = progress_mark(session.out, sum(store.state.lengths)) if world.rank == 0 else []
    with _watched(session, problem, run.exact, place) as watch:
        bases = Bases(place, problem.space, config.lanczos, store)
        loop = Loop(session, problem, store, watch, run.exact, bases, run.width)
        loop.tally.baseline_bytes = problem.program_bytes
        loop.tally.limits = loop.tally.limits or list(limits)
        reason, where, found = run_studies(loop, run.attributes)
    if not reason:
        return Made(_result(loop, found), _report(session))
    stopped = _stopped(loop, reason, where)
    session.progressed = world.rank == 0 and before != progress_mark(session.out, sum(store.state.lengths))
    session.count_stop(reason)
    return Made({}, None, stopped)


def _stopped(loop: Loop, reason: str, where: str) -> str:
    """Say, and return, where a run stopped. ``where`` : the study; "" in the quadrature."""
    state, part = loop.store.state, ", and a part of the next product" if loop.watch.kept else ""
    if not where:
        where = (
            f"after committing step {state.step} of {probes_text(state.group)}" if state.width else "before the first step"
        )
    stopped = f"stopped early {where}{part}: {reason}"
    again = "" if loop.config.run.resume != "never" else ' with run.resume = "auto"'
    loop.progress.note(f"{stopped}; run the same command{again} to go on")
    return stopped


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


def _report(session: Session) -> Path | None:
    """Write the report of a finished run, if one is asked for; return its path on rank 0. Collective: yes.

    Raises
    ------
    StoreError : it cannot be written.

    """
    world, out, report = session.world, session.out, None
    session.got_through()
    if session.config.run.report:
        with attempt(world, out / "report.html", "write the report", of=OSError):
            if world.rank == 0:
                from hpc_hess.studies.run_page import write_report  # matplotlib: not on the other ranks

                report = write_report(out)
    return report


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
