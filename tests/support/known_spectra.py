"""Dense matrices with known spectra, as operators of one process."""

from __future__ import annotations

import numpy as np
import torch

from hpc_hess.linalg.eigen import Which
from hpc_hess.linalg.operator import FunctionOperator
from hpc_hess.linalg.probes import normals
from hpc_hess.parallel.layout import Layout
from hpc_hess.parallel.vector import Vector, VectorSpace
from hpc_hess.parallel.world import World


def make_space(size: int, dtype: torch.dtype = torch.float64) -> VectorSpace:
    return VectorSpace(World.alone(), Layout({"a": (size,)}), dtype)


def orthogonal(size: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(normals(seed, 0, 0, size * size, dtype=torch.float64).reshape(size, size))[0]


def with_spectrum(eigenvalues: torch.Tensor, dtype: torch.dtype = torch.float64) -> FunctionOperator:
    """A dense matrix Q diag(eigenvalues) Q^T."""
    q = orthogonal(len(eigenvalues))
    matrix = (q * eigenvalues.double()) @ q.T
    matrix = (0.5 * (matrix + matrix.T)).to(dtype)
    space = make_space(len(eigenvalues), dtype)
    return FunctionOperator(space, lambda v: Vector(space, matrix @ v.data))


def hessian_like(size: int) -> torch.Tensor:
    """A few outliers on both sides, more of them positive, and a bulk around zero."""
    bulk = torch.linspace(-1, 1.5, size - 12, dtype=torch.float64) ** 3
    outliers = torch.tensor([-40, -17, -9.5, -6, 5, 7, 8, 12, 20, 33, 60, 110], dtype=torch.float64)
    return torch.cat([outliers, bulk])


def expected(values: torch.Tensor, count: int, which: Which) -> np.ndarray:
    """The eigenvalues that a search for ``count`` pairs is to find, ascending."""
    ordered = values.sort().values.numpy()
    if which == "magnitude":
        return np.sort(ordered[np.argsort(-np.abs(ordered))[:count]])
    low, high = ordered[:count], ordered[-count:]
    return {"smallest": low, "largest": high, "both": np.concatenate([low, high])}[which]
