"""Runs whose probes advance in lock-step: the numbers of one by one, stopped and resumed bitwise, 1 and 2 ranks."""

from __future__ import annotations

import contextlib
import itertools
import json
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from hpc_hess import placement
from hpc_hess.config import Config, load_config
from hpc_hess.errors import ConfigError
from hpc_hess.parallel.world import World
from hpc_hess.report import page
from hpc_hess.run import run
from hpc_hess.stopping import Stopper
from hpc_hess.storage.reader import read_store
from tests.spawn import run_ranks

ROOT = Path(__file__).parents[2]
NORMS = 'parameters.include=["*.0.input_layernorm.weight"]'


def toy(out: Path, *overrides: str) -> Config:
    """launch/configs/toy.toml, in double precision, with exact products and three probes."""
    values = [
        f"model.source={ROOT / 'launch/configs/toy_llama/config.json'}",
        f"data.source=tokens:{ROOT / 'launch/data/toy_tokens.npy'}",
        "data.sequences=2", "operator.method=exact", "lanczos.probes=3", "lanczos.steps=5",
        "parallel.device=cpu", f"run.out={out}",
    ]  # fmt: skip
    return load_config(ROOT / "launch/configs/toy.toml", [*values, *overrides])


def go(world: World, config: Config, stop_after: int | None = None, report: bool = False) -> int:
    """Run; with ``stop_after``, every rank asks for an end after so many steps. Figures take longer than the rest."""
    asked = itertools.count()

    def agreed(self: Stopper, next_step_s: float) -> str:
        return "the test asks" if stop_after is not None and next(asked) >= stop_after else ""

    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(Stopper, "agreed", agreed))
        if not report:
            patches.enter_context(mock.patch.object(page, "write_report", return_value=None))
        return run(config, world)


@pytest.fixture(scope="module", params=[1, 2])
def ranks(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="module")
def pairs(ranks: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in groups of two probes and one, with its report."""
    out = tmp_path_factory.mktemp("pairs") / "run"
    assert run_ranks(go, ranks, toy(out, "lanczos.lock_step=2"), None, True) == [0] * ranks
    return out


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


def test_lock_step_gives_the_numbers_of_one_by_one(ranks: int, pairs: Path, tmp_path: Path) -> None:
    assert run_ranks(go, ranks, toy(tmp_path, "lanczos.lock_step=1")) == [0] * ranks
    assert_close(pairs, tmp_path)
    steps = events(pairs, "step")
    # one line for each probe and step: probes 1 and 2 in turn, then probe 3
    order = [(probe, step, 2) for step in range(1, 6) for probe in (0, 1)] + [(2, step, 1) for step in range(1, 6)]
    assert [(e["probe"], e["step"], e["lock_step"]) for e in steps] == order
    assert [e["probe"] for e in events(pairs, "start")] == [0, 1, 2]
    timing = json.loads((pairs / "result.json").read_text())["timing"]
    assert (timing["products"], timing["lock_step"]) == (15, 2)
    for key in ("hvp_s", "lanczos_s", "checkpoint_s"):  # the mean of what the events say
        assert timing[key] == pytest.approx(sum(e[key] for e in steps) / 15)
    assert (pairs / "report.html").exists()
    with read_store(pairs) as store:
        assert (store.schema.width, store.state.group, store.state.complete(3)) == (2, range(2, 3), True)
        assert store.verify() == []


def test_a_group_that_was_stopped_goes_on_bitwise(ranks: int, pairs: Path, tmp_path: Path) -> None:
    """Stopped before the first step, in the middle, and in the next group; each time the config has another width."""
    for width, stop_after, end in ((2, 0, 75), (1, 3, 75), (3, 3, 75), (1, None, 0)):
        config = toy(tmp_path, f"lanczos.lock_step={width}")
        assert run_ranks(go, ranks, config, stop_after) == [end] * ranks
    assert coefficients(tmp_path) == coefficients(pairs)
    resumes = [(e["probe"], e["step"], e["lock_step"]) for e in events(tmp_path, "resume")]
    assert resumes == [(0, 0, 2), (0, 3, 2), (2, 1, 1)]


def test_a_group_with_a_ring_of_vectors_goes_on_bitwise(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    ring = ("lanczos.reorthogonalise=none", "lanczos.probes=2")
    assert run_ranks(go, 1, toy(whole, *ring)) == [0]
    for stop_after, end in ((4, 75), (None, 0)):
        assert run_ranks(go, 1, toy(broken, *ring), stop_after) == [end]
    assert coefficients(broken) == coefficients(whole)


def test_a_group_goes_on_on_another_number_of_ranks(ranks: int, pairs: Path, tmp_path: Path) -> None:
    for here, stop_after, end in ((3 - ranks, 2, 75), (ranks, 2, 75), (3 - ranks, None, 0)):
        assert run_ranks(go, here, toy(tmp_path, "lanczos.lock_step=2"), stop_after) == [end] * here
    assert_close(tmp_path, pairs)
    assert len(list(tmp_path.glob("krylov.ranks/*/*.h5"))) == 3 - ranks


def test_more_probes_go_on_in_wider_groups(tmp_path: Path) -> None:
    out, fresh = tmp_path / "run", tmp_path / "fresh"
    assert run_ranks(go, 1, toy(out, "lanczos.probes=1")) == [0]
    assert run_ranks(go, 1, toy(out, "lanczos.probes=4")) == [0]
    assert run_ranks(go, 1, toy(fresh, "lanczos.probes=4", "lanczos.lock_step=1")) == [0]
    assert_close(out, fresh)
    assert [e["lock_step"] for e in events(out, "step")] == [1] * 5 + [3] * 15


def test_probes_that_break_down(tmp_path: Path) -> None:
    """The Krylov space of a few parameters is exhausted before the steps are."""
    together, alone = tmp_path / "together", tmp_path / "alone"
    small = (NORMS, "lanczos.steps=60", "store.keep_basis=true")
    assert run_ranks(go, 1, toy(together, *small)) == [0]
    assert run_ranks(go, 1, toy(alone, *small, "lanczos.lock_step=1")) == [0]
    for (alpha, _), (other, _) in zip(coefficients(together), coefficients(alone), strict=True):
        assert len(alpha) == len(other) < 60
    one, other = (json.loads((p / "result.json").read_text()) for p in (together, alone))
    assert one["lambda_max"] == pytest.approx(other["lambda_max"], rel=1e-10)
    with read_store(together) as store:
        assert store.state.complete(3)
        assert store.verify() == []
        assert all(len(p.rows) == len(p.alpha) for p in store.probes)


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
    with mock.patch.object(placement, "host_bytes_free", return_value=room):
        with pytest.raises(ConfigError, match=r"3 probes x 5 rows .* lanczos\.lock_step = 1 or .* would fit"):
            go(world, toy(folder / "explicit", "lanczos.lock_step=3"))
        assert not (folder / "explicit" / "krylov.h5").exists()
        assert go(world, toy(folder / "auto"), 2) == 75
        with read_store(folder / "auto") as store:
            assert (store.schema.width, store.state.width) == (2, 2)
    generations = [p.name for p in (folder / "auto").glob("krylov.ranks/*")]
    assert go(world, toy(folder / "auto")) == 0  # there is more memory now, but that is no reason to rebuild the store
    assert [p.name for p in (folder / "auto").glob("krylov.ranks/*")] == generations
    with read_store(folder / "auto") as store:
        assert (store.schema.width, store.state.complete(3)) == (2, True)
