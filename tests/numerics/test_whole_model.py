"""Exact products of models taken as a whole: whatever cannot be split, any loss of one's own, on any number of ranks."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hpc_hess.curvature.exact import whole_model
from hpc_hess.curvature.exact.exact import ExactHessian, StreamedOperator
from hpc_hess.curvature.exact.gauss_newton import EmpiricalFisher, GaussNewton, Residual
from hpc_hess.curvature.exact.whole_model import WholeModel, exact_or_whole
from hpc_hess.errors import HpcHessError, ModelError, NumericsError
from hpc_hess.model.sharded.loss import CausalLMObjective
from hpc_hess.model.sharded.micro_batch import MicroBatch
from hpc_hess.model.sharded.shard import ShardedModel, shard_model
from hpc_hess.model.sharded.shard import whole_model as wrap
from hpc_hess.parallel.world import World
from tests.support.exact_case import ToyBlock, ToyLM, case, error, micro_batches, objective, reference, vectors, widened
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
from tests.support.sharded import Whole, assemble, send
from tests.support.spawn import run_ranks

KINDS: list[type[StreamedOperator]] = [ExactHessian, GaussNewton, Residual, EmpiricalFisher]


class Flat(ToyLM):
    """Its blocks are attributes, in no ModuleList; the head may be the embedding."""

    def __init__(self, blocks: list[nn.Module] | None = None, tied: bool = False) -> None:
        super().__init__(blocks or [ToyBlock(), ToyBlock()])
        self.first, self.second = self.blocks
        del self.blocks
        if tied:
            self.head.weight = self.embed.weight

    def backbone(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def _blocks(count: int = 3) -> list[nn.Module]:
    torch.manual_seed(0)
    return [ToyBlock() for _ in range(count)]


def _flat(*blocks: nn.Module, **options: Any) -> Flat:
    torch.manual_seed(0)
    return Flat(list(blocks) or None, **options)


@pytest.mark.parametrize(
    ("make", "looked_for"),
    [
        (_flat, r"no nn\.ModuleList of repeated blocks"),
        (lambda: _flat(tied=True), r"no nn\.ModuleList of repeated blocks"),
        (lambda: Between(_blocks()), "computation between the blocks"),
        (lambda: FromEarlier(_blocks()), "argument 1 of block call 2 depends on the output of block call 0"),
        (lambda: ToTheHead(_blocks()), "the head's input depends on"),
        (lambda: Detached(_blocks()), "not the same when the model is run in parts"),
        (lambda: TwoHeads(_blocks()), "head is not called once"),
    ],
)
def test_a_model_that_cannot_be_split_is_taken_as_a_whole(make: Any, looked_for: str) -> None:
    module = make().double()
    model, loss = wrap(module), objective(micro_batches(3, 6))
    operator = exact_or_whole(ExactHessian, model, loss)
    assert isinstance(operator, WholeModel)
    assert looked_for in operator.notes[0].replace(r"nn.", r"nn\.")
    assert "exact products take the model as a whole, about" in operator.notes[0]
    u, v = vectors(model, 2)
    assert error(operator.matvec(v), reference(module, model, loss, v)) < 1e-13
    assert error(operator.matmat([u, v])[1], reference(module, model, loss, v)) < 1e-13
    assert operator.num_products == 3


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_the_streamed_one(name: str, kind: type[StreamedOperator]) -> None:
    model, loss = case(name)
    (v,) = vectors(model, 1)
    with widened():
        expected = kind(model, loss).matvec(v)
        found = WholeModel(model, loss, kind.start)
        assert error(found.matvec(v), expected.data) < 1e-12
        found._way = "reverse"
        assert error(found.matvec(v), expected.data) < 1e-12


def test_frozen_parameters_and_empty_micro_batches() -> None:
    module = _flat(tied=True).double()
    model = wrap(module, include=["first*", "embed*"])
    dummy = micro_batches(3, 6)[1]
    dummy.labels = torch.full_like(dummy.labels, -100)
    loss = objective([dummy, *micro_batches(3, 6), dummy])
    (v,) = vectors(model, 1)
    expected = reference(module, model, loss, v)
    assert error(WholeModel(model, loss).matvec(v), expected) < 1e-13


@pytest.mark.parametrize(("block", "why"), [(NoForwardDerivative, ""), (WrongWhenMixed, "is off by")])
def test_what_forward_mode_cannot_do_goes_by_double_backward(block: type[ToyBlock], why: str) -> None:
    module = _flat(ToyBlock(), block()).double()
    model, loss = wrap(module), objective(micro_batches(2, 6))
    operator = WholeModel(model, loss)
    assert any("double backward" in note and why in note for note in operator.notes)
    (v,) = vectors(model, 1)
    assert error(operator.matvec(v), reference(module, model, loss, v)) < 1e-13


def test_what_has_no_exact_product_is_refused() -> None:
    def whole(module: nn.Module) -> WholeModel:
        return WholeModel(wrap(module.double()), objective(micro_batches(2, 6)))

    with pytest.raises(ModelError, match="no second derivative .*once_differentiable"):
        whole(_flat(ToyBlock(), OnceDifferentiable()))
    with pytest.raises(ModelError, match="dropout or another random operation"):
        exact_or_whole(ExactHessian, wrap(Random(_blocks()).double()), objective(micro_batches(2, 6)))
    with pytest.raises(ModelError, match="eval"):
        whole(_flat().train())


def test_too_little_memory_says_what_is_needed_and_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    model, loss = wrap(_flat().double()), objective(micro_batches(2, 6))
    size = 8 * model.space.size
    for free, what in ((4 * size, "parameters and their tangents alone"), (6 * size, "of them for activations")):
        monkeypatch.setattr(whole_model, "device_bytes_free", lambda world, free=free: free)
        with pytest.raises(ModelError, match=rf"ModuleList.* needs \d+\.\d\d [GM]B .*{what}.* [GM]B are free: use method"):
            exact_or_whole(ExactHessian, model, loss)


def test_numbers_that_are_not_finite_are_named() -> None:
    model, loss = wrap(_flat()), objective(micro_batches(2, 6))
    operator = WholeModel(model, loss)
    with torch.no_grad():
        model.module.get_submodule("second.inner").weight[0, 0] = torch.inf  # type: ignore[operator, index]
    with pytest.raises(NumericsError, match=r"first in the weights 'second\.inner\.weight'"):
        operator.matvec(vectors(model, 1)[0])


# -- ranks -----------------------------------------------------------------------------------------------------------


def _shared(world: World, module: nn.Module, make: Any) -> tuple[ShardedModel, nn.Module]:
    """``module`` cut over the ranks, and its skeleton."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    with torch.device("meta"):
        skeleton, plain = make().double(), make().double()
    model = shard_model(skeleton, world, master_dtype=torch.float64, compute_dtype=torch.float64)
    whole = dict(module.named_parameters())
    with torch.no_grad():
        for name, p in model.module.named_parameters():
            value = whole[name].detach()
            p.copy_(distribute_tensor(value, p.device_mesh, p.placements) if isinstance(p, DTensor) else value)
    return model, plain


def _rows(world: World) -> CausalLMObjective:
    """Two micro-batches in all; a third rank has only a dummy."""
    batches = micro_batches(3, 6)
    dummy = MicroBatch([-1], batches[1].input_ids, batches[1].attention_mask, torch.full_like(batches[1].labels, -100))
    mine = [*batches, *[dummy] * (-2 % world.size)][world.rank :: world.size]
    return objective(mine, sum(b.num_tokens for b in batches))


def _products(world: World, tied: bool) -> list[Whole]:
    if world.connected:
        world.make_mesh()
    model, plain = _shared(world, _flat(tied=tied).double(), lambda: Flat(tied=tied))
    generator = torch.Generator().manual_seed(3)
    everything = torch.randn(model.layout.num_params, generator=generator, dtype=torch.float64)
    starts, lengths = model.shard.global_intervals
    mine = [everything[s : s + n] for s, n in zip(starts.tolist(), lengths.tolist(), strict=True)]
    v = model.space.wrap(torch.cat([*mine, everything[:0]]))
    loss = _rows(world)
    options = {"plain": plain if model.sharded else None}
    found = [exact_or_whole(kind, model, loss, **options).matvec(v) for kind in (ExactHessian, GaussNewton)]
    return [send(v) for v in found]


@pytest.mark.parametrize(("ranks", "tied"), [(2, False), (3, True)])
def test_products_are_those_of_one_process(ranks: int, tied: bool) -> None:
    alone = _products(World.alone(), tied)
    together = run_ranks(_products, ranks, tied, timeout_s=120)
    for kind, expected in enumerate(alone):
        whole = assemble([answers[kind] for answers in together])
        np.testing.assert_allclose(whole, expected[0], rtol=0, atol=1e-13 * np.abs(expected[0]).max())


def _cut(batch: MicroBatch, length: int) -> MicroBatch:
    ids, mask, labels = (t[:, :length] for t in (batch.input_ids, batch.attention_mask, batch.labels))
    return MicroBatch(batch.sample_ids, ids, mask, labels)


class _Picky(ToyBlock):
    """Fails on rows of five tokens, which one rank alone holds."""

    kind: type[Exception] = ModelError

    def forward(self, x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        if x.shape[1] == 5:
            raise self.kind("this block takes no five tokens")
        return super().forward(x)


class _PickyRuntime(_Picky):
    kind = RuntimeError


def _outcome(world: World, kind: type[nn.Module], whole: bool) -> str:
    world.make_mesh()

    def make() -> nn.Module:
        return Varying(_blocks()) if kind is Varying else ToyLM([kind(), ToyBlock()])

    torch.manual_seed(0)
    model, plain = _shared(world, make().double(), make)
    length = 6 if world.rank == 0 else 4 if kind is Varying else 5
    loss = objective([_cut(batch, length) for batch in micro_batches(3, 6)], 10)
    try:
        operator = (
            exact_or_whole(ExactHessian, model, loss, plain=plain) if whole else ExactHessian(model, loss, plain=plain)
        )
    except HpcHessError as caught:
        world.barrier("all have failed together")
        return f"{type(caught).__name__}: {caught}"
    operator.matvec(model.space.zeros())
    return operator.notes[0]


@pytest.mark.parametrize(
    ("kind", "whole", "words"),
    [
        (_Picky, True, "ModelError: this block takes no five tokens"),
        (_PickyRuntime, False, "SplitError: cannot run ToyLM block by block (this block takes no five tokens)"),
        (_PickyRuntime, True, "ModelError: cannot run ToyLM (this block takes no five tokens)"),
        (Varying, True, "cannot split Varying: the ranks' data take different ways through its blocks: exact products"),
    ],
)
def test_what_one_rank_meets_every_rank_meets(kind: type[nn.Module], whole: bool, words: str) -> None:
    began = time.monotonic()
    answers = run_ranks(_outcome, 2, kind, whole)
    assert all(answer.startswith(words) for answer in answers), answers
    assert time.monotonic() - began < 50, "nobody waited for a collective's timeout"


def test_micro_batches_that_go_different_ways_are_seen_before_the_first_product() -> None:
    long, short = micro_batches(3, 6)
    short = _cut(short, 4)
    module = Varying(_blocks()).double()
    model, loss = wrap(module), objective([long, short])
    operator = exact_or_whole(ExactHessian, model, loss)
    assert "depends on the data" in operator.notes[0]
    (v,) = vectors(model, 1)
    assert error(operator.matvec(v), reference(module, model, loss, v)) < 1e-13
