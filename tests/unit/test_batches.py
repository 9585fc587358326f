"""What notebooks give as batches: every form that holds the same data gives the same Hessian; the rest is named."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from transformers import BatchEncoding

import hpc_hess
from hpc_hess.errors import DataError
from hpc_hess.intake import batches as intake
from tests.support.base_model import ids_b, model_b
from tests.support.toys import toy_model

IDS = ids_b()
MASK = torch.ones_like(IDS)
NORM = ["model.norm.weight"]


def product(batches: Any) -> torch.Tensor:
    operator = hpc_hess.hessian(model_b().double(), batches, method="exact", include=NORM)
    return operator @ torch.ones(operator.shape[0], dtype=torch.float64)


class Rows(Dataset[dict[str, torch.Tensor]]):
    """A data set that can be indexed and does not end by itself."""

    def __len__(self) -> int:
        return len(IDS)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        return {"input_ids": IDS[number % len(IDS)]}


class Stream(IterableDataset[torch.Tensor]):
    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(IDS)


def refilled() -> Iterator[BatchEncoding]:
    """One batch that is filled anew each time, as some loaders do."""
    batch = BatchEncoding({"input_ids": torch.zeros_like(IDS[:1])})
    for row in IDS:
        batch["input_ids"].copy_(row[None])
        yield batch


def refilled_array() -> Iterator[np.ndarray]:
    row = np.zeros(IDS.shape[1], np.int64)
    for ids in IDS.numpy():
        row[:] = ids
        yield row


@pytest.mark.parametrize(
    "make",
    [
        lambda: [BatchEncoding({"input_ids": IDS, "attention_mask": MASK})],
        refilled,
        refilled_array,
        lambda: Rows(),
        lambda: DataLoader(Rows(), batch_size=2),  # type: ignore[arg-type]
        lambda: DataLoader(Rows(), batch_size=1, shuffle=True),  # type: ignore[arg-type]
        lambda: DataLoader(TensorDataset(IDS), batch_size=2),  # gives lists of one tensor
        lambda: DataLoader(Stream(), batch_size=2),
        lambda: iter([IDS]),
        lambda: (row for row in IDS),
        lambda: [IDS.numpy().astype(np.uint16)],
        lambda: [IDS.numpy().astype(">i4")],
        lambda: [IDS.flip(0).numpy()[::-1]],
        lambda: [np.frombuffer(IDS.numpy().tobytes(), np.int64).reshape(IDS.shape)],  # which is not writable
        lambda: [{"input_ids": pandas.Series(row.tolist())} for row in IDS],
        lambda: {"one": {"input_ids": IDS}}.values(),
    ],
)
def test_every_form_of_the_same_tokens_gives_the_same_product(make: Callable[[], Any]) -> None:
    torch.testing.assert_close(product(make()), product([{"input_ids": IDS}]), rtol=1e-12, atol=1e-14)


def test_a_loader_that_shuffles_is_drawn_once_and_its_size_is_noted() -> None:
    loader = DataLoader(TensorDataset(torch.randn(40, 5), torch.randint(0, 3, (40,))), batch_size=7, shuffle=True)
    model = nn.Linear(5, 3)

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:  # no weights: how examples are grouped changes it
        return cross_entropy(model(batch[0]), batch[1])

    operator = hpc_hess.hessian(model, loader, loss, method="exact")
    v = np.ones(18, np.float32)
    np.testing.assert_array_equal(operator @ v, operator @ v)
    megabytes = (40 * 5 * 4 + 40 * 8) / 1e6
    assert operator.notes == [f"batches were drawn once and are kept: 6, of {megabytes:.2f} MB"]
    assert hpc_hess.hessian(model, list(loader), loss).notes == []


class Pictured(nn.Module):
    """A causal language model that adds pictures to its tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.language = toy_model("llama", dtype=torch.float64)
        self.look = nn.Linear(12, 16, dtype=torch.float64)

    def get_input_embeddings(self) -> Any:
        return self.language.get_input_embeddings()

    def forward(
        self, input_ids: torch.Tensor, pixel_values: torch.Tensor, attention_mask: Any = None, use_cache: bool = False
    ) -> Any:
        seen = self.look(pixel_values.flatten(1))[:, None]
        return self.language(
            inputs_embeds=self.get_input_embeddings()(input_ids) + seen, attention_mask=attention_mask, use_cache=use_cache
        )


@pytest.mark.parametrize("method", ["finite_difference", "exact"])
def test_pictures_beside_the_tokens_are_handed_on(method: Any) -> None:
    torch.manual_seed(0)
    model, pixels = Pictured(), torch.randn(len(IDS), 3, 2, 2, dtype=torch.float64)
    batches = [BatchEncoding({"input_ids": IDS, "pixel_values": pixels, "attention_mask": MASK})]
    operator = hpc_hess.hessian(model, batches, method=method, include="look.*")
    v = torch.randn(operator.shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def loss(model: nn.Module) -> torch.Tensor:
        logits = model(IDS, pixels).logits
        return cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())

    parameters = [model.look.bias, model.look.weight]
    gradient = torch.autograd.grad(loss(model), parameters, create_graph=True)
    rows = torch.autograd.grad(torch.cat([g.flatten() for g in gradient]) @ v, parameters)
    expected = torch.cat([row.flatten() for row in rows])
    assert float((operator @ v - expected).norm()) < 1e-6 * float(expected.norm())


FRAME = pandas.DataFrame({"x": [0.5, 1.0], "y": [0, 1]})


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ("a text", "batches is a str: give a list of batches"),
        (FRAME, "batches is a DataFrame: make batches of its values"),
        (FRAME["x"], "batches is a Series: make batches of its values"),
        ((row for row in ()), "there are no batches: a generator gives its batches once only"),
        (itertools.count(), "batches has given 100,001 batches of .* and goes on: .* itertools.islice"),
        (len, "batches is a builtin_function_or_method"),
        ([[{"input_ids": IDS[0]}, {"input_ids": IDS[1]}]], "batch 0 is a list of 2 dictionaries: .* collate"),
        (DataLoader(TensorDataset(IDS, IDS), batch_size=2), "batch 0 is a list of 2 tensors: say what they are"),
        ([{"input_ids": np.array(["a", None])}], "'input_ids' of batch 0 is no matrix of numbers"),
        ([{"input_ids": IDS, "text": ["a"] * len(IDS)}], "'text' of batch 0 is no argument of LlamaForCausalLM"),
    ],
)
def test_what_cannot_be_used_is_named(batches: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        hpc_hess.hessian(model_b(), batches)


def test_an_endless_loader_stops_before_memory_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "host_bytes_free", lambda: 4_000_000)
    with pytest.raises(DataError, match=r"batches has given 3 batches of 2\.40 MB together and goes on"):
        hpc_hess.hessian(nn.Linear(5, 3), itertools.cycle([torch.zeros(200_000)]), lambda m, b: m.weight.sum())


def test_a_batch_of_one_vector_without_rows() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)).double(), torch.randn(5, dtype=torch.float64)
    v = torch.randn(34, dtype=torch.float64)

    def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return model(x).square().sum()

    alone, in_rows = (hpc_hess.hessian(model, [batch], loss, method="exact") @ v for batch in (x, x[None]))
    torch.testing.assert_close(alone, in_rows)


def test_an_own_loss_gets_a_batch_encoding_whole_each_time() -> None:
    model, batches = toy_model("llama", dtype=torch.float64), [BatchEncoding({"input_ids": IDS, "attention_mask": MASK})]

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        ids = batch.pop("input_ids")
        return model(input_ids=ids, labels=ids, **batch).loss

    operator = hpc_hess.hessian(model, iter(batches), loss, include=NORM, method="exact")
    whole = hpc_hess.hessian(model, [IDS], include=NORM, method="exact")
    v = torch.ones(operator.shape[0], dtype=torch.float64)
    torch.testing.assert_close(operator @ v, whole @ v, rtol=1e-5, atol=1e-7)  # the model's own loss takes float32
    assert "input_ids" in batches[0]
