"""Ranks that go through the same collectives one after the other, and end together when one of them fails between two."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from hpc_hess.errors import CollectiveError, ConfigError, HpcHessError
from hpc_hess.parallel.world import World

Agree = Callable[[object], None]


@contextlib.contextmanager
def in_step(world: World, name: str, on_divergence: HpcHessError) -> Iterator[Agree]:
    """Run a block that holds collectives; yields agree(what), to be called before each of them. Collective: yes.

    Where a rank raises an HpcHessError, the others meet it at their next agree(), or at the block's end, instead of
    waiting in a collective for a rank that will not come: the block raises that error on every rank. Ranks that are
    about to do different things (``what``, picklable, differs) all raise ``on_divergence``.
    """
    over = False

    def agree(what: object, error: HpcHessError | None = None) -> None:
        nonlocal over
        everyone = world.gather((what, None if error is None else (type(error), str(error))), name)
        failed = {rank: found for rank, (_, found) in enumerate(everyone) if found is not None}
        over = bool(failed) or any(other != what for other, _ in everyone)
        if failed:
            rank, (kind, text) = min(failed.items())
            raise error if error is not None and rank == world.rank else kind(text)
        if over:
            raise on_divergence

    try:
        yield agree
    except CollectiveError:  # the others are not there to agree with
        raise
    except HpcHessError as error:
        if over:
            raise
        agree(None, error)
    else:
        agree("the end")


def alike(world: World, call: str, given: dict[str, str]) -> None:
    """Refuse a call that the ranks do not make alike. ``given``: its arguments by name, in words. Collective: yes.

    Raises
    ------
    ConfigError : on every rank; names the first argument that differs, and the first two ranks that differ in it.

    """
    everyone = world.gather((call, given), call)
    for rank, (other, theirs) in enumerate(everyone):
        first, ours = everyone[0]
        if other != first:
            raise ConfigError(f"the ranks call different functions: {first} on rank 0, {other} on rank {rank}")
        for name in sorted(ours.keys() | theirs.keys()):
            if ours.get(name) != theirs.get(name):
                raise ConfigError(
                    f"the ranks call {call} with different arguments: {name} is {ours.get(name, 'not given')} on rank 0 and "
                    f"{theirs.get(name, 'not given')} on rank {rank}"
                )
