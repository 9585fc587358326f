"""What the faults of models need: the program's own problem on one rank or several, beside dense float64 references."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpc_hess.config import make_config
from hpc_hess.console.progress import Progress
from hpc_hess.parallel.world import World
from hpc_hess.session.operators import build_operator, exact_operator
from hpc_hess.session.problem import Problem, load_problem
from tests.support.base_model import settings_b
from tests.support.sharded import assemble, from_global, send


def settings_of(model: Path, tokens: Path, **changes: Any) -> dict[str, Any]:
    """Return the configuration of products in float64; ``changes`` are section__key=value."""
    own = {"model__master_dtype": "float64", "model__compute_dtype": "float64", "model__attention": "eager"}
    return settings_b(model, tokens, model / "unused", **{**own, **changes})


def problem_of(world: World, settings: dict[str, Any]) -> Problem:
    """Load a problem as every command does. Collective: yes."""
    if world.connected:
        world.make_mesh()
    return load_problem(make_config(settings), world, Progress(0))


def products(world: World, settings: dict[str, Any]) -> dict[str, Any]:
    """Return loss, intake, and this rank's part of products by both methods with one vector. Collective: yes."""
    problem, config = problem_of(world, settings), make_config(settings)
    loss, gradient = problem.gradient.at_theta0()
    v = from_global(problem.space, direction(problem.space.size))
    by_differences = build_operator(config, problem, loss, gradient, None).matvec(v)
    exact = exact_operator(config, problem)
    return {
        "loss": loss,
        "size": problem.space.size,
        "intake": problem.intake.to_json(),
        "gradient": send(gradient),
        "differences": send(by_differences),
        "exact": send(exact.matvec(v)),
        "notes": exact.notes,
    }


def direction(size: int) -> torch.Tensor:
    """Return the vector that products are made with, float64 (size,)."""
    return torch.randn(size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def whole(ranks: list[dict[str, Any]], key: str) -> np.ndarray:
    """Return a product from every rank's part."""
    return assemble([rank[key] for rank in ranks])


def dense_product(model: torch.nn.Module, ids: torch.Tensor, names: list[str] | None = None) -> tuple[float, np.ndarray]:
    """Return (loss, H v) by double backward on the model itself in float64; of the parameters ``names``, sorted."""
    from hpc_hess.model.sharded.precision import honest_casts

    model = model.double()
    model.config._experts_implementation = "eager"  # grouped kernels know no float64
    named = dict(model.named_parameters())
    chosen = [named[name] for name in sorted(names if names is not None else named)]
    with honest_casts(torch.float64):
        logits = model(input_ids=ids, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    gradients = torch.autograd.grad(loss, chosen, create_graph=True, materialize_grads=True)
    flat = torch.cat([g.reshape(-1) for g in gradients])
    v = direction(flat.numel())
    rows = torch.autograd.grad(flat @ v, chosen, materialize_grads=True)
    return float(loss.detach()), torch.cat([row.reshape(-1) for row in rows]).numpy()


def assert_right(ranks: list[dict[str, Any]], loss: float, product: np.ndarray) -> None:
    """Compare every rank's answer with the reference."""
    size = np.abs(product).max()
    assert all(abs(rank["loss"] - loss) < 1e-9 for rank in ranks)
    assert np.abs(whole(ranks, "exact") - product).max() < 1e-9 * size
    assert np.abs(whole(ranks, "differences") - product).max() < 1e-5 * size
