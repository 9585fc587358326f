"""The search for the fewest nodes: right where the estimate is, and where it errs either way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from hpc_hess.config import Config
from hpc_hess.errors import ConfigError
from hpc_hess.planning import planner
from hpc_hess.planning.planner import Planner


@dataclass
class Pretended:
    """A plan that fits from ``needs`` nodes on, whose estimate is ``needs`` times ``errs``."""

    nodes: int
    needs: int
    errs: float

    @property
    def fits(self) -> bool:
        return self.nodes >= self.needs


@pytest.mark.parametrize("needs", [1, 2, 5, 17, 300])
@pytest.mark.parametrize("errs", [1.0, 0.1, 0.5, 0.9, 1.3, 4.0])
@pytest.mark.parametrize("start", [1, 8, 512])
def test_the_fewest_nodes_are_found(monkeypatch: pytest.MonkeyPatch, needs: int, errs: float, start: int) -> None:
    tried: list[int] = []

    def plan(self: Planner, nodes: int, config: Config | None = None) -> Any:
        assert nodes not in tried, "a trace costs most of a minute"
        tried.append(nodes)
        return Pretended(nodes, needs, errs)

    monkeypatch.setattr(Planner, "plan", plan)
    monkeypatch.setattr(planner, "nodes_needed", lambda p: max(1, round(p.needs * p.errs)))
    found = Planner(Config(), 8, "h100", 1 << 40).smallest(Pretended(start, needs, errs))  # type: ignore[arg-type]
    assert found is not None
    assert found.nodes == needs
    assert len(tried) <= (4 if errs == 1.0 else 24)


def test_what_never_fits_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Planner, "plan", lambda self, nodes, config=None: Pretended(nodes, 1 << 30, 1e-9))
    monkeypatch.setattr(planner, "nodes_needed", lambda p: 1)
    assert Planner(Config(), 8, "h100", 1 << 40).smallest(Pretended(1, 1 << 30, 1e-9)) is None  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="at least one"):
        Planner(Config(), 0, "h100", 1 << 40)
