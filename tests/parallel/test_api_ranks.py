"""The Python interface in a program on several ranks: the numbers of one process."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

import hpc_hess
from hpc_hess.parallel.world import World
from tests.support.in_training import CASES, STEP, Answers, answers, case, dealt, fully_sharded, on_ranks, product, spread
from tests.support.spawn import run_ranks
from tests.support.toys import toy_model, toy_tokens


@functools.cache
def alone(
    name: str, ask: Callable[[Any], Answers] = answers, method: Any = "finite_difference", step: Any = STEP
) -> Answers:
    model, loss, batches = case(name)
    return ask(hpc_hess.hessian(model, batches, loss, method=method, step=step))


def compare(found: Answers, right: Answers, tolerance: float = 1e-8) -> None:
    for name, value in right.items():
        assert np.abs(found[name] - value).max() <= tolerance * max(1.0, np.abs(value).max()), name


def _equal_to_one_process(
    ranks: int, asked: list[tuple[str, str, Any]], ask: Callable[[Any], Answers], tolerance: float = 1e-8
) -> None:
    for of_a_rank in run_ranks(on_ranks, ranks, asked, ask):
        for (name, _, method), found in zip(asked, of_a_rank, strict=True):
            compare(found, alone(name, ask, method), tolerance)


def test_every_call_on_two_ranks() -> None:
    differences: Any = "finite_difference"
    _equal_to_one_process(2, [("squared", how, differences) for how in ("fsdp", "ddp", "hsdp 2x1")], answers)


def test_losses_of_ones_own_on_two_ranks() -> None:
    _equal_to_one_process(2, [(name, how, "finite_difference") for name in CASES for how in ("fsdp", "ddp")], product)


@pytest.mark.parametrize("ranks", [1, 3])
def test_uneven_shards_and_ranks_without_a_batch(ranks: int) -> None:
    _equal_to_one_process(ranks, [("squared", how, "finite_difference") for how in ("fsdp", "group")], product)


@pytest.mark.parametrize(("ranks", "how"), [(2, "hsdp 1x2"), (2, "fsdp columns"), (4, "hsdp 2x2")])
def test_other_meshes_and_placements(ranks: int, how: str) -> None:
    _equal_to_one_process(ranks, [("weighted", how, "finite_difference")], answers if ranks == 4 else product)


def test_exact_products() -> None:
    asked = [(name, how, "exact") for name in ("squared", "preferences") for how in ("fsdp", "ddp", "hsdp 2x1")]
    _equal_to_one_process(2, asked, product, 1e-12)


@pytest.mark.parametrize("name", CASES)
def test_one_process_is_double_backward(name: str) -> None:
    model, loss, batches = case(name)
    parameters = [p for _, p in sorted(model.named_parameters())]
    v = torch.linspace(-1, 1, sum(p.numel() for p in parameters), dtype=torch.float64)
    pairs = [value if isinstance(value, tuple) else (value, 1) for value in (loss(model, batch) for batch in batches)]
    mean = sum(total for total, _ in pairs) / float(sum(float(weight) for _, weight in pairs))
    gradients = torch.autograd.grad(mean, parameters, create_graph=True)
    along = sum(
        (g.reshape(-1) * part).sum() for g, part in zip(gradients, v.split([p.numel() for p in parameters]), strict=True)
    )
    rows = torch.autograd.grad(along, parameters, allow_unused=True)
    right = torch.cat([(torch.zeros_like(p) if r is None else r).reshape(-1) for r, p in zip(rows, parameters, strict=True)])
    for method, tolerance in (("exact", 1e-12), ("finite_difference", 1e-6)):
        found = hpc_hess.hessian(model, batches, loss, method=method) @ v  # type: ignore[arg-type]
        assert float((found - right).norm()) < tolerance * float(right.norm()), method


def _chosen(world: World) -> Any:
    model, loss, batches = case("smoothed")
    model, _ = spread(model, "fsdp", world.size)
    return product(hpc_hess.hessian(model, dealt(batches, world.rank, world.size), loss))


def test_the_step_that_is_chosen() -> None:
    for found in run_ranks(_chosen, 2):
        compare(found, alone("smoothed", product, "finite_difference", "auto"), 1e-6)


# -- language models -----------------------------------------------------------------------------------------------------


def _language_model() -> tuple[PreTrainedModel, list[Any]]:
    model: Any = toy_model("llama_untied", dtype=torch.float64)
    return model, [{"input_ids": toy_tokens(rows, 7, seed)} for seed, rows in enumerate((2, 1, 3))]


def _of_a_language_model(world: World, how: str, options: dict[str, Any]) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, batches = _language_model()
    of = {}
    if how == "fsdp":
        mesh = init_device_mesh("cpu", (world.size,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    else:
        of = {"group": torch.distributed.group.WORLD}
    operator = hpc_hess.hessian(model, batches[world.rank :: world.size], **of, **options)
    v = torch.linspace(-1, 1, operator.shape[0], dtype=torch.float64)
    return (operator @ v).numpy(), operator.notes


@pytest.mark.parametrize("how", ["fsdp", "group"])
@pytest.mark.parametrize(
    "options",
    [{"step": STEP}, {"method": "exact"}, {"method": "exact", "kind": "gauss_newton"}],
    ids=["differences", "exact", "gauss_newton"],
)
def test_default_loss(how: str, options: dict[str, Any]) -> None:
    model, batches = _language_model()
    operator = hpc_hess.hessian(model, batches, **options)
    right = (operator @ torch.linspace(-1, 1, operator.shape[0], dtype=torch.float64)).numpy()
    for found, notes in run_ranks(_of_a_language_model, 2, how, options):
        assert np.abs(found - right).max() < 1e-8 * np.abs(right).max()
        assert not any("as a whole" in note for note in notes)


# -- sketches of gradients, and who takes part ---------------------------------------------------------------------------


def _sketches(world: World, how: str) -> np.ndarray:
    model, loss, batches = case("squared")
    model, _ = spread(model, how, world.size)
    return hpc_hess.gradient_sketches(model, dealt(batches, world.rank, world.size), loss, dimension=32)


@pytest.mark.parametrize("how", ["fsdp", "ddp"])
def test_sketches_of_gradients(how: str) -> None:
    model, loss, batches = case("squared")
    right = hpc_hess.gradient_sketches(model, batches, loss, dimension=32)
    np.testing.assert_allclose(np.concatenate(run_ranks(_sketches, 2, how)), right, atol=1e-10)


def _some_of_the_ranks(world: World) -> np.ndarray | None:
    """Ranks 0 and 1 of three hold the model; the third does something else."""
    model, loss, batches = case("squared")
    mesh = DeviceMesh("cpu", [0, 1])
    if world.rank == 2:
        return None
    sharded = fully_sharded(copy.deepcopy(model), mesh)
    operator = hpc_hess.hessian(sharded, dealt(batches, world.rank, 2), loss, step=STEP)
    return (operator @ np.linspace(-1, 1, operator.shape[0])) + 0.0


def test_a_mesh_of_some_of_the_ranks() -> None:
    right = alone("squared", product)["numpy"]
    first, second, third = run_ranks(_some_of_the_ranks, 3)
    assert third is None
    for found in (first, second):
        assert np.abs(found - right).max() < 1e-8 * np.abs(right).max()


def _plain(world: World) -> Any:
    if world.rank == 1:  # the others need not take part
        return None
    model, loss, batches = case("squared")
    operator = hpc_hess.hessian(model, batches, loss, step=STEP)
    return operator @ np.linspace(-1, 1, operator.shape[0]), operator.notes


def test_a_plain_module_is_this_process_alone() -> None:
    (found, notes), other = run_ranks(_plain, 2)
    assert other is None
    np.testing.assert_array_equal(found, alone("squared", product)["numpy"])
    assert any("this process's batches alone" in note for note in notes)
