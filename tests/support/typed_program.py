"""A user's program for ``mypy --strict``: types are known, and what is wrong is seen (an ignore too many is an error)."""

from pathlib import Path
from typing import assert_type

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import cross_entropy

import hpc_hess

Batch = tuple[torch.Tensor, torch.Tensor]


def loss(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, float]:
    """Return a sum and its weight."""
    inputs, classes = batch
    return cross_entropy(model(inputs), classes, reduction="sum"), float(len(classes))


def main(folder: Path) -> None:
    """Use what there is."""
    model = nn.Linear(4, 3)
    batches = [(torch.randn(10, 4), torch.randint(0, 3, (10,))) for _ in range(2)]
    operator = hpc_hess.hessian(model, batches, loss, method="exact")
    assert_type(operator, hpc_hess.Operator)
    assert_type(operator.matvec(torch.ones(15)), torch.Tensor)
    assert_type(operator @ np.ones(15), NDArray[np.floating])
    spectrum = hpc_hess.slq(operator, steps=4, progress=False)
    assert_type(spectrum, hpc_hess.Spectrum)
    assert_type(spectrum.lambda_max, float)
    assert_type(spectrum.trace.mean, float)
    assert_type(spectrum.alphas, list[NDArray[np.float64]])
    assert_type(spectrum.plot(Figure().subplots()), Axes)
    assert_type(spectrum.save(folder / "spectrum.npz"), Path)
    again = hpc_hess.load(folder / "spectrum.npz")
    assert isinstance(again, hpc_hess.Spectrum)
    assert_type(again.steps, int)
    pairs = hpc_hess.eigenpairs(operator, 2, which="largest")
    assert_type(pairs.values, NDArray[np.float64])
    assert_type(hpc_hess.trace(operator, products=4).stderr, float | None)
    values, errors = hpc_hess.diagonal(operator, products=4)
    x, residuals = hpc_hess.solve(operator, np.ones(15), damping=1.0)
    assert_type(float((values + errors + x).sum() + residuals[-1]), float)
    assert_type(hpc_hess.sub_block(operator, ["weight[0, :]"]), NDArray[np.float64])
    parts = hpc_hess.decompose(model, batches, num_classes=3)
    assert_type(parts.knocked_out, hpc_hess.Operator)
    assert_type(hpc_hess.__version__, str)
    hpc_hess.slq(hpc_hess.sketched(operator, 8), steps=3)
    hpc_hess.gradient_sketches(model, batches, loss, dimension=8)

    hpc_hess.slq(operator, steps="many")  # type: ignore[arg-type]
    hpc_hess.eigenpairs(operator, 2, which="biggest")  # type: ignore[arg-type]
    hpc_hess.hessian(model, batches, lambda model, batch: 1)  # type: ignore[arg-type, return-value]
    spectrum.lambda_maximum  # type: ignore[attr-defined]  # noqa: B018
    hpc_hess.spectrum  # type: ignore[attr-defined]  # noqa: B018
