"""How a run begins: the model is loaded, what is asked is held against it and against the directory, the store is opened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from hpc_hess.config import LEFT_OUT_AT_DEFAULT, Config
from hpc_hess.curvature.exact.whole_model import ExactOperator
from hpc_hess.errors import StoreError
from hpc_hess.linalg.lanczos import basis_rows
from hpc_hess.parallel.world import World
from hpc_hess.session.memory_budget import Place, exact_product_bytes, lock_step, place_basis
from hpc_hess.session.operators import exact_operator
from hpc_hess.session.problem import Inputs, Problem, load_problem
from hpc_hess.session.session import Session
from hpc_hess.storage.agree import attempt
from hpc_hess.storage.commit import Committed, newest
from hpc_hess.storage.events import EVENTS_NAME
from hpc_hess.storage.identity import same
from hpc_hess.storage.lock import RunLock
from hpc_hess.storage.opening import put_aside
from hpc_hess.storage.run_files import write_aside
from hpc_hess.storage.schema import FILE, Schema, read_header
from hpc_hess.storage.store import Store
from hpc_hess.studies.quadrature.result import RESULT_NAME
from hpc_hess.studies.runner import check_kept, check_studies


class _Existing(NamedTuple):
    """What the run directory holds already."""

    attributes: dict[str, Any]
    schema: Schema
    state: Committed


class Begun(NamedTuple):
    """A run that is open: what it computes with, and where it keeps it."""

    problem: Problem
    attributes: dict[str, Any]  # what the run directory is bound to
    exact: ExactOperator | None
    place: Place
    width: int  # of the groups of probes that begin here
    store: Store


def goes_on(session: Session) -> bool:
    """Return whether the directory holds a run that this one goes on with. Collective: yes. Raises StoreError."""
    resume = session.config.run.resume
    # nobody else changes it from here on
    there = session.world.broadcast((session.out / FILE).exists(), "run directory")
    if resume == "must" and not there:
        raise StoreError(f"{session.out} holds no run to go on with; drop --resume must to start one")
    return there and resume != "never"


def begin(session: Session, inputs: Inputs | Problem, *, existing: bool) -> Begun:
    """Load the model, check what is asked against it and against the directory, open the store. Collective: yes.

    ``inputs`` : used up; or the problem itself, where a program has it.
    """
    config, world, out, progress = session.config, session.world, session.out, session.progress
    problem = inputs if isinstance(inputs, Problem) else load_problem(config, world, progress, inputs)
    check_studies(session, problem)
    attributes = _identity(config, problem)
    found = _look(out, world, attributes, in_program=config.problem.in_program) if existing else None
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
    exact_bytes = exact_product_bytes(config, problem.model)
    place = place_basis(world, problem.space, config.lanczos, wanted, going_on, exact_bytes)
    store = session.held.enter_context(_open_store(session, problem, found, attributes, place, complete))
    if not complete:
        store.take_back()
    with attempt(world, out / "config.toml", "write the configuration"):
        if world.rank == 0:
            write_aside(out / "config.toml", _to_go_on(config).to_toml())
    for note in filter(None, [place.note(config.lanczos), *_kept_basis_notes(config, found)]):
        progress.note(note)
    return Begun(problem, attributes, exact, place, min(wanted, place.width), store)


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


def _identity(config: Config, problem: Problem) -> dict[str, Any]:
    """What a run directory is bound to: settings that change the numbers, and fingerprints of model and data."""
    identity = config.identity()
    if not config.problem.build:
        identity["model"]["attention"] = problem.attention  # "auto" is what it has chosen
    return {
        "config": json.dumps(identity, sort_keys=True),
        "model_fingerprint": problem.source.fingerprint,
        "data_fingerprint": problem.samples.fingerprint,
        "layout_fingerprint": problem.model.layout.fingerprint,
    }


def _look(out: Path, world: World, attributes: dict[str, Any], *, in_program: bool) -> _Existing:
    """Read what the run directory holds and compare it with this run, before anything is rebuilt. Collective: yes."""
    found: Any = None
    with attempt(world, out / FILE, "open the store"):
        if world.rank == 0:
            header = read_header(out / FILE)
            state = newest(header.schema.slots, header.ledger, out / FILE)
            found = _Existing(header.attributes, header.schema, state)
    found = world.broadcast(found, "read the store's settings")
    with attempt(world, out / FILE, "read the store's settings"):
        _compare(out, found.attributes, attributes, in_program=in_program)
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


def _compare(out: Path, found: dict[str, Any], wanted: dict[str, Any], *, in_program: bool) -> None:
    remedy = f"choose another {'out' if in_program else 'run.out'}, or go back to the settings in its config.toml"
    before, now = json.loads(found["config"]), json.loads(wanted["config"])
    defaults = Config().model_dump()
    for section, keys in now.items():
        gone = [key for key in before.get(section, {}) if section == "problem" or (section, key) in LEFT_OUT_AT_DEFAULT]
        for key in {**keys, **dict.fromkeys(gone)}:
            usual = defaults[section].get(key)
            old, value = (given.get(section, {}).get(key, usual) for given in (before, now))
            if old != value:
                raise StoreError(f"{out} holds a run with {section}.{key} = {old!r}, not {value!r}: {remedy}")
    for key in ("model_fingerprint", "data_fingerprint", "layout_fingerprint"):
        if not same(found[key], wanted[key]):
            raise StoreError(f"{out} holds a run of another {key.split('_')[0]} ({key} differs): {remedy}")
