"""Splitting a causal LM into parts: what fits is exact, what does not is refused, nothing is silently constant."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hpc_hess.curvature.exact.exact import ExactHessian
from hpc_hess.errors import ModelError
from hpc_hess.model.blocks.blocks import SplitModel
from hpc_hess.model.blocks.recording import record
from hpc_hess.model.blocks.splice import differentiable_kernels
from hpc_hess.model.sharded.loss import CausalLMObjective
from hpc_hess.model.sharded.shard import ShardedModel, whole_model
from tests.support.exact_case import ToyBlock, ToyLM, error, micro_batches, objective, reference, vectors
from tests.support.odd_models import (
    Between,
    Detached,
    FromEarlier,
    NoForwardDerivative,
    OnceDifferentiable,
    Random,
    ToTheHead,
    TwoHeads,
    Varying,
    WrongWhenMixed,
)
from tests.support.toys import toy_model


def _blocks(count: int = 3) -> list[nn.Module]:
    torch.manual_seed(0)
    return [ToyBlock() for _ in range(count)]


def _operator(module: nn.Module) -> tuple[ExactHessian, ShardedModel, CausalLMObjective]:
    model, loss = whole_model(module.double()), objective(micro_batches(2, 6))
    return ExactHessian(model, loss), model, loss


def _record(module: nn.Module) -> SplitModel:
    split = SplitModel(module)
    named = {n: p.detach() for n, p in module.named_parameters()}
    with differentiable_kernels(module):
        record(split, micro_batches(2, 6)[0], lambda names: {n: named[n] for n in names})
    return split


def test_parts_of_a_tied_model_know_their_parameters() -> None:
    split = _record(toy_model("llama"))
    last = split.num_calls + 1
    assert split.names_of(0) == ["model.embed_tokens.weight"]
    assert all(n.startswith("model.layers.0.") for n in split.names_of(1))
    assert split.names_of(last) == ["model.embed_tokens.weight", "model.norm.weight"], "the head is the embedding"
    assert {n for s in range(last + 1) for n in split.names_of(s)} == set(split.shapes)


def test_parts_run_one_by_one_give_the_models_logits() -> None:
    module = toy_model("gpt2")
    split, batch = _record(module), micro_batches()[0]
    named = {n: p.detach() for n, p in module.named_parameters()}
    with torch.no_grad():
        arguments, (x,) = split.arguments(named, batch)
        for number in range(split.num_calls):
            x = split.block(number, named, arguments[number], x)
        logits = split.logits(named, split.final(named, batch, x).flatten(0, 1))
        expected = module(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    seen = batch.attention_mask.flatten().bool()
    torch.testing.assert_close(logits[seen], expected.flatten(0, 1)[seen], rtol=1e-5, atol=1e-5)


class _Shared(ToyLM):
    """Every block also takes the embeddings, and the second one a projection of them: extra boundary tensors."""

    def __init__(self) -> None:
        super().__init__(_blocks())
        self.mix = nn.Linear(8, 8).eval()

    def backbone(self, x: torch.Tensor) -> torch.Tensor:
        first, mixed = x, torch.tanh(self.mix(x))
        for number, block in enumerate(self.blocks):
            x = block(x, first, mixed) if number == 1 else block(x, first)
        return x


class _Repeated(ToyLM):
    """One block called three times: its parameters' tangents add."""

    def backbone(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = self.blocks[0](x)
        return x


@pytest.mark.parametrize("make", [_Shared, lambda: _Repeated(_blocks(1)), lambda: ToyLM(_blocks(1))])
def test_extra_boundary_tensors_and_repeated_blocks_are_exact(make: Any) -> None:
    hessian, model, loss = _operator(make())
    u, v = vectors(model, 2)
    expected = reference(model.module, model, loss, v)
    assert error(hessian.matvec(v), expected) < 1e-13
    assert error(hessian.matmat([u, v])[1], expected) < 1e-13


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Between, "computation between the blocks"),
        (FromEarlier, "argument 1 of block call 2 depends on the output of block call 0"),
        (ToTheHead, "the head's input depends on the output of block call"),
        (Detached, "argument 1 of block call 2 is not the same when the model is run in parts"),
        (Random, "is not the same when the model is run in parts"),
        (TwoHeads, "head is not called once"),
    ],
)
def test_what_is_no_chain_of_blocks_is_refused(kind: type[ToyLM], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        _record(kind(_blocks()))


def test_what_was_looked_for_is_named() -> None:
    flat = ToyLM(_blocks())
    del flat.blocks
    with pytest.raises(ModelError, match=r"no nn\.ModuleList of repeated blocks"):
        SplitModel(flat)
    headless = ToyLM(_blocks())
    headless.get_output_embeddings = lambda: None  # type: ignore[method-assign, assignment, return-value]
    with pytest.raises(ModelError, match="get_output_embeddings"):
        SplitModel(headless)


@pytest.mark.parametrize(("block", "why"), [(NoForwardDerivative, ""), (WrongWhenMixed, "is off by")])
def test_blocks_that_forward_mode_cannot_do_go_by_double_backward(block: type[ToyBlock], why: str) -> None:
    torch.manual_seed(0)
    hessian, model, loss = _operator(ToyLM([ToyBlock(), block()]))
    assert any("double backward" in note and "block 1" in note and why in note for note in hessian.notes)
    u, v = vectors(model, 2)
    assert error(hessian.matvec(v), reference(model.module, model, loss, v)) < 1e-13
    assert error(hessian.matmat([u, v])[1], reference(model.module, model, loss, v)) < 1e-13


def test_a_block_without_second_derivative_is_refused() -> None:
    with pytest.raises(ModelError, match=r"block 1 has no second derivative"):
        _operator(ToyLM([ToyBlock(), OnceDifferentiable()]))


def test_a_forward_that_depends_on_the_data_is_refused() -> None:
    with pytest.raises(ModelError, match="depends on the data"):
        _record(Varying(_blocks()))
