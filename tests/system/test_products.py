"""Which product a run takes, what it says about it, and what it measures: bfloat16, models that cannot be split, check."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpc_hess.commands.check.work import check
from hpc_hess.commands.run.work import run
from hpc_hess.config import make_config
from hpc_hess.curvature.exact import whole_model
from hpc_hess.errors import ConfigError, ModelError, NumericsError
from hpc_hess.model.sharded.gradient import Gradient
from hpc_hess.model.sharded.shard import whole_model as wrap
from hpc_hess.parallel import memory
from hpc_hess.parallel.world import World
from hpc_hess.session.problem import check_repeatable
from tests.support.exact_case import micro_batches, objective
from tests.support.spawn import run_ranks
from tests.support.toys import toy_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with float32 weights, the same rounded to bfloat16, and token ids."""
    folder = tmp_path_factory.mktemp("toys")
    for name in ("fp32", "bf16"):
        model = toy_model("llama_untied")
        if name == "bf16":
            with torch.no_grad():
                for p in model.parameters():
                    p.copy_(p.bfloat16())
        model.save_pretrained(folder / name)
    np.save(folder / "tokens.npy", np.random.default_rng(0).integers(3, 96, size=300))
    return folder


def settings(toys: Path, out: Path, **changes: Any) -> Any:
    values: dict[str, Any] = {
        "model": {"source": str(toys / "fp32")},
        "data": {"source": f"tokens:{toys / 'tokens.npy'}", "sequence_length": 12, "sequences": 4},
        "lanczos": {"steps": 6},
        "run": {"out": str(out), "report": False},
    }
    for name, value in changes.items():
        section, key = name.split("__")
        values.setdefault(section, {})[key] = value
    return make_config(values)


def finished(config: Any, world: World) -> dict[str, Any]:
    assert run(config, world) == 0
    return json.loads((Path(config.run.out) / "result.json").read_text())  # type: ignore[no-any-return]


BF16 = {"model__compute_dtype": "bfloat16", "operator__method": "exact"}


def test_bfloat16_says_what_it_computes_and_how_well(
    world: World, toys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    errors = {}
    for weights, computes in (
        ("fp32", "Hessian of the bf16-rounded function"),
        ("bf16", "Hessian of the fp32 function estimated in bf16"),
    ):
        config = settings(toys, tmp_path / weights, model__source=str(toys / weights), run__report=True, **BF16)
        result = finished(config, world)
        assert result["operator"]["computes"] == computes
        assert computes in capsys.readouterr().out
        assert computes in (tmp_path / weights / "report.html").read_text()
        errors[weights] = e = result["errors"]
        assert e["hvp_relative_is"] == "measured"
        assert e["hvp_relative"] == max(e["hvp_relative_probe"], e["hvp_relative_ritz"])
        assert 1e-3 < e["hvp_relative"] < 0.1
        probe = result["probes"][0]
        widening = np.array(probe["ritz_errors"]) - probe["ritz_residuals"]
        np.testing.assert_allclose(widening, e["hvp_absolute"])
        assert e["hvp_absolute"] > 0
    assert errors["bf16"]["hvp_relative_probe"] < errors["fp32"]["hvp_relative_probe"]


def test_unchecked_and_exact_runs_claim_no_error(world: World, toys: Path, tmp_path: Path) -> None:
    unchecked = finished(settings(toys, tmp_path / "a", operator__check=False, **BF16), world)
    assert (unchecked["errors"]["hvp_relative"], unchecked["errors"]["hvp_relative_is"]) == (None, None)
    exact = finished(settings(toys, tmp_path / "b", operator__method="exact"), world)
    assert exact["errors"]["hvp_relative"] is None
    assert exact["operator"]["computes"] == "Hessian of the fp32 function"


@pytest.mark.parametrize("kind", ["gauss_newton", "perplexity"])
def test_bfloat16_is_compared_with_the_same_matrix(world: World, toys: Path, tmp_path: Path, kind: str) -> None:
    result = finished(settings(toys, tmp_path / "run", operator__kind=kind, **BF16), world)
    assert 1e-3 < result["errors"]["hvp_relative"] < 0.1


def test_differences_of_the_perplexity_are_compared_with_the_perplexity(world: World, toys: Path, tmp_path: Path) -> None:
    result = finished(settings(toys, tmp_path / "run", operator__kind="perplexity"), world)
    assert result["errors"]["hvp_relative"] < 2e-2


# -- a model whose blocks cannot be told apart -----------------------------------------------------------------------


@pytest.fixture
def unsplittable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpc_hess.model.blocks.blocks.find_blocks", lambda module: None)


DOUBLE = {"model__master_dtype": "float64", "model__compute_dtype": "float64"}


def test_the_whole_model_gives_the_streamed_recurrence(
    world: World, toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"operator__method": "exact", "model__activation_checkpointing": True, **DOUBLE}
    streamed = finished(settings(toys, tmp_path / "streamed", **options), world)["probes"][0]
    monkeypatch.setattr("hpc_hess.model.blocks.blocks.find_blocks", lambda module: None)
    capsys.readouterr()
    whole = finished(settings(toys, tmp_path / "whole", **options), world)["probes"][0]
    shown = " ".join("".join(capsys.readouterr()).split())
    assert "no nn.ModuleList of repeated blocks was found: exact products take the model as a whole" in shown
    for key in ("alpha", "beta"):
        np.testing.assert_allclose(whole[key], streamed[key], rtol=1e-8)


@pytest.mark.usefixtures("unsplittable")
def test_differences_are_checked_against_the_whole_model(world: World, toys: Path, tmp_path: Path) -> None:
    result = finished(settings(toys, tmp_path / "run"), world)
    assert result["errors"]["hvp_relative_is"] == "measured"
    assert result["errors"]["hvp_relative"] < 2e-2


@pytest.mark.usefixtures("unsplittable")
def test_a_whole_model_that_does_not_fit(
    world: World, toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(whole_model, "device_bytes_free", lambda world: 1000)
    with pytest.raises(ModelError, match=r"ModuleList .* needs .* [GM]B on each rank .* are free"):
        run(settings(toys, tmp_path / "exact", operator__method="exact"), world)
    result = finished(settings(toys, tmp_path / "differences"), world)
    assert result["errors"]["hvp_relative_is"] == "predicted"
    assert "products are not checked against the exact one" in " ".join("".join(capsys.readouterr()).split())


def _two_ranks(world: World, toys: str, out: str) -> None:
    """The whole model in float64, and bfloat16 where one weight of the last rank's shard is no bfloat16 number."""
    import hpc_hess.model.blocks.blocks as blocks

    run(settings(Path(toys), Path(out) / "bf16", model__source=str(Path(toys) / "almost"), **BF16), world)
    blocks.find_blocks = lambda module: None
    run(settings(Path(toys), Path(out) / "whole", operator__method="exact", **DOUBLE), world)


def test_two_ranks_take_the_whole_model_and_agree_on_what_is_computed(world: World, toys: Path, tmp_path: Path) -> None:
    model = toy_model("llama_untied")
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.bfloat16())
        model.get_submodule("lm_head").weight[-1, -1] = 1 / 3  # type: ignore[operator]
    model.save_pretrained(toys / "almost")
    run_ranks(_two_ranks, 2, str(toys), str(tmp_path), timeout_s=200)
    results = {name: json.loads((tmp_path / name / "result.json").read_text()) for name in ("bf16", "whole")}
    assert results["bf16"]["operator"]["computes"] == "Hessian of the bf16-rounded function"
    alone = finished(settings(toys, tmp_path / "alone", operator__method="exact", **DOUBLE), world)
    for key in ("alpha", "beta"):
        np.testing.assert_allclose(results["whole"]["probes"][0][key], alone["probes"][0][key], rtol=1e-8)


# -- where the basis lies --------------------------------------------------------------------------------------------


def test_the_basis_leaves_room_for_the_check(
    world: World, toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = toy_model("llama_untied")
    size = sum(p.numel() for p in model.parameters())
    # basis, work vectors, and what the check needs: three times the largest stage, two vectors
    embedding = model.get_parameter("model.embed_tokens.weight").numel()
    block = sum(p.numel() for p in model.get_submodule("model.layers.0").parameters())
    need = 4 * ((6 + 4 + 2) * size + 3 * max(embedding, block))
    monkeypatch.setattr(memory, "host_bytes_free", lambda: need)
    run(settings(toys, tmp_path / "fits"), world)
    monkeypatch.setattr(memory, "host_bytes_free", lambda: need - 4)
    with pytest.raises(ConfigError, match=r"free beside the products; lanczos\.steps = 5"):
        run(settings(toys, tmp_path / "does_not"), world)
    run(settings(toys, tmp_path / "unchecked", operator__check=False), world)


# -- randomness ------------------------------------------------------------------------------------------------------


def test_dropout_left_on_is_seen_in_the_gradient() -> None:
    gradient = Gradient(wrap(toy_model("gpt2").train()), objective(micro_batches()))
    with pytest.raises(NumericsError, match="the same gradient computed twice differs by .* dropout"):
        check_repeatable(gradient)


# -- check -----------------------------------------------------------------------------------------------------------


def checked(config: Any, world: World) -> dict[str, Any]:
    assert check(config, world) == 0
    found = json.loads((Path(config.run.out) / "check.json").read_text())
    assert not list(Path(config.run.out).glob("*.part"))
    return found  # type: ignore[no-any-return]


def test_check_of_finite_differences(world: World, toys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = checked(settings(toys, tmp_path), world)
    assert [v["name"] for v in found["vectors"]] == ["probe", "Ritz vector"]
    for vector in found["vectors"]:
        assert {row["scheme"]: row["error"] < 0.1 for row in vector["schemes"]} == dict.fromkeys(
            ("forward", "central", "fourth"), True
        )
        assert len(vector["sweep"]) > 5
    assert (tmp_path / "check.png").exists()
    shown = capsys.readouterr().out
    assert "Hessian of the fp32 function" in shown
    assert f"written to {tmp_path / 'check.json'} and {tmp_path / 'check.png'}" in shown


def test_check_of_bfloat16(world: World, toys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = checked(settings(toys, tmp_path, **BF16), world)
    assert [1e-3 < v["rounding"] < 0.1 for v in found["vectors"]] == [True, True]
    shown = capsys.readouterr().out
    assert "Hessian of the bf16-rounded function" in shown
    assert shown.count("bf16 against fp32") == 2
    assert shown.rstrip().endswith("check.json")


@pytest.mark.usefixtures("unsplittable")
def test_check_of_an_exact_product_that_there_is_not(
    world: World, toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whole_model, "device_bytes_free", lambda world: 1000)
    with pytest.raises(ModelError, match="are free"):
        check(settings(toys, tmp_path, operator__method="exact"), world)
    assert "vectors" not in checked(settings(toys, tmp_path), world)
