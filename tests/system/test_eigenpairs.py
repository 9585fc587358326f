"""The search for eigenpairs as a part of a run: right, restartable to the last bit, the same on any number of ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpc_hess import api
from hpc_hess.commands.run.work import run
from hpc_hess.config import Config, make_config
from hpc_hess.errors import ConfigError, StoreError
from hpc_hess.model.data.data import load_samples
from hpc_hess.model.sources.source import resolve_source
from hpc_hess.parallel.world import World
from hpc_hess.storage.disk import give_back
from hpc_hess.storage.reader import read_store
from hpc_hess.studies.run_page import write_report
from tests.support.runs import go, on_ranks
from tests.support.spawn import run_ranks
from tests.support.toys import ONLY

pytestmark = pytest.mark.slow


def settings(toy: Path, out: Path, *overrides: str) -> Config:
    values: dict[str, Any] = {
        "model": {"source": str(toy / "model"), "master_dtype": "float64", "compute_dtype": "float64"},
        "parameters": {"include": ONLY},
        "operator": {"method": "exact"},
        "data": {"source": f"tokens:{toy / 'tokens.npy'}", "sequence_length": 12, "sequences": 4, "micro_batch": 2},
        "lanczos": {"steps": 40},
        "analysis": {"eigenpairs": 3, "tolerance": 1e-7},
        "run": {"out": str(out), "grace_s": 0.0, "report": False},
    }
    return make_config(values, list(overrides))


def found(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "result.json").read_text())["eigenpairs"])


def values(out: Path) -> np.ndarray:
    return np.array([pair["value"] for pair in found(out)["pairs"]])


def vectors(out: Path) -> list[bytes]:
    with read_store(out / "eigenpairs") as view:
        assert view.verify() == []
        return [view.row(0, pair["row"]).tobytes() for pair in found(out)["pairs"]]


@pytest.fixture(scope="module")
def whole(world: World, toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    assert run(settings(toy, out), world) == 0
    return out


def test_the_pairs_are_those_of_the_hessian(toy: Path, whole: Path) -> None:
    """Against the model's own double backward, through what is on disk."""
    from transformers import AutoModelForCausalLM

    config = settings(toy, whole)
    module = AutoModelForCausalLM.from_pretrained(toy / "model", dtype=torch.float64, attn_implementation="eager")
    samples = load_samples(config.data, config.model, resolve_source(config.model))
    operator = api.hessian(module, [{"input_ids": samples.input_ids}], method="exact", include=ONLY)
    pairs = found(whole)["pairs"]
    assert [pair["converged"] for pair in pairs] == [True] * 6
    scale = max(abs(pair["value"]) for pair in pairs)
    with read_store(whole / "eigenpairs") as view:
        for pair in pairs:
            u = view.row(0, pair["row"])
            assert np.linalg.norm(u) == pytest.approx(1, abs=1e-10)
            assert np.linalg.norm(operator @ u - pair["value"] * u) < 2e-7 * scale
            assert pair["participation"] == pytest.approx(1 / (u**4).sum(), rel=1e-6)
            assert sum(pair["groups"].values()) == pytest.approx(1)
    ritz_values = json.loads((whole / "result.json").read_text())["probes"][0]["ritz_values"]
    assert values(whole)[[0, -1]] == pytest.approx(np.array(ritz_values)[[0, -1]], abs=1e-6 * scale)
    assert found(whole)["orthogonality"] < 1e-12


def test_only_the_pairs_take_disk_space(whole: Path) -> None:
    with read_store(whole / "eigenpairs") as view:
        rows, row_bytes = view.schema.rows, view.schema.num_params * 8
    (file,) = (whole / "eigenpairs").glob("krylov.ranks/*/rank-*.h5")
    assert file.stat().st_size > rows * row_bytes
    probe = file.with_name("hole")
    probe.write_bytes(bytes(1 << 20))
    give_back(probe, [(0, 1 << 20)])
    if probe.stat().st_blocks:
        pytest.skip("this file system cannot give back a part of a file")
    block = file.stat().st_blksize  # a row's ends may share a block with rows that stay
    assert file.stat().st_blocks * 512 < (6 + 1) * (row_bytes + 2 * block) + (1 << 16)


def test_the_report_shows_them(whole: Path) -> None:
    page = write_report(whole).read_text()
    assert "Where the eigenvectors live" in page
    assert "6 of 6 pairs converged" in page
    assert (whole / "figures" / "eigenpairs.png").stat().st_size > 10_000


def test_stopped_anywhere_and_resumed_is_bitwise_the_same(world: World, toy: Path, tmp_path: Path, whole: Path) -> None:
    out, code, runs = tmp_path / "run", 75, 0
    assert run(settings(toy, out, "analysis.eigenpairs=0"), world) == 0  # the quadrature alone
    while code == 75:
        code, _ = go(world, settings(toy, out), (5, 7, 12)[runs % 3])
        runs += 1
        assert runs < 100
    assert code == 0
    assert runs > 3
    assert found(out)["restarts"] > 0
    assert found(out) == found(whole)
    assert vectors(out) == vectors(whole)


@pytest.mark.parametrize("driver", ["files"])
def test_on_two_and_three_ranks(toy: Path, tmp_path: Path, whole: Path, driver: str) -> None:
    for ranks in (2, 3):
        out = tmp_path / f"on_{ranks}"
        assert run_ranks(on_ranks, ranks, settings(toy, out, f"store.driver={driver}")) == [0] * ranks
        scale = np.abs(values(whole)).max()
        assert np.abs(values(out) - values(whole)).max() < 1e-8 * scale
        with read_store(out / "eigenpairs") as mine, read_store(whole / "eigenpairs") as theirs:
            for a, b in zip(found(out)["pairs"], found(whole)["pairs"], strict=True):
                overlap = abs(mine.row(0, a["row"]) @ theirs.row(0, b["row"]))
                assert overlap == pytest.approx(1, abs=1e-8)


def test_a_search_goes_on_on_other_ranks(world: World, toy: Path, tmp_path: Path, whole: Path) -> None:
    out = tmp_path / "run"
    assert run(settings(toy, out, "analysis.eigenpairs=0"), world) == 0
    assert go(world, settings(toy, out), 20)[0] == 75
    assert run_ranks(on_ranks, 2, settings(toy, out)) == [0, 0]
    assert np.abs(values(out) - values(whole)).max() < 1e-8 * np.abs(values(whole)).max()


def test_what_does_not_go_together(world: World, toy: Path, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"studies\.eigenpairs\.basis_size = 8 is not valid: 6 pairs .* least 9 vectors"):
        settings(toy, tmp_path, "analysis.basis_size=8")
    before = (whole / "eigenpairs" / "krylov.h5").read_bytes()
    with pytest.raises(StoreError, match="holds a search with .* remove that directory"):
        run(settings(toy, whole, "analysis.which=largest"), world)
    assert (whole / "eigenpairs" / "krylov.h5").read_bytes() == before
    with pytest.raises(ConfigError, match=r"vectors x .* do not fit .* studies\.eigenpairs\.basis_size = \d+ or more ranks"):
        run(settings(toy, tmp_path / "large", "lanczos.steps=2", "analysis.basis_size=50000000"), world)
