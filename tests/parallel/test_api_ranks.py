"""The Python interface in a program on several ranks: the numbers of one process."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

import hpc_hess
from hpc_hess.parallel.world import World
from tests.support.in_training import CASES, case, dealt, fully_sharded, spread
from tests.support.spawn import run_ranks
from tests.support.toys import toy_model, toy_tokens

STEP = 1e-3  # the same on all ranks, so that numbers differ by rounding alone
Answers = dict[str, np.ndarray]


def answers(operator: Any) -> Answers:
    """Return one number or vector of each call, whole. Collective."""
    v = torch.linspace(-1, 1, operator.shape[0], dtype=torch.float64)
    spectrum = hpc_hess.slq(operator, steps=6, probes=2, seed=3)
    pairs = hpc_hess.eigenpairs(operator, 1, tolerance=1e-6, copies=False)
    small = hpc_hess.slq(hpc_hess.sketched(operator, 16), steps=4)
    found = {
        "product": (operator @ v).numpy(),
        "part": operator.whole(operator @ operator.part(v)).numpy(),
        "numpy": operator @ v.numpy(),
        "alphas": np.concatenate(spectrum.alphas),
        "betas": np.concatenate(spectrum.betas),
        "sketched": np.concatenate(small.alphas),
        "eigenvalues": pairs.values,
        "eigenvector": np.abs(operator.whole(pairs.vectors[-1]).numpy()),
        "trace": np.array(hpc_hess.trace(operator, products=12).mean),
        "diagonal": operator.whole(hpc_hess.diagonal(operator, products=12)[0]).numpy(),
        "solution": hpc_hess.solve(operator, v, damping=1.0, products=8).x.numpy(),
    }
    if "head.bias" in {p.name for p in operator.layout.parameters}:
        found["block"] = hpc_hess.sub_block(operator, ["head.bias"])
    return found


def alone(name: str, **options: Any) -> Answers:
    model, loss, batches = case(name)
    return answers(hpc_hess.hessian(model, batches, loss, **options))


def compare(found: Answers, right: Answers, tolerance: float = 1e-8) -> None:
    for name, value in right.items():
        assert np.abs(found[name] - value).max() <= tolerance * max(1.0, np.abs(value).max()), name


def _case(world: World, name: str, how: str, options: dict[str, Any]) -> Answers:
    model, loss, batches = case(name)
    model, of = spread(model, how, world.size)
    operator = hpc_hess.hessian(model, dealt(batches, world.rank, world.size), loss, **of, **options)
    assert operator.space.size_local <= operator.space.size
    return answers(operator)


@pytest.mark.parametrize("name", CASES)
def test_losses_of_ones_own_on_two_ranks(name: str) -> None:
    right = alone(name, step=STEP)
    for how in ("fsdp", "ddp"):
        for found in run_ranks(_case, 2, name, how, {"step": STEP}):
            compare(found, right)


@pytest.mark.parametrize("ranks", [1, 3])
def test_uneven_shards_and_ranks_without_a_batch(ranks: int) -> None:
    right = alone("squared", step=STEP)
    for how in ("fsdp", "group"):
        for found in run_ranks(_case, ranks, "squared", how, {"step": STEP}):
            compare(found, right)


@pytest.mark.parametrize(("ranks", "how"), [(2, "hsdp 2x1"), (2, "hsdp 1x2"), (2, "fsdp columns"), (4, "hsdp 2x2")])
def test_other_meshes_and_placements(ranks: int, how: str) -> None:
    right = alone("weighted", step=STEP)
    for found in run_ranks(_case, ranks, "weighted", how, {"step": STEP}):
        compare(found, right)


@pytest.mark.parametrize("how", ["fsdp", "ddp", "hsdp 2x1"])
@pytest.mark.parametrize("name", ["squared", "preferences"])
def test_exact_products(name: str, how: str) -> None:
    right = alone(name, method="exact")
    for found in run_ranks(_case, 2, name, how, {"method": "exact"}):
        compare(found, right, 1e-10)


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
        product = hpc_hess.hessian(model, batches, loss, method=method) @ v  # type: ignore[arg-type]
        assert float((product - right).norm()) < tolerance * float(right.norm()), method


def test_the_step_that_is_chosen() -> None:
    right = alone("smoothed")
    for found in run_ranks(_case, 2, "smoothed", "fsdp", {}):
        compare({"product": found["product"]}, {"product": right["product"]}, 1e-6)


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
    for product, notes in run_ranks(_of_a_language_model, 2, how, options):
        assert np.abs(product - right).max() < 1e-8 * np.abs(right).max()
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
    right = alone("squared", step=STEP)["numpy"]
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
    np.testing.assert_array_equal(found, alone("squared", step=STEP)["numpy"])
    assert any("this process's batches alone" in note for note in notes)
