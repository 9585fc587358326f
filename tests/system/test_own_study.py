"""A study of one's own in one file: settings, computation, view, and one line in the registry."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pydantic import Field

from hpc_hess.commands.config_page import commented_toml
from hpc_hess.commands.run.work import run
from hpc_hess.config import Config, StudySettings, make_config
from hpc_hess.errors import ConfigError
from hpc_hess.linalg import probes
from hpc_hess.parallel.world import World
from hpc_hess.registry.studies import STUDIES, StudySpec
from hpc_hess.storage.reader import read_store
from hpc_hess.studies.base import Bench, Recipe
from hpc_hess.studies.run_page import write_report


class Settings(StudySettings):
    """Rayleigh quotients of random vectors."""

    name = "rayleigh"
    of_parameters = True

    vectors: int = Field(default=0, ge=0)
    """How many vectors. 0: none."""

    def check(self, config: Config) -> None:
        if config.operator.kind == "fisher":
            raise ConfigError("studies.rayleigh.vectors does not suit the Fisher matrix")


def rayleigh(bench: Bench) -> dict[str, Any]:
    """Return v^T A v of normalised random v, (n,)."""

    def quotient(number: int) -> list[float]:
        v = probes.draw(bench.operator.space, seed=bench.seed, probe=number, distribution="gaussian")
        return [v.dot(bench.operator.matvec(v)) / v.dot(v)]

    values = [bench.keep.numbers(lambda k=k: quotient(k))[0] for k in range(Settings.of(bench.config).vectors)]
    return {"values": values}


RECIPE = Recipe(rayleigh, rows=lambda config: 0, memory="vectors")


def facts(found: Mapping[str, Any]) -> str:
    return f"{len(found['values'])} random vectors."


VIEW = SimpleNamespace(
    TITLE="Rayleigh quotients",
    HEADERS=["Vector", "Quotient"],
    facts=facts,
    size=lambda found: None,
    table=lambda found: [[str(k), f"{x:.3g}"] for k, x in enumerate(found["values"])],
    lines=lambda found: [f"quotients from {min(found['values']):.3g} to {max(found['values']):.3g}"],
)


@pytest.fixture
def registered() -> Iterator[None]:
    with STUDIES.registered(StudySpec("rayleigh", Settings, RECIPE, VIEW)):
        yield


def settings(toy: Path, out: Path, *overrides: str) -> Config:
    return make_config(
        {
            "model": {"source": str(toy / "model"), "master_dtype": "float64", "compute_dtype": "float64"},
            "parameters": {"include": ["model.norm.weight"]},
            "operator": {"method": "exact"},
            "lanczos": {"steps": 32},
            "data": {"source": f"tokens:{toy / 'tokens.npy'}", "sequence_length": 12, "sequences": 4, "micro_batch": 4},
            "store": {"keep_basis": True},
            "run": {"out": str(out), "report": False},
        },
        list(overrides),
    )


@pytest.mark.usefixtures("registered")
def test_it_is_configured_computed_and_shown(
    world: World, toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert run(settings(toy, out, "studies.rayleigh.vectors=3"), world) == 0
    assert "rayleigh" in capsys.readouterr().out
    values = json.loads((out / "result.json").read_text())["studies"]["rayleigh"]["values"]
    with read_store(out) as view:  # as many steps as entries: A = V T V^T
        probe = view.probes[0]
        basis = np.stack([view.row(0, row) for row in range(len(probe.alpha))])
    t = np.diag(probe.alpha) + np.diag(probe.beta[:-1], 1) + np.diag(probe.beta[:-1], -1)
    eigenvalues = np.linalg.eigvalsh(basis.T @ t @ basis)
    assert len(values) == 3
    assert all(eigenvalues[0] <= value <= eigenvalues[-1] for value in values)
    page = write_report(out).read_text()
    assert "Rayleigh quotients" in page
    assert f"{values[2]:.3g}".replace("-", "\N{MINUS SIGN}") in page
    assert "[studies.rayleigh] # Rayleigh quotients of random vectors." in commented_toml()


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["studies.rayleigh.vector=3"], "unknown configuration key 'studies.rayleigh.vector': did you mean 'studies"),
        (["studies.rayleigh.vectors=-1"], "studies.rayleigh.vectors = -1 is not valid: it should be gre"),
        (["studies.rayleigh.vectors=3", "operator.kind=fisher", "operator.method=exact"], "does not suit the Fisher matrix"),
        (["studies.rayleigh.vectors=3", "operator.sketched=true"], "studies.rayleigh is a study of parameters"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_computed(
    toy: Path, tmp_path: Path, overrides: list[str], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        settings(toy, tmp_path / "run", *overrides)


def test_a_study_that_is_not_registered(toy: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown study 'studies\.rayleigh': did you mean 'studies\.\w+'\?"):
        settings(toy, tmp_path / "run", "studies.rayleigh.vectors=3")
