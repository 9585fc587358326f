"""Numbers that say how far they can be trusted: intervals, small samples, symmetry, zero matrices, kinks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpc_hess.commands.check.work import check
from hpc_hess.commands.run.screen import summary_text
from hpc_hess.commands.run.work import run
from hpc_hess.config import make_config
from hpc_hess.errors import NumericsError
from hpc_hess.linalg.quadrature import estimate, ritz, trace
from hpc_hess.parallel.world import World
from hpc_hess.report.spectrum import warnings
from hpc_hess.studies.quadrature.result import refuse_meaningless
from tests.support.base_model import (
    HIGHEST_B,
    LOWEST_B,
    config_b,
    extremes,
    fill_b,
    model_b,
    result_of,
    save_b,
    settings_b,
    tokens_b,
)


@pytest.fixture(scope="module")
def b(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("b")
    save_b(folder / "model")
    return folder / "model", tokens_b(folder / "tokens.npy")


# -- H3: intervals of the extremes -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"operator__scheme": "forward"},
        {"operator__method": "exact", "model__compute_dtype": "bfloat16", "lanczos__probes": 2, "lanczos__steps": 15},
    ],
    ids=["central", "forward", "bfloat16"],
)
def test_intervals_of_the_extremes_hold(world: World, b: tuple[Path, Path], tmp_path: Path, changes: dict[str, Any]) -> None:
    assert run(make_config(settings_b(*b, tmp_path / "run", **changes)), world) == 0
    result = result_of(tmp_path / "run")
    assert result["errors"]["ritz_ends"].keys() == {"lowest", "highest"}
    for end, name, right in ((0, "lambda_min", LOWEST_B), (-1, "lambda_max", HIGHEST_B)):
        errors = [probe["ritz_errors"][end] for probe in result["probes"] if probe["ritz_values"][end] == result[name]]
        assert abs(result[name] - right) <= max(errors)
    lowest, highest = (result["errors"]["ritz_ends"][name] for name in ("lowest", "highest"))
    assert lowest["theta"] < 0 < highest["theta"]


# -- H8: small samples -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 8])
def test_the_interval_of_a_mean_of_few_samples_holds(count: int) -> None:
    generator = np.random.default_rng(0)
    inside = 0
    for _ in range(400):
        found = estimate(generator.normal(5.0, 2.0, count))
        half = found.half_width()
        assert half is not None
        inside += abs(found.mean - 5.0) <= half
    assert inside / 400 >= 0.92


def test_one_sample_has_no_interval() -> None:
    assert estimate([3.0]).half_width() is None


@pytest.mark.parametrize("probes", [1, 2, 4])
@pytest.mark.parametrize("steps", [1, 2])
def test_the_interval_of_the_trace_holds_for_any_number_of_probes(probes: int, steps: int) -> None:
    """Of a matrix with few outliers, from the moments alone: alpha_1 and beta_1, as one or two steps give them."""
    generator, size = np.random.default_rng(1), 200
    axes = np.linalg.qr(generator.standard_normal((size, size)))[0]
    values = np.r_[generator.normal(0, 0.1, size - 4), -20.0, -5.0, 8.0, 30.0]
    matrix = (axes * values) @ axes.T
    inside = 0
    for _ in range(300):
        found = []
        for _ in range(probes):
            v = generator.choice([-1.0, 1.0], size) / np.sqrt(size)
            alpha = v @ matrix @ v
            rest = matrix @ v - alpha * v
            beta = np.linalg.norm(rest)
            second = [rest @ matrix @ rest / beta**2, 1.0]
            found.append(ritz([alpha], [beta]) if steps == 1 else ritz([alpha, second[0]], [beta, second[1]]))
        half = trace(found, size).half_width()
        assert half is not None
        inside += abs(trace(found, size).mean - values.sum()) <= half
    assert inside / 300 >= 0.92


# -- symmetry, and the line that ends a run ----------------------------------------------------------------------------


def _result(**errors: Any) -> dict[str, Any]:
    probe = {"ritz_values": [-1.0, 10.0], "ritz_weights": [0.5, 0.5], "ritz_residuals": [0.0, 0.0]}
    return {
        "operator": {"name": "hessian", "dtype": "float32"},
        "probes": [probe],
        "lambda_max": 10.0,
        "lambda_min": -1.0,
        "errors": {"hvp_relative": 1e-4, "hvp_absolute": 1e-3, **errors},
    }


def test_asymmetry_beyond_the_products_error_is_a_caution() -> None:
    assert warnings(_result(symmetry=1e-4)) == []
    assert "not symmetric" in warnings(_result(symmetry=0.05))[0]
    assert warnings(_result(symmetry=0.05, hvp_absolute=0.5)) == []  # the products' own error explains it


def test_products_without_any_symmetry_give_no_eigenvalues() -> None:
    refuse_meaningless(_result(symmetry=0.4))
    with pytest.raises(NumericsError, match="not symmetric"):
        refuse_meaningless(_result(symmetry=0.9))


@pytest.mark.parametrize(("symmetry", "last"), [(0.0, "no cautions"), (0.1, "1 caution: see above")])
def test_a_run_ends_with_its_cautions(symmetry: float, last: str) -> None:
    assert summary_text(_result(symmetry=symmetry), "runs/x", None).splitlines()[-1] == last


# -- H6: ends of positive semi-definite matrices -------------------------------------------------------------------------


def test_the_lower_end_of_a_positive_matrix_is_no_caution() -> None:
    result = _result(symmetry=0.0) | {"operator": {"name": "gauss_newton", "dtype": "float32"}, "lambda_min": 1e-9}
    result["probes"][0] |= {"ritz_values": [1e-9, 10.0], "ritz_residuals": [1e-7, 0.0]}
    assert warnings(result) == []


# -- D11: a Hessian that is zero ---------------------------------------------------------------------------------------

ZERO = {
    "model__master_dtype": "float64",
    "model__compute_dtype": "float64",
    "parameters__include": ["model.layers.*"],
    "lanczos__steps": 5,
}


@pytest.fixture(scope="module")
def zero(b: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """B whose head is zero: the logits do not depend on the layers."""
    model = model_b()
    model.lm_head.weight.data.zero_()
    folder = tmp_path_factory.mktemp("zero")
    model.save_pretrained(folder)
    return folder, b[1]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["finite_difference", "exact"])
def test_a_hessian_that_is_zero_has_a_spectrum(world: World, zero: tuple[Path, Path], tmp_path: Path, method: str) -> None:
    studies = {"analysis__eigenpairs": 1, "analysis__trace": "hutch++", "analysis__diagonal": "xdiag"}
    settings = settings_b(*zero, tmp_path / "run", operator__method=method, **ZERO, **studies)
    assert run(make_config(settings), world) == 0
    result = result_of(tmp_path / "run")
    assert result["lambda_max"] == result["lambda_min"] == result["trace"]["mean"] == 0
    assert result["studies"]["trace"]["trace"] == 0
    json.dumps(result, allow_nan=False)


@pytest.mark.slow
def test_check_of_a_hessian_that_is_zero(world: World, zero: tuple[Path, Path], tmp_path: Path) -> None:
    assert check(make_config(settings_b(*zero, tmp_path / "run", **ZERO)), world) == 0
    found = json.loads((tmp_path / "run" / "check.json").read_text())
    assert found["symmetry"] == found["linearity"] == 0


# -- B8: a step that misses a kink ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_step_over_a_kink_is_refused(world: World, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    config = config_b(
        vocab_size=24, hidden_size=8, intermediate_size=12, head_dim=4, rms_norm_eps=1e-6, tie_word_embeddings=True
    )
    model = fill_b(AutoModelForCausalLM.from_config(config, attn_implementation="eager"), spread=0.3)
    model.model.embed_tokens.weight.data[5] = 0.0  # an untrained, reserved token
    model.save_pretrained(tmp_path / "model")
    ids = np.random.default_rng(0).integers(6, 24, (4, 12))
    ids[1, 4] = 5
    np.save(tmp_path / "ids.npy", ids)
    settings = settings_b(
        tmp_path / "model",
        tmp_path / "ids.npy",
        tmp_path / "run",
        data__sequence_length=12,
        data__sequences=4,
        lanczos__steps=30,
    )
    with pytest.raises(NumericsError, match="differs from the exact one by .* set operator.method"):
        run(make_config(settings), world)
    settings["operator"], settings["run"] = {"method": "exact"}, {"out": str(tmp_path / "exact"), "report": False}
    assert run(make_config(settings), world) == 0
    _, values = extremes(model, torch.from_numpy(ids))
    result = result_of(tmp_path / "exact")
    assert [result["lambda_min"], result["lambda_max"]] == pytest.approx(values, rel=1e-3)
