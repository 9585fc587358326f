"""A finished run that is started again: its report is written anew, and no model is loaded unless more is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpc_hess.commands.run import work
from hpc_hess.config import Config, make_config
from hpc_hess.parallel.world import World
from hpc_hess.session import problem
from hpc_hess.studies import opening

pytestmark = pytest.mark.slow


def settings(toy: Path, out: Path, *overrides: str) -> Config:
    return make_config(
        {
            "model": {"source": str(toy / "model")},
            "parameters": {"include": ["model.norm.weight"]},
            "data": {"source": f"tokens:{toy / 'tokens.npy'}", "sequence_length": 12, "sequences": 4, "micro_batch": 4},
            "lanczos": {"steps": 3},
            "studies": {"trace": {"method": "hutchinson", "samples": 6}},
            "run": {"out": str(out)},
        },
        list(overrides),
    )


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What models were loaded."""
    found: list[str] = []
    original = opening.load_problem

    def load(config: Config, *others: Any) -> Any:
        found.append(config.model.source)
        return original(config, *others)

    monkeypatch.setattr(opening, "load_problem", load)
    return found


def test_nothing_is_loaded_where_everything_is_known(
    world: World, toy: Path, tmp_path: Path, loaded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    assert work.run(settings(toy, out), world) == 0
    assert len(loaded) == 1
    result, report = (out / "result.json").read_bytes(), (out / "report.html").read_text()
    (out / "report.html").unlink()
    monkeypatch.setattr(problem, "build_skeleton", None)  # nor built: that would be an error
    assert work.run(settings(toy, out), world) == 0
    assert len(loaded) == 1
    assert (out / "result.json").read_bytes() == result
    assert len((out / "report.html").read_text()) == pytest.approx(len(report), rel=0.01)


@pytest.mark.parametrize("override", ["studies.diagonal.method=xdiag", "lanczos.probes=2", "studies.trace.samples=6"])
def test_what_is_asked_besides_is_computed(
    world: World, toy: Path, tmp_path: Path, loaded: list[str], override: str
) -> None:
    out = tmp_path / "run"
    assert work.run(settings(toy, out), world) == 0
    assert work.run(settings(toy, out, override), world) == 0
    assert len(loaded) == (1 if override == "studies.trace.samples=6" else 2)


def test_a_damaged_result_is_computed_again(world: World, toy: Path, tmp_path: Path, loaded: list[str]) -> None:
    out = tmp_path / "run"
    assert work.run(settings(toy, out), world) == 0
    whole = (out / "result.json").read_text()
    lambda_max = json.loads(whole)["lambda_max"]
    for damaged in (whole.replace(f'"lambda_max": {lambda_max}', '"lambda_max": 1e9'), whole[:-40], "[]", "{}"):
        assert damaged != whole
        (out / "result.json").write_text(damaged)
        assert work.run(settings(toy, out), world) == 0
        assert json.loads((out / "result.json").read_text())["lambda_max"] == lambda_max
    assert len(loaded) == 5


def test_other_data_under_the_same_name_is_refused(world: World, toy: Path, tmp_path: Path, loaded: list[str]) -> None:
    out, tokens = tmp_path / "run", tmp_path / "tokens.npy"
    np.save(tokens, np.load(toy / "tokens.npy"))
    config = settings(toy, out, f"data.source=tokens:{tokens}")
    assert work.run(config, world) == 0
    np.save(tokens, np.load(toy / "tokens.npy")[::-1])
    with pytest.raises(Exception, match="holds a run of another data"):
        work.run(config, world)
    assert len(loaded) == 2
