"""A study's Keep over a store, and the operator whose products it follows."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from hpc_hess.errors import ConfigError
from hpc_hess.parallel.vector import Vector, VectorSpace
from hpc_hess.session.stopping import InterruptedProductError
from hpc_hess.storage.journal import Member
from hpc_hess.storage.store import Store
from hpc_hess.studies.quadrature.loop import Loop

EXTRA_BYTES = 1 << 24  # room for the numbers of all pieces


class Kept:
    """Pieces of a study: numbers in the state of its store's commits, vectors in its rows.

    A piece is [depth, numbers] or [depth, rows]; those made within another piece lie one deeper, behind each other, until
    that one is whole and takes their place. Satisfies linalg.keeping.Keep. Vectors are of ``space``, the loop's by default.
    """

    def __init__(self, name: str, loop: Loop, store: Store, space: VectorSpace | None = None) -> None:
        self.operator = _Followed(name, loop, self)
        self._loop, self._store, self._space = loop, store, space or loop.space
        self._pieces: list[list[Any]] = []
        self._next, self._depth = 0, 0
        if store.state.extra:
            kept = json.loads(store.state.extra)
            self._pieces = kept["pieces"]
            loop.ready().from_state(kept["operator"])
            loop.progress.note(f"going on with the study '{name}' after {kept['products']} products")
            self.operator.num_products = kept["products"]

    @property
    def position(self) -> list[int]:
        """What tells one piece from all others."""
        return [self._next, self._depth]

    def numbers(self, make: Callable[[], Sequence[float]]) -> list[float]:
        """As linalg.keeping.Keep. Collective: yes. Raises InterruptedProductError: between two products, stop now."""
        if (found := self._found()) is not None:
            return list(found)
        first = self._next
        self._depth += 1
        values = [float(x) for x in make()]
        self._depth -= 1
        values = self._loop.world.broadcast(values, "numbers of a study")
        del self._pieces[first:]
        self._append(values)
        return list(values)

    def vector(self, make: Callable[[], Vector]) -> Vector:
        """As linalg.keeping.Keep. Collective: yes. Raises InterruptedProductError: between two products, stop now."""
        return self.vectors(lambda: [make()])[0]

    def vectors(self, make: Callable[[], Sequence[Vector]]) -> list[Vector]:
        """As linalg.keeping.Keep. Collective: yes. Raises InterruptedProductError: between two products, stop now."""
        space = self._space
        if (found := self._found()) is not None:
            return [space.wrap(torch.from_numpy(self._store.read_row(0, row)).to(space.device)) for row in found["rows"]]
        first = self._next
        self._depth += 1
        vectors = list(make())
        self._depth -= 1
        del self._pieces[first:]
        taken = {*self._rows(), *self._store.state.rows_of(0)}
        rows = [row for row in range(self._store.schema.rows) if row not in taken][: len(vectors)]
        for row, vector in zip(rows, vectors, strict=True):
            self._store.write_row(0, row, vector.data.cpu().numpy())
        self._append({"rows": rows})
        return vectors

    def _found(self) -> Any:
        """Return the piece that comes next if it is whole."""
        if self._next < len(self._pieces) and self._pieces[self._next][0] == self._depth:
            self._next += 1
            return self._pieces[self._next - 1][1]
        return None

    def _append(self, value: Any) -> None:
        self._pieces.append([self._depth, value])
        self._next = len(self._pieces)
        state = {"pieces": self._pieces, "operator": self._loop.operator.to_state(), "products": self.operator.num_products}
        extra, nothing = json.dumps(state).encode(), np.empty(0)
        if len(extra) > EXTRA_BYTES:
            raise ConfigError(
                f"the study keeps more numbers than its store has room for ({EXTRA_BYTES >> 20} MiB): ask for fewer entries"
            )
        self._store.commit(0, [Member(nothing, nothing, rows=self._rows())], extra)

    def _rows(self) -> list[int]:
        return sorted(row for _, value in self._pieces if isinstance(value, dict) for row in value["rows"])


class _Followed:
    """The run's operator as a study sees it: its products are shown, written down, and given up in time."""

    def __init__(self, name: str, loop: Loop, keep: Kept) -> None:
        self.space, self.num_products = loop.space, 0
        self._name, self._loop, self._keep = name, loop, keep
        self._slowest_s = 0.0

    def matvec(self, v: Vector) -> Vector:
        """Return A v. Collective: yes. Raises InterruptedProductError."""
        return self.matmat([v])[0]

    def matmat(self, vectors: Sequence[Vector]) -> list[Vector]:
        """Return A v of several v, as many at a time as can be kept within. Collective: yes. Raises as :meth:`matvec`."""
        most = self._loop.watch.directions or len(vectors)
        found: list[Vector] = []
        for first in range(0, len(vectors), most):
            found += self._multiply(vectors[first : first + most])
        return found

    def _multiply(self, vectors: Sequence[Vector]) -> list[Vector]:
        loop, watch, began = self._loop, self._loop.watch, time.perf_counter()
        if reason := loop.stopper.agreed(self._slowest_s if watch.least_s is None else watch.least_s):
            raise InterruptedProductError(reason)
        key = [loop.store.schema.run_id, self._name, *self._keep.position, self.num_products]
        watch.begin_product(key, loop.operator, self._slowest_s, lambda: None)
        found = loop.operator.matmat(vectors)
        watch.end_product()
        seconds = loop.world.max_over_ranks(time.perf_counter() - began, "product time")
        self._slowest_s = max(self._slowest_s, seconds)
        self.num_products += len(vectors)
        loop.events.write(
            {"event": "study", "name": self._name, "product": self.num_products, "columns": len(vectors), "hvp_s": seconds}
        )
        loop.progress.status(f"{self._name.replace('_', ' ')}: product {self.num_products}")
        return found
