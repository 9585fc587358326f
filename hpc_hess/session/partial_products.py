"""What happens within a product: its sums are kept in a store of their own now and then, or it is given up in time.

A product is a sequence of evaluations, each a sum over micro-batches: of gradients, or of an exact product's tangents.
A checkpoint holds the evaluations that are whole and the one on its way. A resumed product goes through the same
evaluations again; those that are held are read instead of computed.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpc_hess.config import Config
from hpc_hess.errors import StoreError
from hpc_hess.parallel.vector import VectorSpace
from hpc_hess.parallel.world import World
from hpc_hess.session.operators import CurvatureOperator
from hpc_hess.session.stopping import InterruptedProductError, Stopper
from hpc_hess.storage.agree import attempt
from hpc_hess.storage.commit import newest
from hpc_hess.storage.disk import remove
from hpc_hess.storage.journal import Member
from hpc_hess.storage.schema import FILE, read_header
from hpc_hess.storage.store import Store

FOLDER = "product"  # in the run directory
_CALIBRATION_ROWS, _PARTIAL_ROWS = 4, 2  # whole gradients of one round of a calibration; an old and a new partial sum
_WHOLE_ROWS = {"forward": 0, "central": 1, "fourth": 3}  # gradients that a product holds when its last one begins
_MARGIN_S = 2.0


class ProductWatch:
    """Follows the products of a run; see model.sharded.accumulation.Watch.

    Parameters
    ----------
    store : where sums are kept, or None.
    every : micro-batches between two checkpoints.
    directions : how many vectors may be multiplied at a time, so that the store has room for their sums.

    """

    def __init__(self, stopper: Stopper, store: Store | None = None, every: int = 0, directions: int = 1) -> None:
        self._stopper, self._store, self._every = stopper, store, every
        self.directions = directions if store is not None else None
        self._operator: CurvatureOperator | None = None  # of the product on its way
        self._before_save: Callable[[], object] | None = None
        self._state: dict[str, Any] = {}
        self._evaluation, self._count = 0, 0
        self._began_s, self._usual_s = 0.0, 0.0  # the product's beginning, how long a step takes (0: nobody knows)
        self._mark_s = 0.0  # the end of the last micro-batch
        self._slowest_s, self._save_s = 0.0, 0.0  # a micro-batch, a checkpoint
        self.resumed = 0  # micro-batches that the last product found summed
        self.kept = False  # whether a product was given up with what it had summed on disk

    @property
    def least_s(self) -> float | None:
        """Seconds in which a product gets somewhere though it does not end; None without checkpoints."""
        return None if self._store is None else self._every * self._slowest_s + self._save_s + _MARGIN_S

    # -- the product ---------------------------------------------------------------------------------------------

    def begin_product(
        self, key: list[Any], operator: CurvatureOperator, usual_s: float, before_save: Callable[[], object]
    ) -> None:
        """Follow the product ``key``: JSON-able, the same only for the same product of the same run.

        Parameters
        ----------
        usual_s : what a step usually takes; 0 if nobody knows.
        before_save : called before the first checkpoint: to commit what the product is computed from.

        """
        self._operator, self._before_save = operator, before_save
        self._began_s, self._usual_s = time.monotonic(), usual_s
        self._evaluation, self.resumed = 0, 0
        self._state = {"key": key, "operator": operator.to_state(), "whole": [], "partial": None}
        if self._store is not None and self._store.state.extra:
            kept = json.loads(self._store.state.extra)
            if kept["key"] == key:
                self._state = kept
                operator.from_state(kept["operator"])

    def end_product(self) -> None:
        """Follow no longer: what is evaluated from now on is not kept."""
        self._operator = None

    # -- Watch ---------------------------------------------------------------------------------------------------

    def begin(self, sums: list[torch.Tensor], count: int) -> int:
        """Return the first micro-batch to add, with the sums of those before it. Collective: yes."""
        self._count, self._mark_s = count, time.monotonic()
        if self._operator is None:
            return 0
        whole, partial = self._state["whole"], self._state["partial"]
        if self._evaluation < len(whole):
            rows, first = whole[self._evaluation], count
        elif partial is not None:
            rows, first = partial["rows"], partial["next"]
        else:
            return 0
        assert self._store is not None
        try:
            for row, data in zip(rows, sums, strict=True):
                data.copy_(torch.from_numpy(self._store.read_row(0, row)))
        except StoreError:  # damaged, as every rank sees: this evaluation and what came after it are computed again
            self._state |= {"whole": whole[: self._evaluation], "partial": None}
            for data in sums:
                data.zero_()
            return 0
        if first == count:
            self._evaluation += 1
        self.resumed += first
        return first

    def added(self, index: int, sums: list[torch.Tensor], *, more: bool = True) -> None:
        """Keep the sums if it is time to, and stop if it is time to. Collective: yes. Raises InterruptedProductError."""
        self._slowest_s = max(self._slowest_s, time.monotonic() - self._mark_s)
        keeping = self._store is not None and self._operator is not None
        last = index + 1 == self._count
        due = keeping and (more if last else (index + 1) % self._every == 0)
        if due:
            self._save(sums, index + 1)
        if last:
            self._evaluation += 1
            if not more:
                return
        reason = self._stopper.agreed_within(self._remaining_s(), self._slowest_s + self._save_s + _MARGIN_S)
        if reason:
            if keeping and not due:
                self._save(sums, index + 1)
            self.kept = keeping
            raise InterruptedProductError(reason)
        self._mark_s = time.monotonic()

    def _remaining_s(self) -> float | None:
        """Return the seconds until the step is committed; None if nobody knows."""
        if not self._usual_s:
            return None
        left_s = self._began_s + self._usual_s - time.monotonic()
        return left_s if left_s > 0 else self._usual_s  # late by an unknown time: as if it began now

    def milestone(self, state: dict[str, Any]) -> None:
        """Note that ``state``, of the operator, stands for all evaluations so far."""
        if self._operator is not None:
            self._state |= {"operator": state, "whole": [], "partial": None}
            self._evaluation = 0

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def _save(self, sums: list[torch.Tensor], stop: int) -> None:
        """Keep the sums of micro-batches before ``stop``: rows of the store, and one commit. Collective: yes."""
        began, store, state = time.monotonic(), self._store, self._state
        assert store is not None
        if self._before_save is not None:
            self._before_save()
            self._before_save = None
        wanted = {row for rows in state["whole"] for row in rows} | set((state["partial"] or {}).get("rows", []))
        if not wanted >= set(store.state.rows_of(0)):  # of another product, or from before a milestone
            self._commit(wanted)
        rows = [row for row in range(store.schema.rows) if row not in wanted][: len(sums)]
        for row, data in zip(rows, sums, strict=True):
            store.write_row(0, row, data.cpu().numpy())
        if stop == self._count:
            state |= {"whole": [*state["whole"], rows], "partial": None}
        else:
            state["partial"] = {"rows": rows, "next": stop}
        self._commit({row for whole in state["whole"] for row in whole} | {*rows})
        self._save_s = max(self._save_s, time.monotonic() - began)

    def _commit(self, rows: set[int]) -> None:
        assert self._store is not None
        nothing = np.empty(0)
        self._store.commit(0, [Member(nothing, nothing, rows=sorted(rows))], json.dumps(self._state).encode())


def open_product_store(
    config: Config, world: World, space: VectorSpace, out: Path, every: int, directions: int, *, shared: bool
) -> Store | None:
    """Open or create the store of the product in progress; with ``every`` 0 there is none. Collective: yes.

    What another number of ranks or another micro-batch has summed is of no use, and dropped.

    Parameters
    ----------
    directions, shared : how many vectors are multiplied at a time, and whether one pass over the data serves all.

    """
    folder = out / FOLDER
    if not every:
        remove_product_store(world, out)
        return None
    if config.operator.method == "exact":
        rows = 2 * directions if shared else directions - 1 + _PARTIAL_ROWS
    elif config.operator.step == "auto":
        rows = _CALIBRATION_ROWS + _PARTIAL_ROWS
    else:
        rows = _WHOLE_ROWS[config.operator.scheme] + _PARTIAL_ROWS
    bound_to = {"ranks": world.size, "replicas": world.num_replicas, "micro_batch": config.data.micro_batch}
    usable = False
    if world.rank == 0 and (folder / FILE).exists():
        with contextlib.suppress(StoreError):
            header = read_header(folder / FILE)
            newest(header.schema.slots, header.ledger, folder)
            usable = header.attributes == bound_to and header.schema.rows == rows
            usable &= header.schema.fingerprint == space.layout.fingerprint
    place: dict[str, Any] = {"layout": space.layout, "shard": space.shard, "world": world, "driver": config.store.driver}
    if world.broadcast(usable, "look for a product in progress"):
        return Store.open(folder, **place)
    return Store.create(
        folder, **place, probes=1, steps=1, rows=rows, dtype=space.dtype, attributes=bound_to, replace_existing=True
    )


def remove_product_store(world: World, out: Path) -> None:
    """Remove the store of the product in progress from the run directory ``out``, under its lock. Collective: yes."""
    with attempt(world, out, "remove the product in progress"):
        if world.rank == 0:
            remove(out / FOLDER)
