"""Papyan's figure, small and whole: a convolutional classifier of scikit-learn's digits, all eigenvalues exact.

G has C - 1 outliers. They live in the span of the class means: projected out, nothing stands out any more. Subtracting A1
and A2 alone leaves most of them, which belong to the means of pairs of classes (B1). Needs scikit-learn (``pip install
scikit-learn``).
"""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn.functional import cross_entropy

import hpc_hess
from benchmarks.frame import Table, benchmark
from hpc_hess.api.classifiers import Batch, Decomposition, decompose
from hpc_hess.linalg.density import symlog
from hpc_hess.report.style import CYCLE, MUTED, STYLE, set_symlog

CLASSES = 10


def digits(per_class: int) -> tuple[list[Batch], list[Batch]]:
    """Return ``per_class`` digits of each class to train on, in batches, and all others."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(images).double().view(-1, 1, 8, 8) / 16
    y = torch.from_numpy(labels).long()
    train = torch.cat([(y == c).nonzero().flatten()[:per_class] for c in range(CLASSES)])
    rest = torch.ones(len(y), dtype=torch.bool)
    rest[train] = False
    return list(zip(x[train].split(1000), y[train].split(1000), strict=True)), [(x[rest], y[rest])]


def network(seed: int) -> nn.Module:
    """Return a convolutional network of 1,898 parameters, without normalisation or dropout: a function of its weights."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64, CLASSES),
    ).double()


def train(model: nn.Module, batches: list[Batch], epochs: int) -> None:
    """Run full-batch Adam, then leave the model where it is."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(epochs):
        optimizer.zero_grad()
        for x, y in batches:
            cross_entropy(model(x), y).mul(len(y) / sum(len(b[1]) for b in batches)).backward()
        optimizer.step()


def accuracy(model: nn.Module, batches: list[Batch]) -> float:
    """Return the share of right answers."""
    with torch.no_grad():
        return float(torch.cat([(model(x).argmax(1) == y).double() for x, y in batches]).mean())


def dense(operator: Any) -> np.ndarray:
    """Return the matrix of an operator."""
    columns = np.stack([operator @ column for column in np.eye(operator.shape[0])])
    return 0.5 * (columns + columns.T)


def draw(spectra: dict[str, np.ndarray], a1: np.ndarray, path: Any) -> None:
    """Draw a histogram of each spectrum on one symmetric-log axis, with the eigenvalues of A1 as marks."""
    every = np.concatenate(list(spectra.values()))
    linear = 1e-5 * np.abs(every).max()
    low, high = (float(symlog([v], linear)[0]) for v in (every.min() * 1.3, every.max() * 1.3))
    bins = np.linspace(low, high, 160)
    with mpl.rc_context(STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(8.4, 10), layout="constrained")
        panels = figure.subplots(len(spectra), 1, sharex=True)
        for k, (axes, (name, values)) in enumerate(zip(panels, spectra.items(), strict=True)):
            axes.hist(symlog(values, linear), bins=list(bins), color=CYCLE[k], log=True)
            axes.set_ylim(0.6, len(values))
            axes.set_ylabel("eigenvalues")
            axes.text(0.01, 0.97, name, transform=axes.transAxes, va="top")
            if name == "G":
                axes.plot(symlog(a1, linear), np.full(len(a1), 3.0), "v", color=MUTED, markersize=5)
        set_symlog(panels[-1], "x", float(every.min() * 1.3), float(every.max() * 1.3), linear)
        panels[-1].set_xlabel("eigenvalue λ, symmetric-log axis; triangles: the eigenvalues of A1 + A2, the class means")
        figure.savefig(path, dpi=130)


def spectra_of(parts: Decomposition) -> dict[str, np.ndarray]:
    """Return the eigenvalues of the matrix and of its parts."""
    h, g, means = dense(parts.hessian), dense(parts.gauss_newton), parts.means.both
    rows = np.stack([means.basis[k].data.numpy() for k in range(CLASSES)])
    q = np.linalg.qr(rows.T)[0]
    outside = np.eye(len(g)) - q @ q.T
    pairs = np.stack([parts.cross.basis[k].data.numpy() for k in range(CLASSES * (CLASSES - 1))])
    without = g - (rows.T * means.scale) @ rows
    matrices = {
        "H": h,
        "G": g,
        "H - G": h - g,
        "G - A1 - A2": without,
        "G - A1 - A2 - B1": without - (pairs.T * parts.cross.scale) @ pairs,
        "G with the class means projected out": outside @ g @ outside,
    }
    return {name: np.linalg.eigvalsh(matrix) for name, matrix in matrices.items()}


@benchmark(
    "Class structure of a digits classifier's Hessian",
    note="![Spectra](papyan_digits.png)",
    asked={"eigenvalues of G above*": "about 10", "eigenvalue C - 1 of G over the largest*": "> 1"},
)
def main(table: Table, per_class: int = 30, epochs: int = 20) -> None:
    table.settings |= {"examples": per_class * CLASSES, "optimizer": "Adam, full batch", "dtype": "float64"}
    training, rest = digits(per_class)
    model = network(0)
    train(model, training, epochs)
    model.eval()
    parts = decompose(model, training, CLASSES)
    spectra = spectra_of(parts)
    means = parts.means.both.eigenvalues()
    g, knocked_out = spectra["G"], spectra["G with the class means projected out"]
    slq = hpc_hess.slq(parts.gauss_newton, steps=60, probes=1)
    last, next_ = float(g[-CLASSES + 1]), float(g[-CLASSES])
    table.measured("accuracy on the digits not trained on", accuracy(model, rest))
    table.measured("parameters", len(g))
    count = int((g > 1.05 * knocked_out[-1]).sum())
    table.measured("eigenvalues of G above the largest without the class means' span", count)
    table.measured("eigenvalue C - 1 of G over eigenvalue C: the gap", last / next_)
    table.measured("eigenvalue C - 1 of G over the largest without the class means' span", last / float(knocked_out[-1]))
    table.measured("largest of G", float(g[-1]))
    for name in list(spectra)[3:]:
        table.measured(f"largest of {name}", float(spectra[name][-1]))
    table.measured("share of tr G in A1 + A2", float(means.sum() / g.sum()))
    table.measured("largest eigenvalue of G by slq, 60 steps, relative error", float(abs(slq.lambda_max - g[-1]) / g[-1]))
    draw(spectra, means, table.folder / "papyan_digits.png")


if __name__ == "__main__":
    main()
