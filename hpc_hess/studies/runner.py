"""The studies of a run, one after the other: the quadrature, and those of the registry that the configuration asks for.

A study is a function of a Bench. RUN/studies/NAME holds the store of its pieces while it is on its way, and found.json with
what it found afterwards. The search for eigenpairs has a store of its own shape.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hpc_hess.config import Config
from hpc_hess.errors import StoreError
from hpc_hess.parallel.basis import Basis
from hpc_hess.parallel.vector import Vector, VectorSpace
from hpc_hess.registry.studies import STUDIES
from hpc_hess.registry.table import load
from hpc_hess.session.memory_budget import exact_product_bytes, room_for_rows
from hpc_hess.session.problem import Problem
from hpc_hess.session.session import Session
from hpc_hess.session.stopping import InterruptedProductError
from hpc_hess.storage.agree import attempt
from hpc_hess.storage.disk import remove, rename_durably, size_text
from hpc_hess.storage.identity import must_match
from hpc_hess.storage.journal import Member
from hpc_hess.storage.run_files import write_aside
from hpc_hess.storage.schema import FILE, read_header
from hpc_hess.storage.store import Store, store_exists
from hpc_hess.studies.base import FOLDER, FOUND, PIECES, Bench, Inputs, Recipe
from hpc_hess.studies.eigenpairs.compute import (
    EigenLoop,
    check_search,
    eigen_basis_device,
    open_eigen_store,
    pairs_found,
    read_eigenvectors,
    search_ended,
)
from hpc_hess.studies.pieces import EXTRA_BYTES, Kept
from hpc_hess.studies.quadrature.loop import Loop

_SEARCH = "eigenpairs"


def check_studies(session: Session, problem: Problem) -> None:
    """Refuse what does not fit the model or the machine before anything is computed. Collective: yes. Raises ConfigError."""
    for name in _pieced(session.config):
        _recipe(name).check(session, problem, session.out / FOLDER / name)


def check_kept(session: Session, attributes: dict[str, Any]) -> None:
    """Refuse studies that the run directory holds with other settings, before anything is changed. Collective: yes.

    Raises
    ------
    StoreError : it holds one; says which setting differs.

    """
    config, world, out = session.config, session.world, session.out
    check_search(session, attributes)
    with attempt(world, out / FOLDER, "look for studies"):
        for name in _pieced(config) if world.rank == 0 else ():
            folder = out / FOLDER / name
            if (folder / FOUND).exists():
                kept = json.loads((folder / FOUND).read_text(encoding="utf-8"))
                _compare(name, folder, kept["asked"], config.studies[name].defining(config))
            elif (folder / PIECES / FILE).exists():
                found, bound_to = read_header(folder / PIECES / FILE).attributes, _bound_to(name, config, attributes)
                # pieces are batches of columns; stores of earlier versions do not say of how many
                _compare(name, folder, {"columns": bound_to.get("columns")} | found, bound_to)


def run_studies(loop: Loop, attributes: dict[str, Any]) -> tuple[str, str, dict[str, Any]]:
    """Run all studies to their end, or go on with them. Collective: yes.

    Returns why they stopped early, or "", where, and what goes into the result: "eigenpairs", "studies".
    """
    if reason := loop.run():
        return reason, "", {}
    _free_basis(loop)
    eigenvalues: list[float] = []
    result: dict[str, Any] = {}
    for name in loop.config.asked_for:
        loop.bases.free()
        if name == _SEARCH:
            reason, found = _search(loop, attributes)
            eigenvalues = sorted(pair["value"] for pair in found.get("pairs", ()))
        else:
            reason, found = _run_study(name, loop, attributes, eigenvalues)
        if reason:
            where = "in the search for eigenpairs" if name == _SEARCH else f"in the study '{name}'"
            return reason, where, {}
        if name == _SEARCH:
            result[name] = found
        else:
            result.setdefault(FOLDER, {})[name] = found
    return "", "", result


def _free_basis(loop: Loop) -> None:
    """Give the disk space of the probes' basis back, which nothing needs any more. Collective: yes."""
    store, size = loop.store, loop.store.schema.basis_bytes
    if loop.config.store.keep_basis or not size:
        return
    loop.bases.free()
    try:
        store.free_basis()
    except StoreError as error:  # the numbers are safe
        loop.progress.note(f"the Krylov basis stays on disk: {error}")
    else:
        loop.progress.note(f"the Krylov basis is not needed any more: {size_text(size)} of disk space given back")


def _search(loop: Loop, attributes: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Search for eigenpairs, or go on; return why it stopped early, or "", and what was found. Collective: yes."""
    session, space = loop.session, loop.space
    device = eigen_basis_device(session, space, exact_product_bytes(loop.config, loop.problem.model))
    with open_eigen_store(session, space, attributes) as store:
        if not search_ended(session, store):
            store.take_back()
            try:
                operator = loop.ready()
            except InterruptedProductError as interrupted:
                return str(interrupted), {}
            found = EigenLoop(
                session,
                operator,
                store,
                device,
                loop.watch,
                gradient=lambda: loop.problem.to_krylov_space(loop.problem.gradient.at_theta0()[1]),
            )
            if reason := found.run():
                return reason, {}
        store.give_back()  # also after a kill at the search's end, and where other ranks have built the store anew
        return "", pairs_found(store)


def _pieced(config: Config) -> list[str]:
    return [name for name in config.asked_for if name != _SEARCH]


def _recipe(name: str) -> Recipe:
    found: Recipe = load(STUDIES[name].recipe)
    return found


def _bound_to(name: str, config: Config, attributes: dict[str, Any]) -> dict[str, Any]:
    settings = config.studies[name]
    columns = {"columns": settings.columns} if hasattr(settings, "columns") else {}
    return attributes | {"analysis": json.dumps(settings.defining(config))} | columns


def _run_study(
    name: str, loop: Loop, attributes: dict[str, Any], eigenvalues: Sequence[float]
) -> tuple[str, dict[str, Any]]:
    """Run one study to its end, or go on with it; return why it stopped early, or "", and what it found. Collective: yes."""
    recipe, world, config = _recipe(name), loop.world, loop.config
    folder = loop.session.out / FOLDER / name
    inputs = Inputs(config, loop.recurrences(), eigenvalues)
    came_from = world.broadcast(recipe.came_from(inputs), "what a study comes from")
    found: dict[str, Any] | None = None
    with attempt(world, folder, "look for a study"):
        if world.rank == 0 and (folder / FOUND).exists():
            kept = json.loads((folder / FOUND).read_text(encoding="utf-8"))
            if kept.get("digest", digest := _digest(kept["asked"], kept["found"])) != digest:
                raise ValueError(f"{FOUND} does not match its checksum")
            found = kept["found"]
    found = world.broadcast(found, "what a study found")
    if found is not None:
        if all(found.get(key, value) == value for key, value in came_from.items()):
            return "", recipe.compared(found, inputs)
        changed = next(key for key, value in came_from.items() if found.get(key, value) != value)
        loop.progress.note(f"the study '{name}' is computed anew: {changed} has changed since it was made")
        with attempt(world, folder, "begin a study anew"):
            if world.rank == 0:
                remove(folder / FOUND)
    loop.progress.phase(name.replace("_", " "))
    store_space = recipe.space(config, loop.space)
    bound_to = _bound_to(name, config, attributes) | {"came_from": json.dumps(came_from)}
    with _open(name, loop, bound_to, recipe, store_space) as store:
        try:
            store.take_back()
            loop.ready()
            keep = Kept(name, loop, store, store_space)
            found = recipe.study(_bench(name, loop, recipe, keep, attributes)) | came_from
        except InterruptedProductError as interrupted:
            return str(interrupted), {}
    with attempt(world, folder, "end a study"):
        if world.rank == 0:
            asked = config.studies[name].defining(config)
            write_aside(folder / FOUND, json.dumps({"asked": asked, "found": found, "digest": _digest(asked, found)}))
            remove(folder / PIECES)
    return "", recipe.compared(found, inputs)


def _digest(asked: Any, found: Any) -> str:
    """Return a checksum of a study: earlier versions kept none."""
    text = json.dumps([asked, found], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _open(name: str, loop: Loop, bound_to: dict[str, Any], recipe: Recipe, space: VectorSpace) -> Store:
    """Open the store of a study's pieces, or begin with a new one: also where what it comes from has changed."""
    place: dict[str, Any] = {
        "layout": space.layout,
        "shard": space.shard,
        "world": loop.world,
        "driver": loop.config.store.driver,
    }
    pieces, usable = loop.session.out / FOLDER / name / PIECES, True
    there = store_exists(pieces, loop.world)
    if there:
        with attempt(loop.world, pieces, "open a study"):
            if loop.world.rank == 0:
                header = read_header(pieces / FILE)
                usable = header.attributes.get("came_from", bound_to["came_from"]) == bound_to["came_from"]
                usable &= header.schema.fingerprint == space.layout.fingerprint  # else of a version that kept it otherwise
        if loop.world.broadcast(usable, "pieces of a study"):
            return Store.open(pieces, **place)
    rows = recipe.rows(loop.config) + 1 if space is loop.space else space.size
    return Store.create(
        pieces,
        **place,
        probes=1,
        steps=1,
        rows=rows,
        dtype=space.dtype,
        attributes=bound_to,
        keep_basis=True,
        extra_bytes=EXTRA_BYTES,
        replace_existing=there,
        save_space=f"lower studies.{name}.{recipe.memory}, or put run.out on a larger disk",
    )


def _compare(name: str, folder: Path, old: dict[str, Any], wanted: dict[str, Any]) -> None:
    keys = {former: f"studies.{name}.{key}" for key, former in load(STUDIES[name].settings).former.items()}
    old, wanted = ({keys.get(key, key): value for key, value in some.items()} for some in (old, wanted))
    must_match(old, wanted, f"{folder} holds this study", "remove that directory to begin anew, or choose another run.out")


def _bench(name: str, loop: Loop, recipe: Recipe, keep: Kept, attributes: dict[str, Any]) -> Bench:
    config, world, space = loop.config, loop.world, loop.space
    folder = loop.session.out / FOLDER / name

    def basis(rows: int) -> Basis:
        exact = exact_product_bytes(config, loop.problem.model)
        return Basis(space, rows, room_for_rows(world, space, rows, exact, f"studies.{name}.{recipe.memory}"))

    def save(array_name: str, array: np.ndarray) -> None:
        with attempt(world, folder, "keep an array"):
            if world.rank == 0:
                partial_file = folder / f"{array_name}.part.npy"
                np.save(partial_file, array)
                rename_durably(partial_file, folder / f"{array_name}.npy")  # the pieces that it came from will be removed

    def save_vectors(store_name: str, vectors: Sequence[Vector]) -> None:
        with Store.create(
            folder / store_name,
            layout=space.layout,
            shard=space.shard,
            world=world,
            driver=config.store.driver,
            probes=1,
            steps=1,
            rows=len(vectors),
            dtype=space.dtype,
            attributes=attributes,
            keep_basis=True,
            replace_existing=True,
        ) as store:
            for row, vector in enumerate(vectors):
                store.write_row(0, row, vector.data.cpu().numpy())
            store.commit(0, [Member(np.empty(0), np.empty(0), rows=range(len(vectors)), ended=True)])

    return Bench(
        config=config,
        problem=loop.problem,
        operator=keep.operator,
        keep=keep,
        basis=basis,
        gradient=lambda: loop.problem.to_krylov_space(loop.problem.gradient.at_theta0()[1]),
        recurrences=loop.recurrences(),
        eigenvectors=partial(read_eigenvectors, loop.session, space, attributes),
        save=save,
        save_vectors=save_vectors,
    )
