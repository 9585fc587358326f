"""Class structure of the Gauss-Newton matrix (Papyan 2019, arXiv 1811.07062): class means, cross-class means, and the rest.

With p_iv the probability of class v for example i (of class c), and g_iv = J_i^T (p_i - e_v),

    G = 1/n sum_i sum_v p_iv g_iv g_iv^T.

For groups of examples c and of candidates c' (for a classifier: its classes; for a language model: tokens grouped into
classes) let P_cc' be the mean weight of their pairs and g_cc' the weighted mean of g_iv over them. Then

    A1 = sum_c P_c g_c g_c^T       of the mean over all c' other than c: the outliers
    A2 = sum_c P_cc g_cc g_cc^T    of the examples' own class
    B1 = sum_{c' != c} P_cc' (g_cc' - g_c) (g_cc' - g_c)^T    between the other classes
    B2 = G - A1 - A2 - B1          within the groups

Since sum_v p_iv g_iv = 0, P_c g_c = -P_cc g_cc: A1 and A2 need one backward pass a class, and lie in the same span. Weights
are those of the data, so classes need not be balanced.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import nn

from hpc_hess.linalg.operator import LinearOperator
from hpc_hess.model.sharded.loss import Contribution
from hpc_hess.parallel.basis import Basis
from hpc_hess.parallel.vector import Vector

Float = NDArray[np.float64]
Cotangent = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (logits (n, V), targets (n,)) -> (n, V), detached


class LogitSource(Protocol):
    """A classifier's logits: of images, or of the tokens of a causal LM."""

    num_micro_batches: int
    num_tokens: int  # examples of the whole data set, over all ranks

    def logits_and_targets(self, module: nn.Module, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits (n, V) and targets (n,) of a micro-batch; a target of -100 does not count."""
        ...


class Pullback:
    """The objective whose gradient is J^T u / n for cotangents u at the logits. Satisfies model.sharded.loss.Objective."""

    def __init__(self, source: LogitSource, cotangent: Cotangent) -> None:
        self._source, self._cotangent = source, cotangent
        self.num_micro_batches = source.num_micro_batches

    def contribution(self, module: nn.Module, index: int) -> Contribution:
        """Return <logits, u> / n of a micro-batch, with u held fixed. Collective when the module is sharded."""
        logits, targets = self._source.logits_and_targets(module, index)
        counted = targets != -100
        with torch.no_grad():
            u = self._cotangent(logits.detach(), targets.clamp_min(0)) * counted[:, None]
        total = (logits * u).sum() / self._source.num_tokens
        return Contribution(total, total.detach().reshape(1), [index])


@dataclass(frozen=True)
class Groups:
    """``of``: the group of each of the V classes, int64 (V,); 0..count-1.

    ``without_examples``: so many of the last groups are of candidates only: no example belongs to their classes.
    """

    of: torch.Tensor
    count: int
    without_examples: int = 0

    @property
    def of_examples(self) -> int:
        """Number of groups that examples may belong to, the first ones."""
        return self.count - self.without_examples

    def probabilities(self, p: torch.Tensor) -> torch.Tensor:
        """Return the probability of each group, (n, count), from those of the classes, (n, V)."""
        return p.new_zeros(len(p), self.count).index_add_(1, self.of.to(p.device), p)

    def pair(self, first: int, second: int) -> Cotangent:
        """Return the cotangent of P g for examples of group ``first`` and candidates of group ``second``.

        sum over v in c' of p_v (p - e_v) = p_c' p - (p on c').
        """

        def cotangent(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            of = self.of.to(logits.device)
            p = logits.double().softmax(-1)
            inside = (of == second).to(p.dtype)
            u = (p @ inside)[:, None] * p - p * inside
            return (u * (of[targets] == first)[:, None]).to(logits.dtype)

        return cotangent


def most_frequent(counts: NDArray[np.int64], number: int) -> tuple[Groups, list[int]]:
    """Group V tokens: each of the ``number`` most frequent ones alone, and all others together, as the last group.

    Tokens that do not occur are among the others; where only those are left, the last group is without examples.
    """
    order = [int(k) for k in np.argsort(-counts, kind="stable")[:number] if counts[k] > 0]
    of = torch.full((len(counts),), len(order), dtype=torch.int64)
    of[order] = torch.arange(len(order))
    everything = int(np.count_nonzero(counts)) == len(order)
    return Groups(of, len(order) + 1, without_examples=int(everything)), order


def weights(
    source: LogitSource,
    module: nn.Module,
    groups: Groups,
    total: Callable[[torch.Tensor], torch.Tensor],
    guard: Callable[[str], AbstractContextManager[Any]] = nullcontext,
) -> Float:
    """Return P_cc' (of_examples, count): mean over all examples.

    ``total`` sums over ranks; ``guard`` is World.guard, for the collectives of each forward pass. Collective: as these.
    """
    sums = torch.zeros(groups.of_examples, groups.count, dtype=torch.float64)
    for index in range(source.num_micro_batches):
        with torch.no_grad(), guard(f"weights of classes, micro-batch {index + 1} of {source.num_micro_batches}"):
            logits, targets = source.logits_and_targets(module, index)
            counted = targets != -100
            p = groups.probabilities(logits[counted].double().softmax(-1)).cpu()
            sums.index_add_(0, groups.of[targets[counted].cpu()], p)
    return total(sums.flatten()).view_as(sums).numpy() / source.num_tokens


class LowRank:
    """sum_k w_k s_k s_k^T for the first rows s of a basis."""

    def __init__(self, basis: Basis, scale: ArrayLike) -> None:
        self.space, self.basis, self.scale = basis.space, basis, np.asarray(scale, np.float64)

    def matvec(self, v: Vector) -> Vector:
        """Return the product as a new Vector. Collective: yes."""
        count = len(self.scale)
        return self.basis.combine(self.basis.dots(v, count) * torch.from_numpy(self.scale))

    def eigenvalues(self) -> Float:
        """Return the nonzero eigenvalues, ascending, from the Gram matrix of the rows. Collective: yes."""
        count, root = len(self.scale), np.sqrt(self.scale)
        gram = np.stack([self.basis.dots(self.basis[k], count).numpy() for k in range(count)])
        return np.linalg.eigvalsh(root[:, None] * gram * root)


class Difference:
    """A - B."""

    def __init__(self, a: LinearOperator, b: LinearOperator) -> None:
        self.space, self._a, self._b = a.space, a, b

    def matvec(self, v: Vector) -> Vector:
        """Return the product as a new Vector. Collective: yes."""
        return self._a.matvec(v).axpy_(-1.0, self._b.matvec(v))


@dataclass(frozen=True)
class ClassMeans:
    """A1 and A2, which share their rows s_c = P_c g_c; ``pairs``: P_cc'."""

    a1: LowRank
    a2: LowRank
    pairs: Float

    @property
    def both(self) -> LowRank:
        """A1 + A2."""
        return LowRank(self.a1.basis, self.a1.scale + self.a2.scale)


def class_means(pull: Callable[[Cotangent], Vector], groups: Groups, pairs: Float, basis: Basis) -> ClassMeans:
    """Fill ``basis`` (a row a group of examples) with s_c, by one backward pass each; return A1 and A2. Collective: yes."""
    for c in range(groups.of_examples):
        basis[c] = pull(groups.pair(c, c)).scale_(-1.0)
    own = np.diag(pairs)
    others = pairs.sum(1) - own

    def inverse(x: Float) -> Float:
        return np.divide(1.0, x, out=np.zeros_like(x), where=x > 0)

    return ClassMeans(LowRank(basis, inverse(others)), LowRank(basis, inverse(own)), pairs)


def cross_class(
    pull: Callable[[Cotangent], Vector], groups: Groups, means: ClassMeans, rows: Basis, basis: Basis
) -> LowRank:
    """Return B1, by a backward pass for each pair of groups. Collective: yes.

    Parameters
    ----------
    rows : the basis of ``means``.
    basis : of_examples * (count - 1) rows, filled here with P_cc' (g_cc' - g_c) and divided by P_cc' in the product.

    """
    pairs, own = means.pairs, np.diag(means.pairs)
    others = pairs.sum(1) - own
    scale: list[float] = []
    for c in range(groups.of_examples):
        for other in range(groups.count):
            if other == c:
                continue
            weight = float(pairs[c, other])
            row = pull(groups.pair(c, other))
            if weight > 0:
                row.axpy_(-weight / float(others[c]), rows[c])
            basis[len(scale)] = row
            scale.append(1.0 / weight if weight > 0 else 0.0)
    return LowRank(basis, scale)
