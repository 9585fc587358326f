"""The short form of benchmarks.soak: kills at random instants of whole runs, with both drivers."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.soak import soak
from tests.support.launching import LAUNCHERS, TOY

pytestmark = pytest.mark.slow

KILLS = 2  # for each launcher; benchmarks.soak has the hundred


@pytest.mark.timeout(1500)  # some twelve runs, beside other tests
@pytest.mark.parametrize("script", LAUNCHERS)
def test_killed_at_random_instants(script: str, tmp_path: Path) -> None:
    every = 0 if script == "torchrun.sh" else 2  # products in parts, too
    settings = [TOY, "lanczos.steps=12", "lanczos.probes=2", f"store.checkpoint_every={every}"]
    found = soak(script, settings, tmp_path, kills=KILLS, seed=1)
    assert found.kills == KILLS
    assert found.resumed + found.before_creation == KILLS
    assert found.lost_steps <= 1
    assert found.finished >= 1
    assert found.unequal == 0
