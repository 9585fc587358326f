"""Commands on tasks beside causal language models: data, run with its report and studies, check, plan."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpc_hess.commands.check.work import check
from hpc_hess.commands.run.work import run
from hpc_hess.commands.show_data import show_data
from hpc_hess.config import make_config
from hpc_hess.parallel.world import World
from tests.support.spawn import run_ranks
from tests.support.task_models import TOYS, images, save_toy, settings_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["roberta", "masked", "bart", "resnet"])
def toy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    directory = tmp_path_factory.mktemp(request.param)
    save_toy(directory, request.param)
    return directory, request.param


def test_a_run_with_its_report(
    toy: tuple[Path, str], tmp_path: Path, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, name = toy
    config = make_config(settings_of(directory, name, run__out=str(tmp_path / "run"), run__report=True))
    assert run(config, world) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    unit = "labels" if TOYS[name][0].endswith("classification") else "tokens"
    assert result["model"]["task"] == TOYS[name][0]
    assert result["data"][unit] > 0
    assert f" {unit}, 3 steps" in capsys.readouterr().out
    assert (tmp_path / "run" / "report.html").is_file()
    assert run(config, world) == 0, "and once more, as it is finished"


def test_the_data_are_shown(toy: tuple[Path, str]) -> None:
    directory, name = toy
    out = io.StringIO()
    assert show_data(make_config(settings_of(directory, name, data__masked=0.9)), 2, out) == 0
    shown = {"roberta": "</s> -> [", "masked": "[ <mask>]", "bart": " -> [", "resnet": "image [3, 8, 8], from "}[name]
    assert shown in out.getvalue()
    assert "-- sequence 1 (" in out.getvalue()


def test_check_compares_with_the_exact_product(toy: tuple[Path, str], tmp_path: Path, world: World) -> None:
    directory, name = toy
    assert check(make_config(settings_of(directory, name, run__out=str(tmp_path))), world) == 0
    found = json.loads((tmp_path / "check.json").read_text())
    central = next(row for row in found["vectors"][0]["schemes"] if row["scheme"] == "central")
    assert central["error"] < 1e-6
    assert found["symmetry"] < 1e-6


def test_a_plan_is_made(toy: tuple[Path, str]) -> None:
    from hpc_hess.planning.planner import trace

    directory, name = toy
    traced = trace(make_config(settings_of(directory, name)), 1, 1, gloo=True)
    assert traced.num_params > 0


def _ended(world: World, settings: dict[str, Any]) -> int:
    return run(make_config(settings), world)


def _structure(directory: Path, name: str, world: World, ranks: int = 0) -> dict[str, Any]:
    """Run the study of classes in this process, or on several ranks; return what it found."""
    out = directory / f"run{ranks}"
    operator = {"operator__kind": "gauss_newton", "operator__method": "exact", "data__micro_batch": 1}
    settings = settings_of(directory, name, run__out=str(out), run__report=True, **operator)
    settings["studies"] = {"class_structure": {"groups": 3, "steps": 30}}
    settings["lanczos"] = {"steps": 30}
    if ranks:
        assert run_ranks(_ended, ranks, settings) == [0] * ranks
    else:
        assert run(make_config(settings), world) == 0
    return dict(json.loads((out / "result.json").read_text())["studies"]["class_structure"])


@pytest.mark.parametrize("name", ["roberta", "resnet"])
def test_class_means_of_a_classifier_are_those_of_a_notebook(name: str, tmp_path: Path, world: World) -> None:
    """Papyan's decomposition by class, of the sharded classifier and of the model itself."""
    from hpc_hess.api.classifiers import decompose
    from tests.support.task_models import own_batch

    model = save_toy(tmp_path, name)
    found = _structure(tmp_path, name, world)
    assert found["unit"] == "label"
    assert not found["others"]
    batch = own_batch(tmp_path, name)
    labels = batch.pop("labels")

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model.double()

        def forward(self, row: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.inner(**{key: value[row] for key, value in batch.items()}).logits
            return logits

    parts = decompose(Logits().eval(), [(torch.arange(len(labels)), labels)], 3)
    expected = np.sort(parts.means.both.eigenvalues())
    np.testing.assert_allclose(np.sort(found["means"])[-len(expected) :], expected, rtol=1e-8, atol=1e-12)
    together = _structure(tmp_path, name, world, 2)
    for key in ("shares", "means", "lambda_max", "lambda_max_without"):
        np.testing.assert_allclose(together[key], found[key], rtol=1e-9, atol=1e-12)


def test_images_of_a_data_set(tmp_path: Path, world: World) -> None:
    datasets = pytest.importorskip("datasets")
    save_toy(tmp_path, "vit")
    pixels, labels = images()
    rows = {"image": pixels.tolist(), "fine": labels.tolist()}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "rows")
    losses = []
    for number, changes in enumerate(
        ({}, {"data__source": f"datasets:{tmp_path / 'rows'}", "data__image_column": "image", "data__label_column": "fine"})
    ):
        out = tmp_path / f"run{number}"
        assert run(make_config(settings_of(tmp_path, "vit", run__out=str(out), **changes)), world) == 0
        losses.append(json.loads((out / "result.json").read_text())["loss"])
        shutil.rmtree(out)
    assert abs(losses[0] - losses[1]) < 1e-12
