"""What has to be decided and done before a store can be opened by this job."""

from __future__ import annotations

import os
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hpc_hess.errors import StoreError
from hpc_hess.parallel.layout import Layout, Shard
from hpc_hess.parallel.world import World
from hpc_hess.storage.agree import attempt
from hpc_hess.storage.build import build, sweep
from hpc_hess.storage.commit import Committed, Ledger, encode, kept_rows, newest
from hpc_hess.storage.disk import remove, sync_directory
from hpc_hess.storage.drivers import choose_driver
from hpc_hess.storage.schema import FILE, Header, Schema, read_header


def put_aside(run_dir: Path) -> Path:
    """Rename a run directory to NAME.before-1, or the first such name that is free; return it. Under its lock, which goes
    with it. Collective: no.

    Raises
    ------
    StoreError : it cannot be renamed, or the program works in it.

    """
    directory = run_dir.resolve()
    if Path.cwd().is_relative_to(directory):
        raise StoreError(f"{directory}, where this program was started, cannot be put aside: choose another run.out")
    number = 1
    while os.path.lexists(aside := directory.with_name(f"{directory.name}.before-{number}")):
        number += 1
    try:
        directory.rename(aside)
        sync_directory(aside.parent)
    except OSError as error:
        raise StoreError(f"{directory} cannot be put aside ({error.strerror}): choose another run.out") from error
    return aside


def clear(run_dir: Path, *, replace_existing: bool) -> None:
    """Make room for a new store: remove leftovers and, if asked, the store that is there. Collective: no.

    Raises
    ------
    StoreError : there is a store and it is not to be replaced.

    """
    if (run_dir / FILE).exists():
        if not replace_existing:
            raise StoreError(
                f"{run_dir} holds a run already: go on with it (run.resume), choose another run.out, or replace it "
                'with run.resume = "never"'
            )
        remove(run_dir / FILE)
        sync_directory(run_dir)
    sweep(run_dir, "")


def check_layout(header: Header, layout: Layout, run_dir: Path) -> None:
    """Raise StoreError unless the store numbers its entries as ``layout`` does. Collective: no."""
    if header.schema.fingerprint == layout.fingerprint:
        return
    stored = {
        n: tuple(int(k) for k in s if k >= 0) for n, s in zip(header.table["name"], header.table["shape"], strict=True)
    }
    here = {p.name: p.shape for p in layout.parameters}
    different = [name for name in sorted(stored.keys() | here.keys()) if stored.get(name) != here.get(name)]
    detail = "a parameter that is not selected differs"
    if different:
        name = different[0]
        detail = f"'{name}' is {stored.get(name, 'absent')} in the store and {here.get(name, 'absent')} in the model"
    raise StoreError(
        f"{run_dir} was computed with other parameters ({detail}): use the same model and selection, or another run.out"
    )


def same_shards(header: Header, layout: Layout) -> bool:
    """Return whether the rank files of the store are cut as ``layout`` cuts them. Collective: no."""
    dims = [p.shard_dim for p in layout.parameters]
    return header.schema.num_shards == layout.num_shards and header.table["shard_dim"].tolist() == dims


def communicator(world: World, driver: str) -> Any:
    """Return the MPI communicator of this rank's replica, or None without MPI. Collective over all ranks with MPI."""
    if driver != "mpio" or world.mpi is None:
        return None
    return world.mpi if world.num_replicas == 1 else world.mpi.Split(world.replica, world.rank)


def adopt(
    run_dir: Path, driver: str, wanted: dict[str, Any], layout: Layout, shard: Shard, world: World
) -> tuple[Header, Any]:
    """Return the header of the store that is there, rebuilt where this job cannot write it, and the communicator.

    ``wanted``: probes, steps, rows, width and keep_basis (None: as it is), at least. Collective: yes.

    Raises
    ------
    StoreError : as Store.open.

    """
    header: Any = None
    with attempt(world, run_dir / FILE, "open the store"):
        if world.rank == 0:
            header = read_header(run_dir / FILE)
            check_layout(header, layout, run_dir)
            sweep(run_dir, header.schema.generation)
    header = world.broadcast(header, "read the store")
    old = header.schema
    kind = choose_driver(driver, world, old.driver)
    keep_basis, size = wanted["keep_basis"], {key: wanted[key] for key in ("probes", "steps", "rows")}
    size["width"] = min(wanted["width"], max(wanted["probes"], old.probes))
    grown: dict[str, Any] = {key: max(value, getattr(old, key)) for key, value in size.items()}
    grown["keep_basis"] = old.keep_basis if keep_basis is None else keep_basis
    comm = communicator(world, kind)
    same = kind == old.driver and all(getattr(old, key) == value for key, value in grown.items())
    if not (same and (kind == "mpio" or same_shards(header, layout))):
        header = rebuild(run_dir, header, kind, grown, layout=layout, shard=shard, world=world, comm=comm)
    return header, comm


def rebuild(
    run_dir: Path,
    header: Header,
    driver: str,
    sizes: dict[str, Any],
    *,
    layout: Layout,
    shard: Shard,
    world: World,
    comm: Any,
    state: Committed | None = None,
) -> Header:
    """Replace a store by one of another driver, rank layout or size, with its committed state. Collective: yes.

    Parameters
    ----------
    sizes : fields of the new Schema that may differ. Without ``rows`` no basis is left, and no row is needed.
    state : the committed state; default: as the ledger of ``header`` says.

    """
    old = header.schema
    state = state or newest(old.slots, header.ledger, run_dir / FILE)
    generation = world.broadcast(uuid.uuid4().hex[:12], "name the generation")
    schema = replace(
        old, driver=driver, generation="" if driver == "mpio" else generation, num_shards=world.shard_size, **sizes
    )
    if not schema.rows:
        state = replace(state, rows=((),) * state.width)
    keep_basis = old.keep_basis and schema.keep_basis
    rows = [(k, row) for k in range(old.probes) for row in kept_rows(state, header.ledger, keep_basis, k)]
    ledger = _grown(header.ledger, old, schema, state, rows)
    build(
        run_dir,
        schema,
        layout=layout,
        shard=shard,
        world=world,
        comm=comm,
        attributes=header.attributes,
        ledger=ledger,
        source=header,
        rows=rows,
    )
    with attempt(world, run_dir, "remove the old generation"):
        if world.rank == 0:
            sweep(run_dir, schema.generation)
    return Header(schema, header.attributes, {}, ledger)


def _grown(old: Ledger, before: Schema, after: Schema, state: Committed, rows: list[tuple[int, int]]) -> Ledger:
    """Return the ledger of the new generation: the same numbers, with checksums of the rows that are copied only."""
    ledger = Ledger.empty(after.slots, after.steps)
    ledger.alpha[: before.probes, : before.steps] = old.alpha
    ledger.beta[: before.probes, : before.steps] = old.beta
    for row in rows:
        ledger.checksum[row] = old.checksum[row]
    if state.sequence:
        # in both slots: a single record that does not hold would look like a store that was never committed
        record = np.frombuffer(encode(state, after.slots, ledger), np.uint8)
        ledger.commit[:, : len(record)] = record
        ledger.extra[:, : len(state.extra)] = np.frombuffer(state.extra, np.uint8)
    return ledger
