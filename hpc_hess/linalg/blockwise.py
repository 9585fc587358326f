"""The block-diagonal part of a matrix, block(A) = sum_b P_b A P_b for the blocks of a partition: products and spectra."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from hpc_hess.linalg import probes
from hpc_hess.linalg.keeping import Keep
from hpc_hess.linalg.operator import LinearOperator, products
from hpc_hess.linalg.quadrature import Ritz, ritz
from hpc_hess.parallel.basis import Basis
from hpc_hess.parallel.partition import Partition
from hpc_hess.parallel.vector import Vector

Float = NDArray[np.float64]
_STREAM = 1 << 18  # signs of blocks, apart from the probes
_ROUNDING = 100


def block_product(operator: LinearOperator, blocks: Partition, v: Vector, columns: int = 1) -> Vector:
    """Return block(A) v by one product for each block, ``columns`` of them at a time. Collective: yes."""
    out = operator.space.zeros()
    for first in range(0, blocks.count, columns):
        some = range(first, min(first + columns, blocks.count))
        for block, image in zip(some, products(operator, [blocks.only(v, block) for block in some]), strict=True):
            out.axpy_(1.0, blocks.only(image, block))
    return out


def block_samples(operator: LinearOperator, blocks: Partition, v: Vector, seed: int, samples: Sequence[int]) -> list[Vector]:
    """Return D A D v for some D with a random sign for each block on the diagonal: block(A) v on average. Collective: yes.

    Its part in block b is the sum of d_b d_c A_bc v_c over all blocks c, and E[d_b d_c] is 1 for b = c and 0 otherwise: any
    number of blocks costs one product.
    """
    signs = [probes.signs(seed, _STREAM + sample, 0, blocks.count) for sample in samples]
    images = products(operator, [blocks.scaled(v, d) for d in signs])
    return [blocks.scaled(image, d) for image, d in zip(images, signs, strict=True)]


@dataclass(frozen=True)
class Comparison:
    """block(A) v against A v: relative error |block(A) v - A v| / |A v| and cosine, with standard errors (0: exact)."""

    relative_error: float
    relative_error_stderr: float
    cosine: float
    cosine_stderr: float
    num_products: int


def compare_exact(image: Vector, block_image: Vector, num_products: int) -> Comparison:
    """Compare A v with block(A) v. Collective: yes."""
    error, cosine = _error_and_cosine(image.dot(image), image.dot(block_image), block_image.dot(block_image))
    return Comparison(error, 0.0, cosine, 0.0, num_products)


def compare_sampled(image: Vector, samples: Basis, count: int) -> Comparison:
    """Compare A v with block(A) v, known by ``count`` samples (:func:`block_samples`). Collective: yes.

    <y_s, A v> is unbiased for <block(A) v, A v>, and <y_s, y_t> of two samples for |block(A) v|^2: the mean of the samples
    itself would be too long. Standard errors by the jackknife.
    """
    along = np.array(samples.dots(image, count).tolist())
    gram = np.stack([samples.dots(samples[k], count).numpy() for k in range(count)])
    aa = image.dot(image)

    def both(kept: Sequence[int]) -> Float:
        n, inside = len(kept), gram[np.ix_(kept, kept)]
        bb = (inside.sum() - np.trace(inside)) / (n * (n - 1))
        return np.array(_error_and_cosine(aa, float(along[list(kept)].mean()), float(bb)))

    everything = range(count)
    value = both(everything)
    if count < 3:
        return Comparison(float(value[0]), float("nan"), float(value[1]), float("nan"), count)
    left_out = np.stack([both([k for k in everything if k != out]) for out in everything])
    spread = np.sqrt((count - 1) * left_out.var(axis=0))
    return Comparison(float(value[0]), float(spread[0]), float(value[1]), float(spread[1]), count)


def _error_and_cosine(aa: float, ab: float, bb: float) -> tuple[float, float]:
    """Return |b - a| / |a| and the cosine, from squared norms and the inner product; 0 where an estimate is negative."""
    bb = max(bb, 0.0)
    error = np.sqrt(max(aa - 2 * ab + bb, 0.0) / aa) if aa else 0.0
    cosine = ab / np.sqrt(aa * bb) if aa * bb else 0.0
    return float(error), float(np.clip(cosine, -1.0, 1.0))


def block_spectra(
    operator: LinearOperator, blocks: Partition, basis: Basis, start: Vector, steps: int, keep: Keep, columns: int = 1
) -> list[Ritz]:
    """Return a Lanczos quadrature of every block P_b A P_b, from the part of ``start`` in it. Collective: yes.

    The processes of all blocks advance together: a basis row holds a vector of each, for they lie in different entries. A
    step costs a product for each block, and the memory is that of one process. Full reorthogonalisation, twice.
    Together, weighted by size, they are a quadrature of block(A).

    Parameters
    ----------
    basis : ``steps`` rows.

    """
    eps = torch.finfo(operator.space.dtype).eps
    norms = blocks.dots(start, start).sqrt()
    basis[0] = blocks.scaled(start, _inverse(norms))
    alphas: list[torch.Tensor] = []
    betas: list[torch.Tensor] = []
    lengths = torch.where(norms > 0, steps, 0)
    for step in range(steps):
        w = keep.vector(partial(block_product, operator, blocks, basis[step], columns))
        alpha = torch.zeros(blocks.count, dtype=torch.float64)
        for _ in range(2):
            for j in range(step, -1, -1):
                v = basis[j]
                c = blocks.dots(v, w)
                w.axpy_(-1.0, blocks.scaled(v, c))
                if j == step:
                    alpha += c
        beta = blocks.dots(w, w).sqrt()
        alphas.append(alpha)
        betas.append(beta)
        scale = torch.stack(alphas).abs().amax(0) + torch.stack(betas).amax(0)
        ended = (beta <= _ROUNDING * eps * scale) & (lengths > step + 1)
        lengths = torch.where(ended, step + 1, lengths)
        if step + 1 < steps:
            basis[step + 1] = blocks.scaled(w, torch.where(lengths > step + 1, _inverse(beta), 0.0))
    alpha_of, beta_of = torch.stack(alphas).numpy(), torch.stack(betas).numpy()
    nothing = Ritz(np.empty(0), np.empty(0), np.empty(0))
    return [ritz(alpha_of[:n, b], beta_of[:n, b]) if n else nothing for b, n in enumerate(lengths.tolist())]


def _inverse(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x > 0, 1 / x.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
