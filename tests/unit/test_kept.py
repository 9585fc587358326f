"""Pieces within pieces: what a study asks of its Keep is found again, whole pieces first, and rows are given back."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hpc_hess.errors import ConfigError
from hpc_hess.linalg.keeping import Keep
from hpc_hess.parallel.layout import Layout
from hpc_hess.parallel.vector import Vector, VectorSpace
from hpc_hess.parallel.world import World
from hpc_hess.storage.store import Store
from hpc_hess.studies.pieces import EXTRA_BYTES, Kept

SIZE = 5


class StopError(Exception):
    """The job ends here."""


class Work:
    """A study's pieces; counts those that are made, and stops after ``limit`` of them."""

    def __init__(self, space: VectorSpace, keep: Keep, limit: int = 1000) -> None:
        self.space, self.keep, self.limit, self.made = space, keep, limit, []  # type: ignore[var-annotated]

    def piece(self, name: str) -> None:
        if len(self.made) == self.limit:
            raise StopError
        self.made.append(name)

    def numbers(self, name: str, value: float) -> list[float]:
        def make() -> list[float]:
            self.piece(name)
            return [value, 2 * value]

        return self.keep.numbers(make)

    def vector(self, name: str, value: float) -> Vector:
        def make() -> Vector:
            self.piece(name)
            return self.space.wrap(torch.full((SIZE,), value, dtype=torch.float64))

        return self.keep.vector(make)

    def run(self) -> list[float]:
        found = self.numbers("a", 1.0)

        def outer() -> list[float]:
            v = self.vector("b", 3.0)
            inner = self.numbers("c", 4.0)
            w = self.vector("d", 5.0).axpy_(1.0, v)  # what was kept may be changed
            return [w.dot(v), *inner]

        for _ in range(2):
            found += self.keep.numbers(outer)
        found.append(self.vector("e", 7.0).norm())
        return found


@pytest.fixture
def space() -> VectorSpace:
    return VectorSpace(World.alone(), Layout({"a": (SIZE,)}), torch.float64)


def opened(space: VectorSpace, path: Path, rows: int = 3) -> tuple[Kept, Store]:
    place: dict[str, Any] = {"layout": space.layout, "shard": space.shard, "world": space.world}
    if (path / "krylov.h5").exists():
        store = Store.open(path, **place)
    else:
        store = Store.create(
            path,
            **place,
            probes=1,
            steps=1,
            rows=rows,
            attributes={},
            keep_basis=True,
            dtype=space.dtype,
            extra_bytes=EXTRA_BYTES,
        )
    operator = SimpleNamespace(to_state=dict, from_state=lambda state: None)
    loop: Any = SimpleNamespace(
        space=space,
        world=space.world,
        operator=operator,
        ready=lambda: operator,
        progress=SimpleNamespace(note=lambda text: None),
    )
    return Kept("study", loop, store), store


EXPECTED = [1.0, 2.0, *[8.0 * 3 * SIZE, 4.0, 8.0] * 2, 7 * SIZE**0.5]


def test_stopped_after_every_piece(space: VectorSpace, tmp_path: Path) -> None:
    """Each start makes one piece more, none twice, though three rows are all there is."""
    made: list[str] = []
    for _ in range(100):
        keep, store = opened(space, tmp_path / "run")
        work = Work(space, keep, limit=1)
        try:
            found = work.run()
            break
        except StopError:
            pass
        finally:
            made += work.made
            store.close()
    assert found == EXPECTED
    assert made == ["a", *"bcd", *"bcd", "e"]


def test_an_inner_piece_is_forgotten_with_its_row(space: VectorSpace, tmp_path: Path) -> None:
    keep, store = opened(space, tmp_path / "run")
    assert Work(space, keep).run() == EXPECTED
    assert len(store.state.rows_of(0)) == 1  # of "e"
    assert [depth for depth, _ in json.loads(store.state.extra)["pieces"]] == [0, 0, 0, 0]
    store.close()
    again, store = opened(space, tmp_path / "run")
    work = Work(space, again, limit=0)
    assert work.run() == EXPECTED
    store.close()


def test_more_numbers_than_there_is_room_for(space: VectorSpace, tmp_path: Path) -> None:
    keep, store = opened(space, tmp_path / "run")
    with pytest.raises(ConfigError, match="16 MiB.: ask for fewer entries"):
        keep.numbers(lambda: np.random.default_rng(0).standard_normal(1_000_000).tolist())
    store.close()
