"""C6 to C10: what the Python interface is given as batches, losses, targets and vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, TensorDataset

import hpc_hess
from hpc_hess.errors import ConfigError, DataError, HpcHessError, ModelError, NumericsError
from tests.support.base_model import HIGHEST_B, encoder, fill_b, ids_b, model_b

METHODS = ["finite_difference", "exact"]


def product(model: nn.Module, loss: Callable[[nn.Module], torch.Tensor], v: torch.Tensor) -> torch.Tensor:
    """Return H v by double backward in the layout's order, by name."""
    parameters = list(dict(sorted(model.named_parameters())).values())
    gradients = torch.autograd.grad(loss(model), parameters, create_graph=True)
    row = torch.autograd.grad(torch.cat([g.reshape(-1) for g in gradients]) @ v, parameters, allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if r is None else r).reshape(-1) for r, p in zip(row, parameters, strict=True)])


def token_loss(model: nn.Module, targets: torch.Tensor, **arguments: Any) -> torch.Tensor:
    logits = model(**arguments, use_cache=False).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten(), ignore_index=-100)


def probe(size: int) -> torch.Tensor:
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def close(found: torch.Tensor, expected: torch.Tensor, method: str) -> bool:
    return float((found - expected).norm()) < (1e-6 if method == "exact" else 1e-5) * float(expected.norm())


# -- C6 ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("masked", [False, True])
def test_positions_of_packed_documents_are_handed_on(method: Any, masked: bool) -> None:
    """As transformers' own model takes them: without a mask they keep the documents apart."""
    model, ids = model_b().double(), ids_b()
    positions = torch.cat([torch.arange(4), torch.arange(6)]).repeat(3, 1)
    given = {"input_ids": ids, "position_ids": positions} | ({"attention_mask": torch.ones_like(ids)} if masked else {})
    operator = hpc_hess.hessian(model, [given], method=method)
    v = probe(operator.shape[0])
    expected = product(model, lambda m: token_loss(m, ids, **given), v)
    assert close(operator @ v, expected, method)
    ignored = product(model, lambda m: token_loss(m, ids, input_ids=ids), v)
    assert float((expected - ignored).norm()) > 0.01 * float(expected.norm())


def gpt2() -> Any:
    from transformers import AutoModelForCausalLM, GPT2Config

    config = GPT2Config(vocab_size=96, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2)
    return fill_b(AutoModelForCausalLM.from_config(config, attn_implementation="eager")).double()


@pytest.mark.parametrize("method", METHODS)
def test_padding_on_the_left_moves_no_position(method: Any) -> None:
    model, ids = gpt2(), ids_b()[:2]
    padded, mask = torch.cat([torch.zeros(2, 3, dtype=ids.dtype), ids], 1), torch.ones(2, 13, dtype=torch.int64)
    mask[:, :3] = 0
    operator = hpc_hess.hessian(model, [{"input_ids": padded, "attention_mask": mask}], method=method, include="*.attn.*")
    alone = hpc_hess.hessian(model, [ids], method="exact", include="*.attn.*")
    v = probe(alone.shape[0])
    assert close(operator @ v, alone @ v, method)
    assert [f.check for f in operator.intake] == ["given.positions"]
    assert "padded on the left" in operator.notes[-1]
    assert "padded on the left" in repr(operator)


def test_token_types_reach_a_model_that_has_them() -> None:
    model, ids = gpt2(), ids_b()
    types = ids % 2
    operator = hpc_hess.hessian(model, [{"input_ids": ids, "token_type_ids": types}], method="exact")
    v = probe(operator.shape[0])
    assert close(operator @ v, product(model, lambda m: token_loss(m, ids, input_ids=ids, token_type_ids=types), v), "exact")


def test_any_form_of_token_ids_is_used() -> None:
    model, ids = model_b(), ids_b()
    for batches in (
        [ids],
        ids,
        [ids.numpy()],
        ids.numpy(),
        ids.tolist(),
        [ids.tolist()],
        list(ids),
        [{"input_ids": row} for row in ids.tolist()],
        [ids.int()],
        [list(ids)],
        [(ids,)],
        [{"input_ids": ids, "token_type_ids": torch.zeros_like(ids), "labels": None}],
        ({"input_ids": row[None]} for row in ids),
    ):
        operator = hpc_hess.hessian(model, batches, method="exact", include=["model.norm.weight"])
        reference = hpc_hess.hessian(model, [{"input_ids": ids}], method="exact", include=["model.norm.weight"])
        v = torch.ones(operator.shape[0])
        assert torch.allclose(operator @ v, reference @ v, rtol=1e-4), type(batches)


IDS = ids_b()
WRONG_BATCHES: list[tuple[Any, str]] = [
    ([{"input_ids": IDS, "loss_mask": torch.ones_like(IDS)}], "'loss_mask' of batch 0 is no argument of LlamaForCausalLM"),
    ([{"input_ids": IDS, "token_type_ids": torch.ones_like(IDS)}], "'token_type_ids' of batch 0 is no argument"),
    ([{"inputs_embeds": torch.zeros(1, 3, 16)}], "batch 0 has no input_ids, but inputs_embeds"),
    ([{"input_ids": IDS, "inputs_embeds": torch.zeros(3, 10, 16)}], "'inputs_embeds' of batch 0 cannot be used beside"),
    ([{"input_ids": IDS, "attention_mask": IDS}], "values other than 0 and 1"),
    ([{"input_ids": IDS, "attention_mask": torch.ones(3, 1, 10, 10)}], "shape"),
    ([{"input_ids": IDS, "labels": torch.ones(3, dtype=torch.int64)}], "'labels' of batch 0 has shape"),
    ([{"input_ids": IDS, "labels": IDS - 97}], "which is no token"),
    ([IDS + 10], "hold token 10[0-5], and the model's vocabulary has 96"),
    ([IDS.float()], "float32 of shape"),
    ([IDS[None]], "rows by tokens"),
    (["text"], "batch 0 is a str"),
    ([[[1, 2, 3], [4, 5]]], "rows of different lengths"),
    ([(IDS, IDS)], "batch 0 is a tuple"),
    ({"input_ids": IDS}, "one dictionary: put it into a list"),
    (None, "batches is None"),
    (3, "batches is a int"),
    ([None], "batch 0 is None"),
    ([], "there are no batches"),
    (iter(()), "there are no batches"),
    ([IDS[:, :1]], "predict no token"),
]


@pytest.mark.parametrize("number", range(len(WRONG_BATCHES)))
def test_batches_that_cannot_be_used_are_named(number: int) -> None:
    batches, words = WRONG_BATCHES[number]
    with pytest.raises(DataError, match=words):
        hpc_hess.hessian(model_b(), batches)


# -- C7 ------------------------------------------------------------------------------------------------------------------


def mean_square(module: nn.Module, batch: Any) -> tuple[torch.Tensor, int]:
    inputs, targets = batch
    return mse_loss(module(inputs), targets, reduction="sum"), targets.numel()


def regression() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    return model, torch.randn(12, 4, dtype=torch.float64), torch.randn(12, 2, dtype=torch.float64)


@pytest.mark.parametrize("method", METHODS)
def test_any_iterable_of_batches_is_drawn_once(method: Any) -> None:
    model, x, y = regression()
    reference = hpc_hess.hessian(model, [(x, y)], mean_square, method="exact")
    v = probe(reference.shape[0])
    drawn: list[int] = []

    def generator() -> Iterator[Any]:
        buffer = torch.empty(4, 4, dtype=torch.float64), torch.empty(4, 2, dtype=torch.float64)
        for k in range(3):  # into the same memory each time
            drawn.append(k)
            buffer[0].copy_(x[4 * k : 4 * k + 4]), buffer[1].copy_(y[4 * k : 4 * k + 4])
            yield buffer

    for batches in (
        DataLoader(TensorDataset(x, y), batch_size=5, shuffle=True),
        generator(),
        ((x[k : k + 6], y[k : k + 6]) for k in (0, 6)),
        {"a": (x, y)}.values(),
    ):
        operator = hpc_hess.hessian(model, batches, mean_square, method=method)
        for _ in range(2):
            assert close(operator @ v, reference @ v, method)
    assert drawn == [0, 1, 2]


def test_a_loss_may_take_a_batch_apart() -> None:
    model, x, y = regression()

    def loss(module: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        targets = batch.pop("y")
        return mse_loss(module(batch["x"]), targets)

    operator = hpc_hess.hessian(model, [{"x": x, "y": y}], loss, method="exact")
    v = probe(operator.shape[0])
    assert close(operator @ v, hpc_hess.hessian(model, [(x, y)], mean_square, method="exact") @ v, "exact")


def test_one_batch_or_single_examples_are_not_batches() -> None:
    model, x, _ = regression()
    classes = torch.zeros(12, dtype=torch.int64)
    pair = r"put it into a list, \[\(inputs, targets\)\]"
    loader = "put it into a DataLoader"
    wrong = [((x, classes), pair), ([x, classes], pair), (TensorDataset(x, classes), loader), ({"x": x}, "one dictionary")]
    for batches, words in wrong:
        with pytest.raises(DataError, match=words):
            hpc_hess.hessian(model, batches, lambda m, b: cross_entropy(m(b[0]), b[1]))


# -- C8 ------------------------------------------------------------------------------------------------------------------

WRONG_LOSSES: list[tuple[Callable[[Any], Any], str]] = [
    (lambda mean: float(mean.detach()), "returns a float"),
    (lambda mean: None, "returns None"),
    (lambda mean: [mean], "returns a list"),
    (lambda mean: mean.repeat(3), r"returns a tensor of shape \[3\]"),
    (lambda mean: mean.detach(), "cut off from the parameters"),
    (lambda mean: (mean, 1.0, 2.0), "returns 3 things"),
    (lambda mean: {"loss": mean}, "returns a dict: return its loss"),
    (lambda mean: (mean, torch.ones(2)), "weight that is not a number"),
    (lambda mean: (mean, -1.0), "weight -1.0"),
    (lambda mean: (mean, float("inf")), "weight inf"),
    (lambda mean: mean * float("nan"), "is nan"),
    (lambda mean: mean.to(torch.complex128), "complex128"),
    (lambda mean: mean.data.numpy().copy(), "returns a ndarray"),
    (lambda mean: mean.missing, "AttributeError"),
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("number", range(len(WRONG_LOSSES)))
def test_losses_that_cannot_be_used_are_named(number: int, method: Any) -> None:
    model, x, y = regression()
    change, words = WRONG_LOSSES[number]
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(NumericsError if words == "is nan" else DataError, match=words):
        hpc_hess.hessian(model, [(x, y)], lambda m, b: change(mse_loss(m(b[0]), b[1])), method=method)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_a_weight_that_depends_on_the_parameters_is_refused() -> None:
    model, x, y = regression()

    def loss(module: nn.Module, batch: Any) -> Any:
        weights = module(batch[0]).square()
        return (weights * (module(batch[0]) - batch[1]).square()).sum(), weights.sum()

    with pytest.raises(DataError, match="a weight must be a constant"):
        hpc_hess.hessian(model, [(x, y)], loss)


def test_a_model_output_is_not_a_loss() -> None:
    with pytest.raises(DataError, match="CausalLMOutputWithPast: return its loss"):
        hpc_hess.hessian(model_b(), [{"input_ids": IDS, "labels": IDS}], lambda m, b: m(**b))


def test_a_model_that_sees_its_targets_is_refused_and_left_as_it_was() -> None:
    batch = {"input_ids": torch.arange(3, 11)[None].repeat(2, 1)}
    model = encoder()
    before, state = {k: t.clone() for k, t in model.state_dict().items()}, torch.get_rng_state()
    for call in (hpc_hess.hessian, hpc_hess.gradient_sketches):
        with pytest.raises(ModelError, match='^BertLMHeadModel is not a causal .* set "is_decoder": true in config.json'):
            call(model, [batch])
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    own = hpc_hess.hessian(model, [batch], lambda m, b: cross_entropy(m(**b).logits.flatten(0, 1), b["input_ids"].flatten()))
    assert np.isfinite(own @ np.ones(own.shape[0])).all()
    assert hpc_hess.hessian(encoder(is_decoder=True), [batch]).notes == []


def test_whether_tokens_see_later_ones_is_not_tried_on_rows_of_one_token() -> None:
    model, (words, ids) = encoder(), (torch.zeros(1, 8, dtype=torch.int64), torch.arange(3, 11)[None])
    with pytest.raises(ModelError, match="is not a causal"):
        hpc_hess.hessian(model, [{"input_ids": ids, "token_type_ids": words}])
    one = {"input_ids": ids, "attention_mask": (ids == 3).long()}
    operator = hpc_hess.hessian(model, [one, {"input_ids": ids}])
    assert any("was not tried" in note for note in operator.notes)


@pytest.mark.parametrize(
    ("targets", "count", "words"),
    [
        (torch.zeros(12), 2, "float32"),
        (torch.zeros(12, 2, dtype=torch.int64), 2, "one-hot"),
        (torch.zeros(12, 1), 2, "shape"),
        (torch.full((12,), 2), 2, "class numbers outside 0 to 1"),
        (torch.zeros(12, dtype=torch.int64), 3, "num_classes = 3"),
        (torch.full((12,), -1), 2, "outside"),
        (torch.zeros(12, dtype=torch.int64), 1, "num_classes = 1"),
    ],
)
def test_targets_of_decompose_are_class_numbers(targets: torch.Tensor, count: int, words: str) -> None:
    model, x, _ = regression()
    with pytest.raises(HpcHessError, match=words):
        hpc_hess.decompose(model, [(x, targets)], count)


def test_small_whole_numbers_are_class_numbers_too() -> None:
    model, x, _ = regression()
    classes = torch.arange(12) % 2
    narrow, wide = (hpc_hess.decompose(model, iter([(x, c)]), 2) for c in (classes.to(torch.int32), classes))
    v = probe(narrow.hessian.shape[0])
    assert torch.equal(narrow.gauss_newton @ v, wide.gauss_newton @ v)


# -- C9, C10 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_products_come_in_floating_point(method: Any) -> None:
    model, x, y = regression()
    operator = hpc_hess.hessian(model, [(x, y)], mean_square, method=method)
    size = operator.shape[0]
    expected = operator @ np.eye(size)[0]
    assert np.abs(expected).max() > 0.1
    for v in (
        np.eye(size, dtype=int)[0],
        np.eye(size, dtype=bool)[0],
        np.eye(size, dtype=np.float16)[0],
        [1, *[0] * (size - 1)],
        np.eye(size)[:, ::-1][0][::-1],
        np.eye(size, dtype=np.uint16)[0],
    ):
        found = operator @ v
        assert isinstance(found, np.ndarray)
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)
    for dtype in (torch.int64, torch.bfloat16):
        assert (operator @ torch.eye(size, dtype=dtype)[0]).dtype == torch.float64
    for v, error, words in (
        (np.ones(size) * 1j, ConfigError, "complex"),
        (np.ones(size - 1), ConfigError, "acts on"),
        (np.full(size, np.nan), NumericsError, "not finite"),
        ("abc", ConfigError, "not on a str"),
        (None, ConfigError, "not on a NoneType"),
    ):
        with pytest.raises(error, match=words):
            operator @ v


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("first", [torch.float32, torch.int8])
def test_what_is_not_selected_may_have_any_type(method: Any, first: torch.dtype) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Parameter(torch.tensor([[1, -2, 3, 1]]).to(first), requires_grad=first.is_floating_point)
            self.last = nn.Linear(4, 2).double()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.last(x * self.first.double()))

    _, x, y = regression()
    model = Mixed()
    operator = hpc_hess.hessian(model, [(x, y)], mean_square, method=method, include=["last.*"])
    v = probe(10)
    expected = product(model.last, lambda m: mse_loss(torch.tanh(m(x * model.first.double())), y), v)
    assert close(operator @ v, expected, method)


def test_b_from_bare_ids_has_its_eigenvalue() -> None:
    operator = hpc_hess.hessian(model_b().double(), [IDS], method="exact")
    assert hpc_hess.slq(operator, steps=40).lambda_max == pytest.approx(HIGHEST_B, abs=1e-3)


# -- what is asked of a spectrum ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ask",
    [
        lambda s: s.density(width=-1.0),
        lambda s: s.density(axis="symlog", linear=0.0),
        lambda s: s.density(width="x"),
        lambda s: s.cumulative("x"),
        lambda s: s.cumulative([0.0, np.nan]),
        lambda s: s.cumulative([[0.0]]),
        lambda s: s.cumulative([0.0], risk=0.0),
        lambda s: s.mass(above=5.0, below=1.0),
        lambda s: s.mass(above=1.0, below=1.0),
        lambda s: s.mass(above=np.nan),
        lambda s: s.mass(below=0.0, risk=1.0),
        lambda s: s.wasserstein_bound(risk=-0.1),
    ],
)
def test_questions_that_have_no_answer_are_refused(ask: Callable[[hpc_hess.Spectrum], Any]) -> None:
    model = nn.Linear(3, 1, bias=False).double()
    inputs = torch.arange(12, dtype=torch.float64).reshape(4, 3)
    operator = hpc_hess.hessian(model, [inputs], lambda m, x: (m(x) ** 2).mean(), method="exact")
    spectrum = hpc_hess.slq(operator, steps=3)
    assert spectrum.mass(below=np.inf).mean == pytest.approx(1.0)
    assert spectrum.cumulative(1e9).mean == pytest.approx([1.0])
    with pytest.raises(ConfigError, match="^(width|linear|points|risk|above) = "):
        ask(spectrum)
