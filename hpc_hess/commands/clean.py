"""hpc-hess clean RUN: what a run directory holds on disk that nothing needs is named, then freed. One process.

Kept: numbers, reports, sketches, eigenvectors and the vectors of studies, what an unfinished run goes on from.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from hpc_hess.console.words import printable, size
from hpc_hess.errors import ConfigError
from hpc_hess.parallel.world import World
from hpc_hess.session.partial_products import FOLDER as PRODUCT
from hpc_hess.storage.disk import allocated, remove
from hpc_hess.storage.lock import RunLock
from hpc_hess.storage.schema import FILE
from hpc_hess.storage.space import Space
from hpc_hess.studies.base import FOLDER as STUDIES
from hpc_hess.studies.base import FOUND, PIECES
from hpc_hess.studies.eigenpairs.compute import FOLDER as EIGENPAIRS

_UNFINISHED = ("*.part", "*.part.npy", "*.h5.new")  # files that a job was writing aside when it was killed


class Item(NamedTuple):
    """``amount`` bytes on disk; ``free`` gives them back, None where they are kept."""

    amount: int
    what: str
    free: Callable[[], object] | None = None


def clean(run_dir: Path, *, dry: bool = False, basis: bool = False) -> int:
    """Print what can be freed and what is kept, and free it unless ``dry``; returns the exit code.

    Parameters
    ----------
    basis : also the basis that store.keep_basis = true has kept.

    Raises
    ------
    ConfigError : no such directory, or it is not of hpc_hess.
    StoreError : a job is using it; a store is damaged.

    """
    if not run_dir.is_dir():
        raise ConfigError(f"no such run directory: {run_dir}")
    if not any((run_dir / name).exists() for name in (FILE, "result.json", "config.toml")):
        raise ConfigError(f"{run_dir} is not a run directory: it holds neither config.toml nor {FILE}")
    lock = RunLock.acquire(run_dir, World.alone())
    try:
        items = [item for item in _items(run_dir, basis) if item.amount or item.free]
        before = allocated(run_dir)
        _print(f"{run_dir}: {size(before)} on disk")
        for title, some in (
            ("needed" if dry else "kept", [i for i in items if not i.free]),
            ("would be freed" if dry else "freed", [i for i in items if i.free]),
        ):
            for item in sorted(some, key=lambda i: -i.amount):
                _print(f"  {size(item.amount):>10}  {title}: {item.what}")
                if item.free and not dry:
                    item.free()
        if dry:
            total = sum(item.amount for item in items if item.free)
            _print(f"{size(total)} would be freed" if total else "there is nothing to free")
        else:
            _print(f"{size(max(0, before - allocated(run_dir)))} freed, {size(allocated(run_dir))} left")
    finally:
        lock.release()
    return 0


def _items(run_dir: Path, basis: bool) -> Iterator[Item]:
    unfinished = False
    if (run_dir / FILE).exists():
        main = Space(run_dir)
        unfinished = not main.state.finished
        yield from _of_run(main, basis)
    if (run_dir / PRODUCT).exists():
        free = None if unfinished else partial(remove, run_dir / PRODUCT)
        yield Item(allocated(run_dir / PRODUCT), f"sums of the product on its way ({PRODUCT}/)", free)
    if (run_dir / EIGENPAIRS / FILE).exists():
        yield from _of_vectors(Space(run_dir / EIGENPAIRS), EIGENPAIRS, "eigenvectors")
    studies = run_dir / STUDIES
    for folder in sorted(studies.iterdir()) if studies.is_dir() else ():
        for store in sorted(path.parent for path in folder.glob(f"*/{FILE}")):
            name = f"{STUDIES}/{folder.name}/{store.name}"
            if store.name == PIECES and (folder / FOUND).exists():
                yield Item(allocated(store), f"pieces of a study that has ended ({name}/)", partial(remove, store))
            else:
                what = "pieces of a study that has not ended" if store.name == PIECES else "vectors of a study"
                yield from _of_vectors(Space(store), name, what)
    for pattern in _UNFINISHED:
        for path in run_dir.rglob(pattern):
            yield Item(allocated(path), f"written aside by a job that was killed ({path.name})", partial(remove, path))


def _leftovers(space: Space, name: str) -> Iterator[Item]:
    for path in space.leftovers():
        yield Item(allocated(path), f"left by a job that was killed ({name}{path.name})", partial(remove, path))


def _of_run(space: Space, basis: bool) -> Iterator[Item]:
    """Yield what becomes of the Krylov basis of a run."""
    yield from _leftovers(space, "")
    if not space.state.finished:
        yield from _spare(space, FILE, "the rows that it goes on from")
    elif space.schema.keep_basis and not basis:
        yield Item(space.basis_bytes(), "the Krylov basis, by store.keep_basis = true (--basis frees it)")
    elif space.schema.rows:
        yield Item(space.basis_bytes(), "the Krylov basis of finished probes", space.free_basis)


def _of_vectors(space: Space, name: str, what: str) -> Iterator[Item]:
    yield from _leftovers(space, f"{name}/")
    yield from _spare(space, f"{name}/", what)


def _spare(space: Space, name: str, what: str) -> Iterator[Item]:
    yield Item(space.needed, f"{what} ({name})")
    if (count := space.spare_bytes()) > 1 << 16:
        yield Item(count, f"rows that hold nothing that is needed ({name})", space.free_spare)


def _print(text: str) -> None:
    with contextlib.suppress(BrokenPipeError):
        print(printable(text, sys.stdout), flush=True)
