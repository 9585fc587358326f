"""Products that are stopped and taken up between two micro-batches: the same bits as an unbroken run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import h5py
import numpy as np
import pytest

from hpc_hess.config import Config, make_config
from hpc_hess.errors import ConfigError
from hpc_hess.parallel.world import World
from hpc_hess.session.partial_products import FOLDER, ProductWatch
from hpc_hess.storage.events import read_events
from hpc_hess.storage.reader import read_store
from tests.support.runs import go
from tests.support.spawn import run_ranks

pytestmark = pytest.mark.slow


def settings(toy: Path, out: Path, *overrides: str) -> Config:
    """Three steps over five micro-batches, kept at every second one; a signal gives no time."""
    values = {
        "model": {"source": str(toy / "model")},
        "data": {"source": f"tokens:{toy / 'tokens.npy'}", "sequence_length": 12, "sequences": 5},
        "lanczos": {"steps": 3},
        "store": {"checkpoint_every": 2, "keep_basis": True},
        "operator": {"check": False},
        "run": {"out": str(out), "grace_s": 0.0, "report": False},
    }
    return make_config(values, list(overrides))


def numbers(out: Path) -> list[Any]:
    """Return alpha, beta and the basis, as bytes."""
    with read_store(out) as view:
        assert view.verify() == []
        return [[p.alpha.tobytes(), p.beta.tobytes(), *(p.basis[row].tobytes() for row in p.rows)] for p in view.probes]


PRODUCTS = {
    "central": [],
    "forward": ["operator.scheme=forward"],
    "fourth": ["operator.scheme=fourth"],
    "one step for all": ["operator.step=1e-2"],
    "perplexity": ["operator.kind=perplexity"],
    "every micro-batch": ["store.checkpoint_every=1"],
    "exact": ["operator.method=exact"],
    "exact, in lock-step": ["operator.method=exact", "lanczos.probes=2"],
    "gauss_newton": ["operator.method=exact", "operator.kind=gauss_newton"],
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_stopped_anywhere_and_resumed_is_bitwise_the_same(world: World, toy: Path, tmp_path: Path, name: str) -> None:
    """Each run gets a few micro-batches further, less than a product, and none computes much twice."""
    whole = settings(toy, tmp_path / "whole", *PRODUCTS[name])
    code, needed = go(world, whole)
    assert code == 0
    assert not (tmp_path / "whole" / FOLDER).exists()
    broken = settings(toy, tmp_path / "broken", *PRODUCTS[name])
    config, spent, runs, base = broken, 0, 0, 5
    code = 75
    while code == 75:
        again = base if name in ("forward", "perplexity") or not runs else 0  # the gradient at theta_0
        code, added = go(world, config, again + (2, 3, 4)[runs % 3])
        spent, runs = spent + added - (again if runs else 0), runs + 1
        assert runs < 100
    assert code == 0
    assert runs > 4
    assert spent == needed  # a signal keeps what there is: nothing was summed twice
    assert numbers(tmp_path / "broken") == numbers(tmp_path / "whole")
    assert not (tmp_path / "broken" / FOLDER).exists()


def on_two_ranks(world: World, config: Config, stops: list[int | None]) -> list[int]:
    return [go(world, config, at if world.rank else None)[0] for at in stops]


@pytest.mark.parametrize(("method", "stops"), [("finite_difference", [12, 8, None]), ("exact", [7, 4, None])])
def test_a_signal_to_one_rank_stops_both(toy: Path, tmp_path: Path, method: str, stops: list[int | None]) -> None:
    changes = ["data.sequences=9", f"operator.method={method}"]  # five micro-batches each, a dummy among them
    codes = run_ranks(on_two_ranks, 2, settings(toy, tmp_path / "broken", *changes), stops)
    assert codes == [[75, 75, 0]] * 2
    assert run_ranks(on_two_ranks, 2, settings(toy, tmp_path / "whole", *changes), [None]) == [[0]] * 2
    assert numbers(tmp_path / "broken") == numbers(tmp_path / "whole")


def test_what_other_ranks_summed_is_not_taken_up(world: World, toy: Path, tmp_path: Path) -> None:
    config = settings(toy, tmp_path / "run", "model.master_dtype=float64", "model.compute_dtype=float64")
    assert go(world, config, 12)[0] == 75
    assert run_ranks(on_two_ranks, 2, config, [None]) == [[0]] * 2
    whole = settings(toy, tmp_path / "whole", "model.master_dtype=float64", "model.compute_dtype=float64")
    assert go(world, whole)[0] == 0
    for (a, b, *_), (c, d, *_) in zip(numbers(tmp_path / "run"), numbers(tmp_path / "whole"), strict=True):
        for mine, other in ((a, c), (b, d)):
            np.testing.assert_allclose(np.frombuffer(mine), np.frombuffer(other), rtol=1e-8)


def test_a_damaged_part_is_computed_again(world: World, toy: Path, tmp_path: Path) -> None:
    config = settings(toy, tmp_path / "run")
    assert go(world, config, 8)[0] == 75  # a part of the first gradient of the calibration
    (file,) = (tmp_path / "run" / FOLDER).rglob("rank-*.h5")
    with h5py.File(file, "r+") as store:
        store["basis/0"][...] = 1.0
    assert go(world, config)[0] == 0
    assert go(world, settings(toy, tmp_path / "whole"))[0] == 0
    assert numbers(tmp_path / "run") == numbers(tmp_path / "whole")


def test_the_gradient_at_theta_0_is_not_computed_again(world: World, toy: Path, tmp_path: Path) -> None:
    config = settings(toy, tmp_path / "run")
    assert [go(world, config, 45)[0], go(world, config)[0]] == [75, 0]
    events = [event["event"] for event in read_events(tmp_path / "run")]
    assert events.count("gradient") == 1
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["gradient_norm"] > 0
    assert result["timing"]["gradient_s"] > 0


def test_a_signal_before_the_first_step(world: World, toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = settings(toy, tmp_path / "run")
    assert go(world, config, 2)[0] == 75  # in the gradient at theta_0
    assert "stopped early before the first step: a signal asked for it" in capsys.readouterr().out
    assert go(world, config)[0] == 0


def test_without_checkpoints_a_product_is_given_up(world: World, toy: Path, tmp_path: Path) -> None:
    config = settings(toy, tmp_path / "run", "store.checkpoint_every=0")
    assert go(world, config, 45)[0] == 75
    with read_store(tmp_path / "run") as view:
        steps = view.state.step
    assert go(world, config)[0] == 0
    assert steps < 3
    assert go(world, settings(toy, tmp_path / "whole"))[0] == 0
    assert numbers(tmp_path / "run") == numbers(tmp_path / "whole")


def test_a_signal_with_time_lets_the_step_end(world: World, toy: Path, tmp_path: Path) -> None:
    """As before a signal came: the second step's length is known, and fits."""
    config = settings(toy, tmp_path / "run", "run.grace_s=600", "store.checkpoint_every=0", "operator.step=1e-2")
    code, added = go(world, config, 5 + 10 + 3)
    assert (code, added) == (75, 5 + 10 + 10)
    with read_store(tmp_path / "run") as view:
        assert view.state.step == 2


def test_a_product_that_is_late_counts_as_one_that_begins() -> None:
    """Nobody knows how late it will be: with time for a whole step left, it is not given up."""
    stopper = mock.Mock()
    stopper.agreed_within.return_value = ""
    watch = ProductWatch(stopper)
    for usual_s, low, high in ((0.0, None, None), (1e-9, 1e-9, 1e-9), (100.0, 90.0, 100.0)):
        watch.begin_product([], mock.Mock(), usual_s, lambda: None)
        watch.begin([], 2)
        watch.added(0, [])
        remaining_s = stopper.agreed_within.call_args.args[0]
        assert remaining_s == low if low is None else low <= remaining_s <= high


def test_replicas_of_exact_products_are_refused(toy: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"store\.checkpoint_every needs parallel\.replicate = 1"):
        settings(toy, tmp_path, "operator.method=exact", "parallel.replicate=2")
