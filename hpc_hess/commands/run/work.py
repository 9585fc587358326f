"""One SPMD run: wires the parts; opens the store or creates it; ends with the result, or early."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from hpc_hess.commands.run.finished import digest, finished_result
from hpc_hess.commands.run.screen import print_summary
from hpc_hess.config import Config
from hpc_hess.console.words import probes_text
from hpc_hess.curvature.exact.exact import StreamedOperator
from hpc_hess.curvature.exact.whole_model import ExactOperator, WholeModel
from hpc_hess.errors import StoreError
from hpc_hess.linalg.lanczos import basis_rows
from hpc_hess.parallel.world import World
from hpc_hess.profiling.flops import measure_limits
from hpc_hess.report.spectrum import warnings
from hpc_hess.session.memory_budget import Bases, Place, exact_product_bytes, lock_step, place_basis
from hpc_hess.session.operators import exact_operator
from hpc_hess.session.partial_products import ProductWatch, open_product_store, remove_product_store
from hpc_hess.session.problem import Problem, dtype_of, load_problem, read_inputs
from hpc_hess.session.session import Session, opened
from hpc_hess.session.starts import progress_mark
from hpc_hess.session.stopping import EXIT_STOPPED, Stopper
from hpc_hess.storage.agree import attempt
from hpc_hess.storage.commit import Committed, newest
from hpc_hess.storage.events import EVENTS_NAME
from hpc_hess.storage.identity import same
from hpc_hess.storage.lock import RunLock
from hpc_hess.storage.opening import put_aside
from hpc_hess.storage.run_files import write_aside
from hpc_hess.storage.schema import FILE, Schema, read_header
from hpc_hess.storage.store import Store
from hpc_hess.studies.quadrature.loop import Loop
from hpc_hess.studies.quadrature.result import RESULT_NAME, make_result, refuse_meaningless, to_json
from hpc_hess.studies.runner import check_kept, check_studies, run_studies


class _Existing(NamedTuple):
    """What the run directory holds already."""

    attributes: dict[str, Any]
    schema: Schema
    state: Committed


def run(config: Config, world: World, stopper: Stopper | None = None) -> int:
    """Compute what the configuration asks for, or go on with it. Returns the exit code. Collective: yes.

    ``stopper`` : of a command that runs more than this; else signals and run.time_limit count from here on.

    Raises
    ------
    HpcHessError : as one sentence for the user; the run directory keeps every committed step.

    """
    total = config.lanczos.steps * config.lanczos.probes
    with opened(config, world, Path(config.run.out), total, stopper=stopper) as session:
        out, progress = session.out, session.progress
        there = world.broadcast((out / FILE).exists(), "run directory")  # nobody else changes it from here on
        existing = there and config.run.resume != "never"
        if config.run.resume == "must" and not there:
            raise StoreError(f"{out} holds no run to go on with; drop --resume must to start one")
        limits = [] if existing else _limits(config, world)
        inputs = read_inputs(config, world)
        if existing and (result := finished_result(session, inputs)):
            progress.note("this run is already finished: rewriting its report")
            return _ended(session, result)
        problem = load_problem(config, world, progress, inputs)
        check_studies(session, problem)
        attributes = _identity(config, problem)
        found = _look(out, world, attributes) if existing else None
        if config.run.resume == "never":
            _put_aside(session)
        if found:
            check_kept(session, attributes)
        exact: ExactOperator | None = None
        complete = found is not None and found.state.complete(config.lanczos.probes)
        if config.operator.method == "exact" and (config.asked_for or not complete):
            progress.phase("exact product")
            exact = exact_operator(config, problem)
        wanted = _lock_step(config, found, exact is not None and exact.lock_step)
        going_on = found.state.width if found and not found.state.finished else 1
        place = place_basis(
            world, problem.space, config.lanczos, wanted, going_on, exact_product_bytes(config, problem.model)
        )
        store = session.held.enter_context(_open_store(session, problem, found, attributes, place, complete))
        if not complete:
            store.take_back()
        with attempt(world, out / "config.toml", "write the configuration"):
            if world.rank == 0:
                write_aside(out / "config.toml", _to_go_on(config).to_toml())
        for note in filter(None, [place.note(config.lanczos), *_kept_basis_notes(config, found)]):
            progress.note(note)
        before = progress_mark(out, sum(store.state.lengths)) if world.rank == 0 else []
        with _watched(session, problem, exact, place) as watch:
            bases = Bases(place, problem.space, config.lanczos, store)
            loop = Loop(session, problem, store, watch, exact, bases, min(wanted, place.width))
            loop.tally.baseline_bytes = problem.program_bytes
            loop.tally.limits = loop.tally.limits or limits
            reason, where, found_in_studies = run_studies(loop, attributes)
        if reason:
            state, part = store.state, ", and a part of the next product" if watch.kept else ""
            if not where:
                where = "before the first step"
                if state.width:
                    where = f"after committing step {state.step} of {probes_text(state.group)}"
            again = "" if config.run.resume != "never" else ' with run.resume = "auto"'
            progress.note(f"stopped early {where}{part}: {reason}; run the same command{again} to go on")
            session.progressed = world.rank == 0 and before != progress_mark(out, sum(state.lengths))
            session.count_stop(reason)
        else:
            remove_product_store(world, out)
            session.got_through()
            if loop.tally.ritz_probe >= config.lanczos.probes:  # of a probe that is not asked for any more
                loop.tally.ritz_check, loop.tally.ritz_ends = {}, {}
            result = make_result(config, world, problem, loop.tally, loop.recurrences())
            result |= found_in_studies
            refuse_meaningless(result)
            result["cautions"] = warnings(result)
            result["digest"] = digest(config, json.loads(to_json(result)))
            with attempt(world, out / RESULT_NAME, "write the result"):  # under the lock: another job may wait for it
                if world.rank == 0:
                    write_aside(out / RESULT_NAME, to_json(result))
            return _ended(session, result)
    world.barrier("stop")  # a launcher may end the others as soon as one rank leaves
    return EXIT_STOPPED


def _ended(session: Session, result: dict[str, Any]) -> int:
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
    world.barrier("finish")
    return 0


def _put_aside(session: Session) -> None:
    """Put the run that the directory holds aside; the session has the lock of an empty one then. Collective: yes."""
    out, world, aside = session.out, session.world, ""
    with attempt(world, out, "put the old run aside"):
        if world.rank == 0 and any((out / name).exists() for name in (FILE, EVENTS_NAME, RESULT_NAME)):
            aside = str(put_aside(out))
    aside = world.broadcast(aside, "put the old run aside")
    if aside:
        session.progress.note(f"the run that {out} held is {aside} from now on")
        session.lock.release()
        session.lock = RunLock.acquire(out, world)


def _to_go_on(config: Config) -> Config:
    """Return the configuration by which the run is gone on with."""
    if config.run.resume != "never":
        return config
    return config.model_copy(update={"run": config.run.model_copy(update={"resume": "auto"})})


def _limits(config: Config, world: World) -> list[float]:
    """Return what every rank reaches at least of a matrix product and of a copy. Collective: yes."""
    mine = measure_limits(world.device, dtype_of(config.model.compute_dtype))
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


def _identity(config: Config, problem: Problem) -> dict[str, Any]:
    """What a run directory is bound to: settings that change the numbers, and fingerprints of model and data."""
    return {
        "config": json.dumps(config.identity(), sort_keys=True),
        "model_fingerprint": problem.source.fingerprint,
        "data_fingerprint": problem.samples.fingerprint,
        "layout_fingerprint": problem.model.layout.fingerprint,
    }


def _look(out: Path, world: World, attributes: dict[str, Any]) -> _Existing:
    """Read what the run directory holds and compare it with this run, before anything is rebuilt. Collective: yes."""
    found: Any = None
    with attempt(world, out / FILE, "open the store"):
        if world.rank == 0:
            header = read_header(out / FILE)
            state = newest(header.schema.slots, header.ledger, out / FILE)
            found = _Existing(header.attributes, header.schema, state)
    found = world.broadcast(found, "read the store's settings")
    with attempt(world, out / FILE, "read the store's settings"):
        _compare(out, found.attributes, attributes)
    return found


def _lock_step(config: Config, found: _Existing | None, shared: bool) -> int:
    """Return how many probes should advance together (see memory_budget.lock_step). Collective: no."""
    wanted = lock_step(config.lanczos, shared)
    if config.lanczos.lock_step == "auto" and found and config.lanczos.probes <= found.schema.probes:
        return min(wanted, found.schema.width)  # "auto" does not make a store be rebuilt
    return wanted


def _open_store(
    session: Session,
    problem: Problem,
    found: _Existing | None,
    attributes: dict[str, Any],
    place_of_basis: Place,
    complete: bool,
) -> Store:
    config, out, lanczos = session.config, session.out, session.config.lanczos
    rows = basis_rows(lanczos.reorthogonalise, lanczos.steps)
    place: dict[str, Any] = {
        "layout": problem.space.layout,
        "shard": problem.space.shard,
        "world": session.world,
        "driver": config.store.driver,
        "lock": session.lock,
    }
    if complete:
        return Store.open(out, **place)  # as it is: no row will be written
    if found:
        return Store.open(
            out, **place, probes=lanczos.probes, width=place_of_basis.width, rows=rows, keep_basis=config.store.keep_basis
        )
    return Store.create(
        out,
        **place,
        probes=lanczos.probes,
        steps=lanczos.steps,
        width=place_of_basis.width,
        rows=rows,
        keep_basis=config.store.keep_basis,
        dtype=place_of_basis.dtype,
        attributes=attributes,
    )


def _kept_basis_notes(config: Config, found: _Existing | None) -> list[str]:
    """Return what store.keep_basis = true does not keep. Collective: no."""
    lanczos, notes = config.lanczos, []
    if not config.store.keep_basis:
        return []
    rows = basis_rows(lanczos.reorthogonalise, lanczos.steps)
    if rows < lanczos.steps:
        notes.append(
            f"store.keep_basis = true keeps the last {rows} rows of each probe: lanczos.reorthogonalise = "
            f"{json.dumps(lanczos.reorthogonalise)} has no more of them"
        )
    if found and not found.schema.keep_basis and found.state.group.stop:
        notes.append(
            "store.keep_basis = true comes too late for probes that were finished without it: their basis is not kept"
        )
    return notes


def _compare(out: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    remedy = "choose another run.out, or go back to the settings in its config.toml"
    before, now = json.loads(found["config"]), json.loads(wanted["config"])
    defaults = Config().model_dump()
    for section, keys in now.items():
        for key, value in keys.items():
            old = before.get(section, {}).get(key, defaults[section][key])  # runs from before the key came
            if old != value:
                raise StoreError(f"{out} holds a run with {section}.{key} = {old!r}, not {value!r}: {remedy}")
    for key in ("model_fingerprint", "data_fingerprint", "layout_fingerprint"):
        if not same(found[key], wanted[key]):
            raise StoreError(f"{out} holds a run of another {key.split('_')[0]} ({key} differs): {remedy}")
