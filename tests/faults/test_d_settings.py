"""A result is bound to every setting and input that it came from; what cannot be done is refused before it is begun."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpc_hess.commands.finetune.work import Training
from hpc_hess.commands.intrinsic_dimension.work import Search
from hpc_hess.commands.run.work import run
from hpc_hess.config import Config, make_config
from hpc_hess.errors import ConfigError, StoreError
from hpc_hess.linalg.quadrature import ritz
from hpc_hess.parallel.world import World
from hpc_hess.session.starts import NAME as STARTS
from hpc_hess.session.stopping import Stopper
from hpc_hess.storage.reader import read_store
from tests.support.base_model import HIGHEST_B, LOWEST_B, result_of, save_b, settings_b, tokens_b
from tests.support.runs import go
from tests.support.spawn import run_ranks

pytestmark = pytest.mark.slow

NORMS = "model.norm.weight[:6]"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("b")
    save_b(folder / "model")
    tokens_b(folder / "tokens.npy")
    return folder


def settings(place: Path, out: Path, **changes: Any) -> Config:
    options: dict[str, Any] = {
        "model__master_dtype": "float64",
        "model__compute_dtype": "float64",
        "operator__method": "exact",
        "lanczos__steps": 6,
        "lanczos__lock_step": 1,
        "run__grace_s": 0.0,
        "data__micro_batch": 3,
    }
    return make_config(settings_b(place / "model", place / "tokens.npy", out, **(options | changes)))


# -- D3: a search --------------------------------------------------------------------------------------------------------


def search(place: Path, out: Path, tolerance: float, most: int = 300, **changes: Any) -> Config:
    return settings(
        place, out, analysis__eigenpairs=2, analysis__tolerance=tolerance, analysis__most_products=most, **changes
    )


def found(out: Path) -> dict[str, Any]:
    return dict(result_of(out)["eigenpairs"])


@pytest.fixture(scope="module")
def straight(place: Path, world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one search to 1e-6 finds."""
    out = tmp_path_factory.mktemp("straight") / "run"
    assert run(search(place, out, 1e-6), world) == 0
    pairs = found(out)["pairs"]
    assert all(pair["converged"] for pair in pairs)
    values = [pair["value"] for pair in pairs]
    assert [min(values), max(values)] == pytest.approx([LOWEST_B, HIGHEST_B], abs=2e-4)
    return found(out)


def test_a_finer_tolerance_is_searched_for(place: Path, world: World, tmp_path: Path, straight: dict[str, Any]) -> None:
    out = tmp_path / "run"
    assert run(search(place, out, 1e-2), world) == 0
    assert found(out)["products"] < straight["products"]
    assert run(search(place, out, 1e-6), world) == 0
    assert found(out) == straight
    for changes, words in (
        ((1e-2, 300), r"studies.eigenpairs.tolerance = 1e-06, finer than 0.01"),
        ((1e-6, 5), r"a search of \d+ products, more than studies.eigenpairs.mo\w+ = 5"),
    ):
        before = {path: path.read_bytes() for path in (out / "config.toml", out / "result.json")}
        with pytest.raises(StoreError, match=words):
            run(search(place, out, *changes), world)
        assert before == {path: path.read_bytes() for path in before}
    with read_store(out / "eigenpairs") as view:
        assert len(view.probes[0].rows) == 4  # the pairs alone


def test_more_products_go_on_with_a_search(place: Path, world: World, tmp_path: Path, straight: dict[str, Any]) -> None:
    out = tmp_path / "run"
    assert run(search(place, out, 1e-6, 5), world) == 0
    assert (found(out)["products"], found(out)["pairs"][0]["converged"]) == (5, False)
    code, added = go(world, search(place, out, 1e-6, 300))
    assert code == 0
    assert found(out) == straight
    assert added < 2 * straight["products"]  # went on, and did not begin anew
    assert go(world, search(place, out, 1e-6, 300)) == (0, 0)


# -- D3: studies after probes were added -----------------------------------------------------------------------------------


def test_automatic_damping_follows_the_probes(place: Path, world: World, tmp_path: Path) -> None:
    def suggested() -> float:
        """1.1 times what the lowest Ritz value and its residual reach below zero: as docs/spectra.md says."""
        own = [ritz(probe["alpha"], probe["beta"]) for probe in result_of(out)["probes"]]
        return max(-1.1 * min(q.values[0] - q.residuals[0] for q in own), 0.01 * max(q.values[-1] for q in own))

    out, options = tmp_path / "run", {"analysis__inverse": "minres", "lanczos__steps": 4, "analysis__inverse_products": 6}
    assert run(settings(place, out, **options), world) == 0
    first = result_of(out)["studies"]["inverse"]["damping"]
    assert first == pytest.approx(suggested())
    assert run(settings(place, out, **options, lanczos__probes=3), world) == 0
    second = result_of(out)["studies"]["inverse"]["damping"]
    assert second == pytest.approx(suggested())
    assert abs(second - first) > 1e-3 * first
    assert go(world, settings(place, out, **options, lanczos__probes=3)) == (0, 0)
    with pytest.raises(StoreError, match=r"holds this study with studies.inverse.damping = 'auto', not 5.0"):
        run(settings(place, out, **options, lanczos__probes=3, analysis__damping=5.0), world)
    assert 'damping = "auto"' in (out / "config.toml").read_text()


def test_an_unfinished_study_follows_the_probes(place: Path, world: World, tmp_path: Path) -> None:
    out, options = tmp_path / "run", {"analysis__inverse": "minres", "lanczos__steps": 4, "analysis__inverse_products": 6}
    assert go(world, settings(place, out, **options), 7)[0] == 75
    assert (out / "studies" / "inverse" / "pieces").exists()
    assert run(settings(place, out, **options, lanczos__probes=3), world) == 0
    straight = tmp_path / "straight"
    assert run(settings(place, straight, **options, lanczos__probes=3), world) == 0
    assert result_of(out)["studies"]["inverse"]["damping"] == result_of(straight)["studies"]["inverse"]["damping"]


def test_what_is_compared_with_the_whole_follows_the_probes(place: Path, world: World, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options: dict[str, Any] = {
        "operator__kind": "gauss_newton",
        "analysis__class_groups": 2,
        "analysis__class_steps": 3,
        "lanczos__steps": 3,
        "lanczos__seed": 1,
    }
    assert run(settings(place, out, **options), world) == 0
    code, added = go(world, settings(place, out, **options, lanczos__probes=4))
    assert code == 0
    result = result_of(out)
    classes = result["studies"]["class_structure"]
    assert classes["lambda_max"] == result["lambda_max"]
    assert result["lambda_max"] > ritz(result["probes"][0]["alpha"], result["probes"][0]["beta"]).values[-1]
    assert added <= 3 * 3 + 1  # products of the probes, a gradient: none of the study


def test_the_spectra_of_blocks_follow_the_probes_and_the_pairs(place: Path, world: World, tmp_path: Path) -> None:
    out, options = (
        tmp_path / "run",
        {
            "analysis__block_diagonal": ["layer"],
            "analysis__block_spectrum": "layer",
            "analysis__block_steps": 2,
            "lanczos__steps": 3,
            "analysis__columns": 4,
        },
    )
    assert run(settings(place, out, **options), world) == 0
    first = result_of(out)["studies"]["block_diagonal"]
    assert run(settings(place, out, **options, lanczos__probes=2), world) == 0
    second = result_of(out)["studies"]["block_diagonal"]
    assert second["products"] == first["products"]
    assert second["spectrum"]["wasserstein"] != first["spectrum"]["wasserstein"]
    straight = tmp_path / "straight"
    assert run(settings(place, straight, **options, lanczos__probes=2), world) == 0
    assert second == result_of(straight)["studies"]["block_diagonal"]
    assert run(settings(place, out, **options, lanczos__probes=2, analysis__eigenpairs=1), world) == 0
    directions = {row["direction"] for row in result_of(out)["studies"]["block_diagonal"]["products"]}
    assert {"eigenvector λmin", "eigenvector λmax"} <= directions


def test_fewer_probes_do_not_show_the_check_of_others(place: Path, world: World, tmp_path: Path) -> None:
    out, options = tmp_path / "run", {"operator__method": "finite_difference", "lanczos__steps": 3}
    assert run(settings(place, out, **options, lanczos__probes=2), world) == 0
    assert "ritz" in result_of(out)["errors"]
    assert run(settings(place, out, **options, lanczos__probes=1), world) == 0
    assert len(result_of(out)["probes"]) == 1
    assert "ritz" not in result_of(out)["errors"]


# -- D15: sub-blocks -------------------------------------------------------------------------------------------------------


def test_a_sub_block_that_does_not_fit_is_refused_before_the_first_gradient(
    place: Path, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hpc_hess.studies.sub_block import compute

    out = tmp_path / "run"
    monkeypatch.setattr(compute, "host_bytes_free", lambda: 8 * 6 * 200**2)
    with pytest.raises(ConfigError, match=r"entries selects 6,992 entries, .* room for 200 at most: select") as caught:
        run(settings(place, out, analysis__sub_block=["*"]), world)
    assert "\n" not in str(caught.value)
    assert not (out / "krylov.h5").exists()


def test_columns_are_rows_of_a_store(place: Path, world: World, tmp_path: Path) -> None:
    """Stopped within, on other ranks, with another number of columns at a time."""
    out, straight, text = tmp_path / "run", tmp_path / "straight", "model.layers.1.self_attn.k_proj.weight[0, :]"
    options: dict[str, Any] = {
        "analysis__sub_block": [text, NORMS],
        "lanczos__steps": 2,
        "analysis__columns": 5,
        "data__micro_batch": 1,
    }
    assert run(settings(place, straight, **options), world) == 0
    assert go(world, settings(place, out, **options), 16)[0] == 75
    with read_store(out / "studies" / "sub_block" / "pieces") as view:
        assert view.schema.num_params == 22
        assert len(view.probes[0].rows) == 10
    with pytest.raises(StoreError, match=r"holds this study with studies.sub_block.columns = 5, not 3"):
        run(settings(place, out, **options | {"analysis__columns": 3}), world)
    assert run_ranks(_on_ranks, 2, settings(place, out, **options)) == [0, 0]
    matrices = [np.load(path / "studies" / "sub_block" / "sub_block.npy") for path in (out, straight)]
    np.testing.assert_allclose(*matrices, atol=1e-12)
    assert not (out / "studies" / "sub_block" / "pieces").exists()


def _on_ranks(world: World, config: Config) -> int:
    return run(config, world)


# -- D16, D17 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1 << 32, -(1 << 31) - 1])
def test_seeds_that_torch_cannot_take(seed: int, tmp_path: Path) -> None:
    for make in (lambda: Training(tmp_path, seed=seed), lambda: Search(seed=seed)):
        with pytest.raises(ConfigError, match=rf"--seed {seed} is not valid: it should be from 0 to 4294967295"):
            make()
    assert Training(tmp_path, seed=(1 << 32) - 1).seed == (1 << 32) - 1
    with pytest.raises(ConfigError, match=r"model\.seed = 18446744073709551616 is not valid"):
        make_config({"model": {"seed": 1 << 64}})
    assert make_config({"model": {"seed": (1 << 64) - 1}}).model.seed == (1 << 64) - 1


def test_no_requeue_without_progress(
    place: Path, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two starts may be lost, the third gives up; a step in between, and the count begins anew."""
    out = tmp_path / "run"
    too_short = settings(place, out, run__time_limit="0:00:00")
    assert [run(too_short, world) for _ in range(2)] == [75, 75]
    assert json.loads((out / STARTS).read_text()) == {"without_progress": 2}
    words = r"3 starts in a row .* \(the time limit is near\): give the run more time \(run.time_limit"
    with pytest.raises(ConfigError, match=words) as caught:
        run(too_short, world)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert [run(too_short, world) for _ in range(2)] == [75, 75]  # whoever starts it again has as many tries
    assert go(world, settings(place, out), 5)[0] == 75  # a step
    assert not (out / STARTS).exists()
    assert [run(too_short, world) for _ in range(2)] == [75, 75]
    assert run(settings(place, out), world) == 0
    assert not (out / STARTS).exists()


def test_on_two_ranks_every_rank_gives_up(place: Path, tmp_path: Path) -> None:
    assert run_ranks(_three_starts, 2, settings(place, tmp_path / "run", run__time_limit="0:00:00")) == [[75, 75, 2]] * 2


def _three_starts(world: World, config: Config) -> list[int]:
    codes = []
    for _ in range(3):
        try:
            codes.append(run(config, world))
        except ConfigError as error:
            codes.append(error.exit_code)
    return codes


def test_a_training_without_a_checkpoint_gives_up_too(
    place: Path, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hpc_hess.commands.finetune.work import finetune

    config, training = settings(place, tmp_path / "unused"), Training(tmp_path / "out", steps=3, batch=2, save_at=())
    agreed = Stopper.agreed
    monkeypatch.setattr(Stopper, "agreed", lambda self, next_step_s: "a signal asked for it")
    assert [finetune(config, world, training) for _ in range(2)] == [75, 75]
    with pytest.raises(ConfigError, match=r"3 starts in a row .* \(a signal asked for it\)"):
        finetune(config, world, training)
    monkeypatch.setattr(Stopper, "agreed", agreed)
    assert finetune(config, world, training) == 0
    assert not (tmp_path / "out" / STARTS).exists()
