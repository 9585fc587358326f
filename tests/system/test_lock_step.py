"""Runs whose probes advance in lock-step: the numbers of one by one, stopped and resumed bitwise, 1 and 2 ranks."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from hpc_hess.commands.run.work import run
from hpc_hess.config import Config, load_config
from hpc_hess.errors import ConfigError
from hpc_hess.linalg.lanczos import Lanczos
from hpc_hess.parallel import memory
from hpc_hess.parallel.vector import Vector
from hpc_hess.parallel.world import World
from hpc_hess.session.stopping import Stopper
from hpc_hess.storage.reader import read_store
from hpc_hess.studies import run_page as page
from hpc_hess.studies.quadrature import loop
from tests.support.spawn import run_ranks

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
RANKS = pytest.mark.parametrize("ranks", [1, 2])


def toy(out: Path, *overrides: str) -> Config:
    """launch/configs/toy.toml, in double precision, with exact products and three probes."""
    values = [
        f"model.source={ROOT / 'launch/configs/toy_llama/config.json'}",
        f"data.source=tokens:{ROOT / 'launch/data/toy_tokens.npy'}",
        "data.sequences=2",
        "operator.method=exact",
        "lanczos.probes=3",
        "lanczos.steps=5",
        "parallel.device=cpu",
        f"run.out={out}",
    ]
    return load_config(ROOT / "launch/configs/toy.toml", [*values, *overrides])


def go(world: World, config: Config, stop_after: int | None = None, report: bool = False, breaks: bool = False) -> int:
    """Run; with ``stop_after``, every rank asks for an end after so many steps. Figures take longer than the rest.

    With ``breaks``, the Krylov space of the second probe is exhausted after two steps.
    """
    asked, begun = itertools.count(), itertools.count()

    def agreed(self: Stopper, next_step_s: float) -> str:
        return "the test asks" if stop_after is not None and next(asked) >= stop_after else ""

    class Fragile(Lanczos):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.number = next(begun)

        def advance(self, w: Vector) -> None:
            super().advance(w)
            self.broke_down = breaks and self.number == 1 and self.step_count == 2

    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(Stopper, "agreed", agreed))
        patches.enter_context(mock.patch.object(loop, "Lanczos", Fragile))
        if not report:
            patches.enter_context(mock.patch.object(page, "write_report", return_value=None))
        return run(config, world)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """A run on so many ranks in groups of two probes and one, with its report."""

    @functools.cache
    def directory(ranks: int) -> Path:
        out = tmp_path_factory.mktemp("pairs") / "run"
        assert run_ranks(go, ranks, toy(out, "lanczos.lock_step=2"), None, True) == [0] * ranks
        return out

    return directory


def coefficients(out: Path) -> list[tuple[list[float], list[float]]]:
    return [(p["alpha"], p["beta"]) for p in json.loads((out / "result.json").read_text())["probes"]]


def events(out: Path, name: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == name]


def assert_close(found: Path, expected: Path) -> None:
    """Within 1e-12, relative to the largest coefficient."""
    for one, other in zip(coefficients(found), coefficients(expected), strict=True):
        scale = max(map(abs, itertools.chain(*other)))
        for a, b in zip(one, other, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12 * scale)


@RANKS
def test_lock_step_gives_the_numbers_of_one_by_one(ranks: int, pairs: Callable[[int], Path], tmp_path: Path) -> None:
    assert run_ranks(go, ranks, toy(tmp_path, "lanczos.lock_step=1")) == [0] * ranks
    out = pairs(ranks)
    assert_close(out, tmp_path)
    steps = events(out, "step")
    # one line for each probe and step: probes 1 and 2 in turn, then probe 3
    order = [(probe, step, 2) for step in range(1, 6) for probe in (0, 1)] + [(2, step, 1) for step in range(1, 6)]
    assert [(e["probe"], e["step"], e["lock_step"]) for e in steps] == order
    assert [e["probe"] for e in events(out, "start")] == [0, 1, 2]
    timing = json.loads((out / "result.json").read_text())["timing"]
    assert (timing["products"], timing["lock_step"]) == (15, 2)
    for key in ("hvp_s", "lanczos_s", "checkpoint_s"):  # the mean of what the events say
        assert timing[key] == pytest.approx(sum(e[key] for e in steps) / 15)
    assert (out / "report.html").exists()
    with read_store(out) as store:
        assert (store.schema.width, store.state.group, store.state.complete(3)) == (2, range(2, 3), True)
        assert store.verify() == []


@RANKS
def test_a_group_that_was_stopped_goes_on_bitwise(ranks: int, pairs: Callable[[int], Path], tmp_path: Path) -> None:
    """Stopped before the first step, in the middle, and in the next group; each time the config has another width."""
    for width, stop_after, end in ((2, 0, 75), (1, 3, 75), (3, 3, 75), (1, None, 0)):
        config = toy(tmp_path, f"lanczos.lock_step={width}")
        assert run_ranks(go, ranks, config, stop_after) == [end] * ranks
    assert coefficients(tmp_path) == coefficients(pairs(ranks))
    resumes = [(e["probe"], e["step"], e["lock_step"]) for e in events(tmp_path, "resume")]
    assert resumes == [(0, 0, 2), (0, 3, 2), (2, 1, 1)]


def test_a_group_with_a_ring_of_vectors_goes_on_bitwise(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    ring = ("lanczos.reorthogonalise=none", "lanczos.probes=2")
    assert run_ranks(go, 1, toy(whole, *ring)) == [0]
    for stop_after, end in ((4, 75), (None, 0)):
        assert run_ranks(go, 1, toy(broken, *ring), stop_after) == [end]
    assert coefficients(broken) == coefficients(whole)


def test_a_group_goes_on_on_another_number_of_ranks(pairs: Callable[[int], Path], tmp_path: Path) -> None:
    for ranks, stop_after, end in ((2, 2, 75), (1, 2, 75), (2, None, 0)):
        assert run_ranks(go, ranks, toy(tmp_path, "lanczos.lock_step=2"), stop_after) == [end] * ranks
    assert_close(tmp_path, pairs(1))
    assert len(list(tmp_path.glob("krylov.ranks/*/*.h5"))) == 2


def test_more_probes_go_on_in_a_group(pairs: Callable[[int], Path], tmp_path: Path) -> None:
    assert run_ranks(go, 1, toy(tmp_path, "lanczos.probes=1")) == [0]
    assert run_ranks(go, 1, toy(tmp_path)) == [0]
    assert_close(tmp_path, pairs(1))
    assert [e["lock_step"] for e in events(tmp_path, "step")] == [1] * 5 + [2] * 10


def test_a_probe_that_breaks_down_stays_while_the_others_go_on(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run_ranks(go, 1, toy(whole, "store.keep_basis=true"), None, True, True) == [0]
    for stop_after, end in ((2, 75), (1, 75), (None, 0)):
        assert run_ranks(go, 1, toy(broken), stop_after, False, True) == [end]
    found = coefficients(broken)
    assert found == coefficients(whole)
    assert [len(alpha) for alpha, _ in found] == [5, 2, 5]
    assert [e["lock_step"] for e in events(broken, "step")] == [3] * 6 + [2] * 6
    assert json.loads((broken / "result.json").read_text())["timing"]["products"] == 12
    with read_store(whole) as store:
        assert store.verify() == []
        assert [len(probe.rows) for probe in store.probes] == [5, 2, 5]


def test_auto_takes_what_operator_and_memory_allow(tmp_path: Path) -> None:
    differences = ("operator.method=finite_difference", "operator.check=false", "lanczos.steps=2")
    assert run_ranks(go, 1, toy(tmp_path / "differences", *differences)) == [0]
    assert run_ranks(go, 1, toy(tmp_path / "exact", "lanczos.probes=5", "lanczos.steps=2")) == [0]
    found = {}
    for name in ("differences", "exact"):
        with read_store(tmp_path / name) as store:
            found[name] = store.schema.width
    assert found == {"differences": 1, "exact": 4}
    run_ranks(go_with_little_memory, 1, tmp_path)


def go_with_little_memory(world: World, folder: Path) -> None:
    """There is room for two probes of five rows and what a product needs besides."""
    room = (4 + 1 + 2 * 5) * 26_784 * 8
    with (
        mock.patch.object(memory, "host_bytes_free", return_value=room),
        mock.patch("hpc_hess.studies.opening.exact_product_bytes", return_value=0),
    ):
        with pytest.raises(ConfigError, match=r"3 probes x 5 rows .* lanczos\.lock_step = 1 or .* would fit"):
            go(world, toy(folder / "explicit", "lanczos.lock_step=3"))
        assert not (folder / "explicit" / "krylov.h5").exists()
        assert go(world, toy(folder / "auto"), 2) == 75
        with read_store(folder / "auto") as store:
            assert (store.schema.width, store.state.width) == (2, 2)
    assert go(world, toy(folder / "auto")) == 0  # there is more memory now, but that is no reason to start with four
    with read_store(folder / "auto") as store:
        assert (store.schema.width, store.state.complete(3)) == (2, True)
