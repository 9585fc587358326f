"""The studies of a run: functions of a Bench, each with a store of its own pieces until it has ended.

RUN/studies/NAME holds the store while the study is on its way, and found.json with what it found afterwards.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hpc_hess.config import AnalysisSection, Config
from hpc_hess.curvature.decomposition import Groups, Pullback, weights
from hpc_hess.linalg.measure import Recurrence
from hpc_hess.model.sharded.gradient import Gradient
from hpc_hess.model.sharded.skeleton import text_config, vocabulary_size
from hpc_hess.parallel.basis import Basis
from hpc_hess.parallel.memory import host_bytes_free
from hpc_hess.parallel.vector import Vector, VectorSpace
from hpc_hess.parallel.world import World
from hpc_hess.session.memory_budget import exact_product_bytes, room_for_rows
from hpc_hess.session.problem import Problem
from hpc_hess.session.stopping import InterruptedProductError
from hpc_hess.storage.agree import attempt
from hpc_hess.storage.disk import free_bytes, remove, rename_durably
from hpc_hess.storage.identity import must_match
from hpc_hess.storage.journal import Member
from hpc_hess.storage.run_files import write_aside
from hpc_hess.storage.schema import FILE, read_header
from hpc_hess.storage.store import Store, store_exists
from hpc_hess.studies.base import Bench, Study
from hpc_hess.studies.block_diagonal.compute import block_diagonal
from hpc_hess.studies.block_diagonal.compute import compared as blocks_compared
from hpc_hess.studies.block_diagonal.partition import check_heads
from hpc_hess.studies.class_structure.compute import class_structure
from hpc_hess.studies.class_structure.compute import compared as classes_compared
from hpc_hess.studies.deflated.compute import deflated_density
from hpc_hess.studies.diagonal.compute import diagonal_study
from hpc_hess.studies.eigenpairs.search import read_eigenvectors
from hpc_hess.studies.inverse.compute import inverse_study, suggested_damping
from hpc_hess.studies.pieces import EXTRA_BYTES, Kept
from hpc_hess.studies.quadrature.loop import Loop
from hpc_hess.studies.sub_block.compute import Room, column_space, select, sub_block_study
from hpc_hess.studies.trace.compute import trace_study

FOLDER = "studies"  # in the run directory
FOUND, PIECES = "found.json", "pieces"


class Inputs(NamedTuple):
    """What the run has found before a study: recurrences of all probes, eigenvalues of the search, ascending."""

    settings: AnalysisSection
    recurrences: Sequence[Recurrence]
    eigenvalues: Sequence[float]


class Entry(NamedTuple):
    """A study that a configuration may ask for.

    ``keys`` of [analysis] define what it finds; the first of them asks for it. ``rows``: vectors that it keeps at a time,
    at most. ``memory``: the key to change where its vectors do not fit. ``came_from``: what else its products follow from,
    under the names by which the findings hold it; where that has changed, the study is computed anew. ``compared``: what
    needs no product, computed at each start: the findings beside the rest of the run.
    """

    study: Study
    keys: tuple[str, ...]
    rows: Callable[[AnalysisSection], int]
    memory: str = "samples"
    came_from: Callable[[Inputs], dict[str, Any]] = lambda inputs: {}
    compared: Callable[[dict[str, Any], Inputs], dict[str, Any]] = lambda found, inputs: found
    space: Callable[[Loop], VectorSpace] = lambda loop: loop.space  # of the vectors that it keeps


def _damping(inputs: Inputs) -> dict[str, Any]:
    return {"damping": suggested_damping(inputs.recurrences)} if inputs.settings.damping == "auto" else {}


_STUDIES: dict[str, Entry] = {
    "trace": Entry(trace_study, ("trace", "samples"), lambda a: a.samples),
    "diagonal": Entry(diagonal_study, ("diagonal", "samples"), lambda a: a.samples),
    "inverse": Entry(
        inverse_study, ("inverse", "inverse_products", "inverse_tolerance", "damping"), lambda a: a.inverse_products,
        "inverse_products", came_from=_damping,
    ),
    "deflated": Entry(
        deflated_density, ("deflated_steps", "eigenpairs", "which"), lambda a: a.deflated_steps, "deflated_steps",
        came_from=lambda inputs: {"outliers": list(inputs.eigenvalues)},
    ),
    "block_diagonal": Entry(
        block_diagonal, ("block_diagonal", "block_samples", "block_spectrum", "block_steps"),
        lambda a: max(a.block_samples + 1, a.block_steps), "block_samples",
        came_from=lambda inputs: {"eigenvalues": list(inputs.eigenvalues)},
        compared=lambda found, inputs: blocks_compared(found, inputs.recurrences, inputs.eigenvalues),
    ),
    "class_structure": Entry(
        class_structure, ("class_groups", "class_steps"), lambda a: a.class_groups + 1 + a.class_steps, "class_groups",
        compared=lambda found, inputs: classes_compared(found, inputs.recurrences),
    ),
    "sub_block": Entry(sub_block_study, ("sub_block",), lambda a: 0, "sub_block", space=lambda loop: column_space(
        loop.space, len(select(loop.problem.model.layout, loop.config.analysis.sub_block).entries)
    )),
}  # fmt: skip


def asked_for(analysis: AnalysisSection) -> list[str]:
    """Return the names of the studies that a configuration asks for. Collective: no."""
    return [name for name, entry in _STUDIES.items() if getattr(analysis, entry.keys[0])]


def check_studies(config: Config, world: World, problem: Problem) -> None:
    """Refuse what does not fit the model or the machine before anything is computed. Collective: yes. Raises ConfigError."""
    analysis = config.analysis
    if analysis.sub_block:
        out = Path(config.run.out)
        folder = out / FOLDER / "sub_block"
        there = world.broadcast(((folder / FOUND).exists(), (folder / PIECES / FILE).exists()), "look for a sub-block")
        memory = int(-world.max_over_ranks(-(host_bytes_free() // world.launch.local_size), "free memory"))
        disk = None if there[1] else world.broadcast(free_bytes(out), "free disk")
        select(problem.model.layout, analysis.sub_block, None if there[0] else Room(memory, disk))
    if "head" in analysis.block_diagonal:
        check_heads(problem.model.layout, _head_dim(problem))


def check_kept(config: Config, world: World, out: Path, attributes: dict[str, Any]) -> None:
    """Refuse studies that the run directory holds with other settings, before anything is changed. Collective: yes.

    Raises
    ------
    StoreError : it holds one; says which setting differs.

    """
    with attempt(world, out / FOLDER, "look for studies"):
        for name in asked_for(config.analysis) if world.rank == 0 else ():
            folder = out / FOLDER / name
            if (folder / FOUND).exists():
                kept = json.loads((folder / FOUND).read_text(encoding="utf-8"))
                _compare(folder, kept["asked"], _asked(name, config.analysis))
            elif (folder / PIECES / FILE).exists():
                found, bound_to = read_header(folder / PIECES / FILE).attributes, _bound_to(name, config, attributes)
                # pieces are batches of columns; stores of before do not say of how many
                _compare(folder, {"columns": bound_to["columns"]} | found, bound_to)


def _asked(name: str, analysis: AnalysisSection) -> dict[str, Any]:
    return {key: getattr(analysis, key) for key in _STUDIES[name].keys}


def _bound_to(name: str, config: Config, attributes: dict[str, Any]) -> dict[str, Any]:
    return attributes | {"analysis": json.dumps(_asked(name, config.analysis)), "columns": config.analysis.columns}


def run_study(
    name: str, loop: Loop, out: Path, attributes: dict[str, Any], eigenvalues: Sequence[float]
) -> tuple[str, dict[str, Any]]:
    """Run one study to its end, or go on with it. Collective: yes.

    Returns why it stopped early, or "", and what it found. ``eigenvalues``: of the run's search, if there was one.
    """
    entry, folder, world, analysis = _STUDIES[name], out / FOLDER / name, loop.world, loop.config.analysis
    inputs = Inputs(analysis, loop.recurrences(), sorted(eigenvalues))
    came_from = world.broadcast(entry.came_from(inputs), "what a study comes from")
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
            return "", entry.compared(found, inputs)
        changed = next(key for key, value in came_from.items() if found.get(key, value) != value)
        loop.progress.note(f"the study '{name}' is computed anew: {changed} has changed since it was made")
        with attempt(world, folder, "begin a study anew"):
            if world.rank == 0:
                remove(folder / FOUND)
    loop.progress.phase(name.replace("_", " "))
    store_space = entry.space(loop)
    bound_to = _bound_to(name, loop.config, attributes) | {"came_from": json.dumps(came_from)}
    with _open(loop, folder, bound_to, entry, store_space) as store:
        try:
            store.take_back()
            loop.ready()
            keep = Kept(name, loop, store, store_space)
            found = entry.study(_bench(loop, entry, keep, folder, out, attributes)) | came_from
        except InterruptedProductError as interrupted:
            return str(interrupted), {}
    with attempt(world, folder, "end a study"):
        if world.rank == 0:
            asked = _asked(name, analysis)
            write_aside(folder / FOUND, json.dumps({"asked": asked, "found": found, "digest": _digest(asked, found)}))
            remove(folder / PIECES)
    return "", entry.compared(found, inputs)


def _digest(asked: Any, found: Any) -> str:
    """Return a checksum of a study: earlier versions kept none."""
    text = json.dumps([asked, found], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _open(loop: Loop, folder: Path, bound_to: dict[str, Any], entry: Entry, space: VectorSpace) -> Store:
    """Open the store of a study's pieces, or begin with a new one: also where what it comes from has changed."""
    place: dict[str, Any] = {
        "layout": space.layout, "shard": space.shard, "world": loop.world, "driver": loop.config.store.driver,
    }  # fmt: skip
    pieces, usable = folder / PIECES, True
    there = store_exists(pieces, loop.world)
    if there:
        with attempt(loop.world, pieces, "open a study"):
            if loop.world.rank == 0:
                header = read_header(pieces / FILE)
                usable = header.attributes.get("came_from", bound_to["came_from"]) == bound_to["came_from"]
                usable &= header.schema.fingerprint == space.layout.fingerprint  # else of a version that kept it otherwise
        if loop.world.broadcast(usable, "pieces of a study"):
            return Store.open(pieces, **place)
    rows = entry.rows(loop.config.analysis) + 1 if space is loop.space else space.size
    return Store.create(
        pieces, **place, probes=1, steps=1, rows=rows, dtype=space.dtype,
        attributes=bound_to, keep_basis=True, extra_bytes=EXTRA_BYTES, replace_existing=there,
        save_space=f"lower analysis.{entry.memory}, or put run.out on a larger disk",
    )  # fmt: skip


def _compare(folder: Path, old: dict[str, Any], wanted: dict[str, Any]) -> None:
    must_match(old, wanted, f"{folder} holds this study", "remove that directory to begin anew, or choose another run.out")


def _bench(loop: Loop, entry: Entry, keep: Kept, folder: Path, out: Path, attributes: dict[str, Any]) -> Bench:
    config, world, space = loop.config, loop.world, loop.space

    def basis(rows: int) -> Basis:
        exact = exact_product_bytes(config, loop.problem.model)
        return Basis(space, rows, room_for_rows(world, space, rows, exact, f"analysis.{entry.memory}"))

    def save(name: str, array: np.ndarray) -> None:
        with attempt(world, folder, "keep an array"):
            if world.rank == 0:
                partial_file = folder / f"{name}.part.npy"
                np.save(partial_file, array)
                rename_durably(partial_file, folder / f"{name}.npy")  # the pieces that it came from will be removed

    def save_vectors(name: str, vectors: Sequence[Vector]) -> None:
        with Store.create(
            folder / name, layout=space.layout, shard=space.shard, world=world, driver=config.store.driver, probes=1,
            steps=1, rows=len(vectors), dtype=space.dtype, attributes=attributes, keep_basis=True, replace_existing=True,
        ) as store:  # fmt: skip
            for row, vector in enumerate(vectors):
                store.write_row(0, row, vector.data.cpu().numpy())
            store.commit(0, [Member(np.empty(0), np.empty(0), rows=range(len(vectors)), ended=True)])

    return Bench(
        settings=config.analysis, seed=config.lanczos.seed, steps=config.lanczos.steps, operator=keep.operator, keep=keep,
        basis=basis,
        gradient=lambda: loop.problem.seen(loop.problem.gradient.at_theta0()[1]), recurrences=loop.recurrences(),
        eigenvectors=partial(read_eigenvectors, config, world, space, out, attributes), save=save,
        save_vectors=save_vectors, head_dim=_head_dim(loop.problem), target_counts=lambda: _target_counts(loop),
        group_weights=lambda groups: _group_weights(loop, groups),
        pull=lambda cotangent: Gradient(loop.problem.model, Pullback(loop.problem.objective, cotangent))()[1],
    )  # fmt: skip


def _group_weights(loop: Loop, groups: Groups) -> np.ndarray:
    """Return the weight of each pair of groups, (count, count). Collective: yes."""
    problem = loop.problem
    with problem.model.measuring():
        total = partial(loop.world.sum_over_ranks, name="class weights")
        return weights(problem.objective, problem.model.module, groups, total, loop.world.guard)


def _target_counts(loop: Loop) -> np.ndarray:
    """Count the targets of all samples, which every rank knows."""
    targets = loop.problem.samples.labels[:, 1:]
    size = vocabulary_size(loop.problem.source.hf_config)
    return np.bincount(targets[targets >= 0].numpy().ravel(), minlength=size)


def _head_dim(problem: Problem) -> int:
    """Return the width of an attention head, 0 where the model does not tell."""
    config = text_config(problem.source.hf_config)
    if width := getattr(config, "head_dim", None):
        return int(width)
    hidden, heads = getattr(config, "hidden_size", 0), getattr(config, "num_attention_heads", 0)
    return hidden // heads if hidden and heads else 0
