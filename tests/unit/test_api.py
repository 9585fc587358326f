"""The notebook interface on ordinary modules, against dense Hessians."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import eigsh
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import hpc_hess
from hpc_hess.errors import ConfigError, DataError, LayoutError, ModelError
from hpc_hess.model.sharded.own_loss import CallableObjective, causal_lm_loss
from tests.support.dense import dense_hessian, hessian_product
from tests.support.toys import VOCAB, toy_model


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
    dense = dense_hessian(model.eval(), CallableObjective(batches, summed_cross_entropy, model))
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
    dense = dense_hessian(model.eval(), CallableObjective(batches, summed_cross_entropy, model)).numpy()
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


class Convolutions(nn.Module):
    """Layers that no language model has, and a recurrent one, which keeps a flattened list of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.GELU(), nn.GroupNorm(2, 4))
        self.rnn, self.last = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.rnn(self.first(x).mT)[0][:, -1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.layer(x.mT).mean(1))


@pytest.mark.parametrize("make", [Convolutions, Attention])
def test_exact_product_of_any_module_and_loss(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    channels = 2 if make is Convolutions else 4
    model = make().double()
    batches = [(torch.randn(n, channels, 8, dtype=torch.float64), torch.randint(0, 3, (n,))) for n in (5, 3)]
    operator = hpc_hess.hessian(model, batches, summed_cross_entropy, method="exact")
    v = torch.randn(operator.shape[0], dtype=torch.float64)
    with sdpa_kernel(SDPBackend.MATH):
        expected = hessian_product(model.eval(), CallableObjective(batches, summed_cross_entropy, model), v)
    assert (operator @ v - expected).norm() < 1e-13 * expected.norm()


def test_exact_hessian_of_a_classifier_is_the_dense_one(classifier: tuple[nn.Module, list[Any]]) -> None:
    model, batches = classifier
    operator = hpc_hess.hessian(model, batches, summed_cross_entropy, method="exact")
    dense = dense_hessian(model.eval(), CallableObjective(batches, summed_cross_entropy, model))
    columns = torch.stack([operator @ row for row in torch.eye(operator.shape[0], dtype=torch.float64)])
    torch.testing.assert_close(columns, dense, rtol=0, atol=1e-14 * float(dense.abs().max()))
    some = hpc_hess.hessian(model, batches, summed_cross_entropy, method="exact", include=["3.*"])
    places = [model.get_parameter(name).numel() for name in ("0.bias", "0.weight")]
    torch.testing.assert_close(
        some @ torch.ones(some.shape[0], dtype=torch.float64), dense[sum(places) :, sum(places) :].sum(1)
    )


def test_exact_product_in_half_precision(classifier: tuple[nn.Module, list[Any]]) -> None:
    model, batches = classifier
    v = torch.randn(sum(p.numel() for p in model.parameters()))
    expected = hpc_hess.hessian(model, batches, summed_cross_entropy, method="exact") @ v.double()
    half = [(x.bfloat16(), classes) for x, classes in batches]
    found = hpc_hess.hessian(model.bfloat16(), half, summed_cross_entropy, method="exact") @ v
    assert (found - expected).norm() < 0.03 * expected.norm()


def test_gauss_newton_of_a_language_model() -> None:
    model = toy_model("llama", dtype=torch.float64)
    batches = [{"input_ids": torch.randint(3, VOCAB, (2, 10), generator=torch.Generator().manual_seed(0))}]
    v = torch.randn(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    parts = [hpc_hess.hessian(model, batches, method="exact", kind=kind) @ v for kind in ("gauss_newton", "residual")]
    whole = hpc_hess.hessian(model, batches, method="exact")
    assert any("fused" in note for note in whole.notes) == (model.config._attn_implementation == "sdpa")
    assert v @ parts[0] > 0
    assert (parts[0] + parts[1] - whole @ v).norm() < 1e-12 * (whole @ v).norm()


class Captured(nn.Module):
    """Computes with a reference to its weight that nobody can replace."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)
        self.kept = [self.linear.weight]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ self.kept[0].T + self.linear.bias)


class Noisy(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(nn.functional.dropout(x, 0.5))  # on in eval mode, too


@pytest.mark.parametrize(
    ("make", "words"), [(Captured, "reads parameters elsewhere"), (lambda: Noisy(5, 3), "dropout or another random")]
)
def test_modules_whose_products_would_be_wrong_are_refused(
    classifier: tuple[nn.Module, list[Any]], make: Any, words: str
) -> None:
    with pytest.raises(ModelError, match=words):
        hpc_hess.hessian(make().double(), classifier[1], summed_cross_entropy, method="exact")


def test_clear_errors(classifier: tuple[nn.Module, list[Any]]) -> None:
    model, batches = classifier
    with pytest.raises(DataError, match="no batches"):
        hpc_hess.hessian(model, [], summed_cross_entropy)
    with pytest.raises(LayoutError, match="matches no parameter"):
        hpc_hess.hessian(model, batches, summed_cross_entropy, include=["nothing"])
    with pytest.raises(DataError, match="no batches"):
        hpc_hess.hessian(toy_model("llama"), [], method="exact")
    with pytest.raises(ConfigError, match=r'kind = "fisher" needs method = "exact"'):
        hpc_hess.hessian(model, batches, summed_cross_entropy, method="exact", kind="fisher")
    with pytest.raises(ConfigError, match="method"):
        hpc_hess.hessian(model, batches, summed_cross_entropy, method="guess")  # type: ignore[arg-type]
