"""Tasks beside causal language models: products against double backward of transformers' own loss, on several ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpc_hess.config import make_config
from hpc_hess.model.sources.source import resolve_source
from hpc_hess.parallel.world import World
from tests.support.problems import assert_right, products, whole
from tests.support.spawn import run_ranks
from tests.support.task_models import TOYS, own_batch, own_loss_and_product, save_toy, save_vgg, settings_of


def _masked_batch(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the program's own choice of masked tokens."""
    from hpc_hess.model.data.data import load_samples

    config = make_config(settings)
    samples = load_samples(config.data, config.model, resolve_source(config.model))
    return {**samples.inputs, "labels": samples.labels}


@pytest.mark.parametrize("name", TOYS)
def test_products_are_those_of_transformers_own_loss(name: str, tmp_path: Path) -> None:
    model = save_toy(tmp_path, name)
    settings = settings_of(tmp_path, name)
    found = products(World.alone(), settings)
    batch = _masked_batch(settings) if TOYS[name][0] == "masked-lm" else own_batch(tmp_path, name)
    loss, product = own_loss_and_product(model, batch)
    assert_right([found], loss, product)


def test_a_vgg_with_code_of_its_own(tmp_path: Path) -> None:
    model = save_vgg(tmp_path)
    found = products(World.alone(), settings_of(tmp_path, "resnet", model__trust_remote_code=True))
    assert_right([found], *own_loss_and_product(model, own_batch(tmp_path, "resnet")))


@pytest.mark.parametrize(("name", "ranks"), [("roberta", 2), ("masked", 3), ("bart", 2), ("resnet", 3), ("regression", 3)])
def test_ranks_agree_with_one_process(name: str, ranks: int, tmp_path: Path) -> None:
    """Five rows on two or three ranks: the last have a dummy."""
    save_toy(tmp_path, name)
    settings = settings_of(tmp_path, name, data__micro_batch=1, operator__step=1e-4)
    alone, together = products(World.alone(), settings), run_ranks(products, ranks, settings)
    assert abs(together[0]["loss"] - alone["loss"]) < 1e-12 * alone["loss"]
    for key, allowed in (("gradient", 1e-12), ("exact", 1e-12), ("differences", 1e-8)):
        expected = whole([alone], key)
        np.testing.assert_allclose(whole(together, key), expected, rtol=0, atol=allowed * np.abs(expected).max())
