"""The notebook interface on ordinary modules, against dense Hessians."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import eigsh
from torch import nn

import hpc_hess
from hpc_hess.errors import ConfigError, DataError, LayoutError
from hpc_hess.model.loss import CallableObjective, causal_lm_loss
from tests.dense import dense_hessian
from tests.toys import VOCAB, toy_model


def summed_cross_entropy(model: nn.Module, batch: Any) -> tuple[torch.Tensor, float]:
    inputs, classes = batch
    return nn.functional.cross_entropy(model(inputs), classes, reduction="sum"), len(classes)


@pytest.fixture
def classifier() -> tuple[nn.Module, list[Any]]:
    """A small MLP with dropout (which must be switched off) and two batches of unequal size."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    inputs, classes = torch.randn(40, 5, dtype=torch.float64), torch.randint(0, 3, (40,))
    return model, [(inputs[:30], classes[:30]), (inputs[30:], classes[30:])]


def test_spectrum_of_a_classifier(classifier: tuple[nn.Module, list[Any]]) -> None:
    model, batches = classifier
    operator = hpc_hess.hessian(model, batches, summed_cross_entropy)
    dense = dense_hessian(model, CallableObjective(batches, summed_cross_entropy, model))
    exact = torch.linalg.eigvalsh(dense)
    spectrum = hpc_hess.slq(operator, steps=operator.shape[0], probes=2, seed=1)
    assert abs(spectrum.lambda_max - float(exact[-1])) < 1e-8
    assert abs(spectrum.lambda_min - float(exact[0])) < 1e-8
    assert spectrum.trace.stderr is not None
    density = spectrum.density(axis="symlog")
    assert density.spread is not None
    assert len(density.grid) == len(density.mean)
    one = hpc_hess.slq(operator, steps=5)
    assert one.trace.stderr is None


def test_products_come_back_in_kind(classifier: tuple[nn.Module, list[Any]]) -> None:
    model, batches = classifier
    operator = hpc_hess.hessian(model, batches, summed_cross_entropy)
    dense = dense_hessian(model, CallableObjective(batches, summed_cross_entropy, model)).numpy()
    v = np.random.default_rng(0).standard_normal(operator.shape[0])
    product = operator.matvec(v)
    assert isinstance(product, np.ndarray)
    np.testing.assert_allclose(product, dense @ v, rtol=1e-7, atol=1e-9)
    assert torch.equal(operator @ torch.from_numpy(v), torch.from_numpy(product))
    assert operator.layout.num_params == len(v)
    largest = eigsh(operator.to_scipy(), k=2, which="LA", return_eigenvectors=False)
    np.testing.assert_allclose(sorted(largest), np.linalg.eigvalsh(dense)[-2:], rtol=1e-7)
    with pytest.raises(ConfigError, match="acts on"):
        operator.matvec(v[:-1])


def test_default_loss_weighs_tokens_of_a_language_model() -> None:
    model = toy_model("llama", dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCAB, (3, 10), generator=generator)
    mask = torch.ones_like(ids)
    mask[2, 4:] = 0
    whole = [{"input_ids": ids, "attention_mask": mask}]
    rows = [{"input_ids": ids[i : i + 1], "attention_mask": mask[i : i + 1]} for i in range(3)]
    include = ["model.layers.0.*"]
    together = hpc_hess.hessian(model, whole, include=include)
    apart = hpc_hess.hessian(model, rows, include=include)
    v = torch.randn(together.shape[0], dtype=torch.float64, generator=generator)
    assert torch.allclose(together @ v, apart @ v, rtol=1e-6, atol=1e-9)
    total, count = causal_lm_loss(model, whole[0])
    assert count == 9 + 9 + 3
    assert total.ndim == 0


def test_exact_product_of_a_language_model() -> None:
    model = toy_model("llama", dtype=torch.float64)
    ids = torch.randint(3, VOCAB, (2, 10), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": ids}]
    exact, differences = hpc_hess.hessian(model, batches, method="exact"), hpc_hess.hessian(model, batches)
    v = torch.randn(exact.shape[0], dtype=torch.float64)
    assert (exact @ v - differences @ v).norm() < 1e-6 * (exact @ v).norm()


def test_clear_errors(classifier: tuple[nn.Module, list[Any]]) -> None:
    model, batches = classifier
    with pytest.raises(DataError, match="no batches"):
        hpc_hess.hessian(model, [], summed_cross_entropy)
    with pytest.raises(LayoutError, match="matches no parameter"):
        hpc_hess.hessian(model, batches, summed_cross_entropy, include=["nothing"])
    with pytest.raises(ConfigError, match="method"):
        hpc_hess.hessian(model, batches, summed_cross_entropy, method="guess")  # type: ignore[arg-type]
