"""What cannot be computed in a program on several ranks: one sentence on every rank, and the model as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import hpc_hess
from hpc_hess.errors import HpcHessError
from hpc_hess.parallel.world import World
from tests.support.base_model import encoder
from tests.support.in_training import Net, case, dealt, fully_sharded, spread, squared, whole_parameters
from tests.support.spawn import run_ranks


def _given(world: World, how: str = "fsdp") -> tuple[nn.Module, list[Any]]:
    model, _, batches = case("squared")
    return spread(model, how, world.size)[0], dealt(batches, world.rank, world.size)


def _loss(world: World, loss: Callable[[nn.Module, Any], Any]) -> None:
    model, batches = _given(world)
    before = whole_parameters(model)
    try:
        hpc_hess.hessian(model, batches, loss)
    finally:
        after = whole_parameters(model)
        assert all(torch.equal(after[name], before[name]) for name in before)


def _last(world: World) -> bool:
    """Whether this is the rank that is wrong: the second of two, or the only one."""
    return world.rank == world.size - 1


def a_number(world: World) -> None:
    _loss(world, lambda m, b: float(squared(m, b)[0]) if _last(world) else squared(m, b))


def without_gradient(world: World) -> None:
    _loss(world, lambda m, b: squared(m, b)[0].detach() if _last(world) else squared(m, b)[0])


def not_finite(world: World) -> None:
    _loss(world, lambda m, b: squared(m, b)[0] * (float("nan") if _last(world) else 1.0))


def an_error_after_the_forward(world: World) -> None:
    def loss(model: nn.Module, batch: Any) -> Any:
        total, n = squared(model, batch)
        return (total, n)[2] if _last(world) else (total, n)

    _loss(world, loss)


def different_losses(world: World) -> None:
    model, batches = _given(world)
    losses = [squared, lambda m, b: squared(m, b)[0]]
    hpc_hess.hessian(model, batches, losses[world.rank])


def different_models(world: World) -> None:
    model: Any = Net(4).double()
    if world.rank:
        model.blocks.append(nn.Linear(6, 6).double())
    hpc_hess.hessian(model, _given(world, "group")[1], squared, group=torch.distributed.group.WORLD)


def different_weights(world: World) -> None:
    torch.manual_seed(world.rank)
    hpc_hess.hessian(Net(4).double(), _given(world, "group")[1], squared, group=torch.distributed.group.WORLD)


def different_steps(world: World) -> None:
    model, batches = _given(world)
    hpc_hess.slq(hpc_hess.hessian(model, batches, squared), steps=3 + world.rank)


def different_directions(world: World) -> None:
    model, batches = _given(world)
    operator = hpc_hess.hessian(model, batches, squared)
    operator.matmat([operator.space.zeros() for _ in range(1 + world.rank)])


def different_numbers_of_pairs(world: World) -> None:
    model, batches = _given(world)
    hpc_hess.eigenpairs(hpc_hess.hessian(model, batches, squared), 1 + world.rank)


def an_encoder(world: World) -> None:
    batch = {"input_ids": torch.arange(3, 11)[None] + world.rank}
    hpc_hess.hessian(encoder(), [batch], group=torch.distributed.group.WORLD)


def an_encoder_that_is_sharded(world: World) -> None:
    model = encoder()
    for layer in model.bert.encoder.layer:
        fully_shard(layer, mesh=init_device_mesh("cpu", (world.size,)))
    fully_shard(model, mesh=init_device_mesh("cpu", (world.size,)))
    hpc_hess.hessian(model, [{"input_ids": torch.arange(3, 11)[None] + world.rank}], method="exact")


def different_methods(world: World) -> None:
    model, batches = _given(world)
    hpc_hess.hessian(model, batches, squared, method="exact" if world.rank else "finite_difference")


def different_calls(world: World) -> None:
    model, batches = _given(world)
    operator = hpc_hess.hessian(model, batches, squared)
    (hpc_hess.trace if world.rank else hpc_hess.slq)(operator)  # type: ignore[operator]


def a_wrong_argument_on_one_rank(world: World) -> None:
    model, batches = _given(world)
    hpc_hess.hessian(model, batches, squared, scheme="sideways" if world.rank else "central")  # type: ignore[arg-type]


def a_wrong_vector_on_one_rank(world: World) -> None:
    model, batches = _given(world)
    operator = hpc_hess.hessian(model, batches, squared)
    operator @ torch.ones(operator.space.size_local + 5 * world.rank, dtype=torch.float64)


def half_precision(world: World) -> None:
    batches = _given(world)[1]
    half = fully_sharded(Net(4).bfloat16(), init_device_mesh("cpu", (world.size,)))
    hpc_hess.hessian(half, [(x.bfloat16(), y.bfloat16()) for x, y in batches], squared)


def on_the_meta_device(world: World) -> None:
    with torch.device("meta"):
        model = Net(4)
    fully_sharded(model, init_device_mesh("cpu", (world.size,)))
    hpc_hess.hessian(model, _given(world)[1], squared)


def changed_between_calls(world: World) -> None:
    model, batches = _given(world)
    operator = hpc_hess.hessian(model, batches, squared)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    hpc_hess.slq(operator, steps=2)


def a_part_replaced_between_calls(world: World) -> None:
    model: Any = Net(4).double()
    operator = hpc_hess.hessian(model, _given(world)[1], squared)
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    hpc_hess.slq(operator, steps=2)


def no_batches_at_all(world: World) -> None:
    hpc_hess.hessian(_given(world)[0], [], squared)


def a_batch_that_cannot_be_sent(world: World) -> None:
    class Batch:
        """Of a program's own."""

    hpc_hess.hessian(_given(world)[0], [Batch()] if world.rank == 0 else [], squared)


def tensor_parallel(world: World) -> None:
    model = Net(4).double()
    parallelize_module(model, init_device_mesh("cpu", (world.size,)), {"head": ColwiseParallel()})
    hpc_hess.hessian(model, _given(world)[1], squared)


def tensor_parallel_and_sharded(world: World) -> None:
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    model = Net(4).double()
    parallelize_module(model, mesh["tp"], {"head": ColwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    hpc_hess.hessian(model, _given(world)[1], squared)


def partly_sharded(world: World) -> None:
    model = Net(4).double()
    fully_shard(model.head, mesh=init_device_mesh("cpu", (world.size,)))
    hpc_hess.hessian(model, _given(world)[1], squared)


def the_first_fsdp(world: World) -> None:
    hpc_hess.hessian(FullyShardedDataParallel(Net(4).double(), device_id=torch.device("cpu")), _given(world)[1], squared)


def a_part_in_ddp(world: World) -> None:
    model: Any = Net(4).double()
    model.head = DistributedDataParallel(model.head)
    hpc_hess.hessian(model, _given(world)[1], squared)


def a_group_beside_a_mesh(world: World) -> None:
    model, batches = _given(world)
    hpc_hess.hessian(model, batches, squared, group=torch.distributed.group.WORLD)


def no_process_group(world: World) -> None:
    model, batches = _given(world)
    world.leave()
    hpc_hess.hessian(model, batches, squared)


def of_a_classifier(world: World) -> None:
    hpc_hess.decompose(_given(world)[0], [(torch.zeros(1, 5), torch.zeros(1, dtype=torch.int64))], 4)


REFUSED: list[tuple[Callable[[World], None], str]] = [
    (a_number, "returns a float: a scalar tensor is needed"),
    (without_gradient, "has no gradient, and FSDP2 needs every rank"),
    (not_finite, "is nan"),
    (an_error_after_the_forward, "fails: IndexError"),
    (different_losses, "different arguments: loss is squared"),
    (different_models, "different arguments: model is Net"),
    (different_weights, "ranks 0 and 1 hold different parameters"),
    (different_steps, "call slq with different arguments: steps is 3 on rank 0 and 4 on rank 1"),
    (different_directions, "different arguments: vectors is 1 on rank 0 and 2 on rank 1"),
    (different_numbers_of_pairs, "different arguments: count is 1 on rank 0 and 2 on rank 1"),
    (an_encoder, "is not a causal language model: changing a row's last tokens moves earlier logits"),
    (an_encoder_that_is_sharded, "BertLMHeadModel is not a causal language model"),
    (different_methods, "different arguments: method is 'finite_difference' on rank 0 and 'exact' on rank 1"),
    (different_calls, "different functions: slq on rank 0, trace on rank 1"),
    (a_wrong_argument_on_one_rank, "scheme = 'sideways' is not one of"),
    (a_wrong_vector_on_one_rank, "the operator acts on"),
    (half_precision, "finite differences cannot be computed in half precision"),
    (on_the_meta_device, "is on the meta device"),
    (changed_between_calls, "have changed since hessian"),
    (a_part_replaced_between_calls, "have changed since hessian"),
    (no_batches_at_all, "there are no batches"),
    (a_batch_that_cannot_be_sent, "rank 1 has no batch, and those of others cannot be sent"),
    (tensor_parallel, "parallelism cannot be handled"),
    (tensor_parallel_and_sharded, "tensor and expert parallelism cannot"),
    (partly_sharded, "is not sharded while others are"),
    (the_first_fsdp, "FSDP's first version"),
    (a_part_in_ddp, "wrap the whole model"),
    (a_group_beside_a_mesh, "leave out group"),
    (of_a_classifier, "decompose takes a model of one process"),
    (no_process_group, "call init_process_group first"),
]


ALONE = [  # what one rank can do wrong by itself
    *(a_number, without_gradient, not_finite, an_error_after_the_forward, half_precision, on_the_meta_device),
    *(changed_between_calls, a_part_replaced_between_calls, no_batches_at_all, an_encoder, an_encoder_that_is_sharded),
]


def _all(world: World, functions: list[Callable[[World], None]]) -> list[str]:
    """Return the sentence of each; the same processes go through all of them."""
    found = []
    for function in functions:
        try:
            function(world)
            found.append("nothing was refused")
        except HpcHessError as error:
            found.append(str(error))
        except Exception as error:  # to be named, not to end the others
            found.append(f"not one of this package's errors: {type(error).__name__}: {error}")
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_one_sentence_on_every_rank(ranks: int) -> None:
    refused = [(function, words) for function, words in REFUSED if ranks > 1 or function in ALONE]
    of_ranks = run_ranks(_all, ranks, [function for function, _ in refused])
    wrong = [
        (function.__name__, said)
        for (function, words), said in zip(refused, zip(*of_ranks, strict=True), strict=True)
        if len({*said}) > 1 or words not in said[0] or "\n" in said[0]
    ]
    assert wrong == []


def test_the_list_is_whole() -> None:
    assert len({function for function, _ in REFUSED}) == len(REFUSED) > 20


@pytest.mark.parametrize("loss", [squared])
def test_wrong_groups(loss: Any) -> None:
    with pytest.raises(HpcHessError, match="group is no process group"):
        hpc_hess.hessian(Net(4).double(), [], loss, group="all")
