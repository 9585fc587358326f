"""Do something on some ranks, agree on whether it worked, act together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from hpc_hess.errors import CollectiveError, HpcHessError
from hpc_hess.storage.disk import explain

if TYPE_CHECKING:
    from hpc_hess.parallel.world import World  # imports torch, which inspecting a run does not need


@contextlib.contextmanager
def attempt(world: World, path: Path, doing: str, *, meet: bool = False, of: type[Exception] = Exception) -> Iterator[None]:
    """Run a block; if it fails on some rank, every rank raises StoreError with that rank's reason. Collective: yes.

    The block may hold HDF5's own collectives only where a failure before them cannot keep a rank from them. Success
    costs one reduction of one number. ``meet``: see :func:`met`. ``of``: the errors that are the disk's; others pass.
    """
    error: HpcHessError | None = None
    try:
        with met(world, doing) if meet else world.doing(doing):
            yield
    except CollectiveError:
        raise
    except (HpcHessError, of) as caught:
        error = explained(caught, path, doing)
    if not world.all_true(error is None, doing):
        world.raise_together(error, doing)


@contextlib.contextmanager
def met(world: World, doing: str) -> Iterator[None]:
    """Run a block with collectives of MPI once every rank is there: they know no timeout. Collective: yes."""
    world.barrier(doing)
    with world.doing(doing, gil_held=True):
        yield


def explained(error: Exception, path: Path, doing: str) -> HpcHessError:
    """Return ``error`` as one sentence for the user: h5py and HDF5 raise nearly everything."""
    if isinstance(error, HpcHessError):
        return error
    sentence = explain(error, path, doing)
    sentence.__cause__ = error
    return sentence
