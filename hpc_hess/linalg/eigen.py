"""Extreme eigenpairs in bounded memory: Lanczos with thick restarts, as a value with ``step()``.

Wu and Simon, "Thick-restart Lanczos method for large symmetric eigenvalue problems", SIAM J. Matrix Anal. Appl. 22 (2000).
A full basis is replaced by its best Ritz vectors and the residual's direction, so that

    A V = V T + beta v_next e_last^T

goes on to hold, T being diagonal where Ritz vectors are, with a row of couplings to the vector after them. Every new
vector is orthogonalised against the whole basis, locked vectors included: no copy of an eigenvalue (ghost) can appear.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from hpc_hess.errors import ConfigError, NumericsError
from hpc_hess.linalg.operator import LinearOperator
from hpc_hess.parallel.basis import Basis
from hpc_hess.parallel.vector import Vector

Which = Literal["largest", "smallest", "both", "magnitude"]
Float = NDArray[np.float64]


def num_wanted(count: int, which: Which) -> int:
    """Return how many pairs ``count`` stands for: so many of each end with "both"."""
    return 2 * count if which == "both" else count


def least_basis(count: int, which: Which) -> int:
    """Return the smallest basis that the pairs can be found in: themselves, and three vectors to search with."""
    return num_wanted(count, which) + 3


@dataclass
class ThickRestart:
    """Krylov state: the projected matrix T, the basis, the last residual norm beta.

    Parameters
    ----------
    operator : the symmetric operator.
    basis : rows for ``size`` + 1 vectors, in memory.
    size : of the basis; at least :func:`least_basis`.
    count : eigenpairs wanted; of each end with ``which`` = "both".
    which : "largest" and "smallest" by value, "magnitude" by absolute value.
    tolerance : of the residuals |A u - theta u|, relative to the largest |Ritz value|.

    Attributes
    ----------
    filled : basis vectors that T is complete for.
    num_products, num_restarts : so far.
    asymmetry : as in Lanczos.

    """

    operator: LinearOperator
    basis: Basis
    size: int
    count: int
    which: Which = "both"
    tolerance: float = 1e-3
    filled: int = 0
    beta: float = 0.0
    num_products: int = 0
    num_restarts: int = 0
    asymmetry: float = 0.0
    exhausted: bool = False
    projected: Float = field(default_factory=lambda: np.zeros((0, 0)))
    _solved: tuple[Float, Float] | None = None

    def __post_init__(self) -> None:
        """Check what was asked for. Raises ConfigError."""
        least = least_basis(self.count, self.which)
        if self.count < 1 or self.size < least:
            raise ConfigError(
                f'{self.count} pairs of which = "{self.which}" need a basis of at least {least}, not {self.size}'
            )
        self.projected = np.zeros((self.size, self.size))

    def start(self, vector: Vector) -> None:
        """Begin with ``vector`` normalised (scaled in place). Collective: yes. Raises NumericsError: it has no direction."""
        norm = vector.norm()
        if not (math.isfinite(norm) and norm > 0):
            raise NumericsError(f"the start vector has norm {norm}")
        self.basis[0] = vector.scale_(1.0 / norm)

    # -- a step --------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Restart if the basis is full; then one product and its orthogonalisation. Collective: yes.

        Raises
        ------
        NumericsError : the product is not finite.

        """
        if self.full:
            self.restart()
        self.advance(self.operator.matvec(self.basis[self.filled]))

    @property
    def full(self) -> bool:
        """Whether the next step must begin with a restart."""
        return self.filled == self.size

    def advance(self, w: Vector) -> None:
        """Finish the step with w = A v of vector number ``filled`` (overwritten). Collective: yes. Raises NumericsError."""
        j = self.filled
        coefficients, beta = self.basis.orthogonalise_(w, 0, j + 1)
        row = coefficients.numpy()
        if not (np.isfinite(row).all() and math.isfinite(beta)):
            raise NumericsError(f"product {self.num_products + 1} of the eigenpair search is not finite")
        if j:
            self.asymmetry = max(self.asymmetry, float(np.abs(row[:j] - self.projected[:j, j]).max()))
        self.projected[j, j], self._solved = row[j], None
        self.filled, self.beta, self.num_products = j + 1, beta, self.num_products + 1
        scale = float(np.abs(self.projected[: j + 1, : j + 1]).max()) + beta
        if beta <= 100 * torch.finfo(self.operator.space.dtype).eps * scale:
            self.beta, self.exhausted = 0.0, True  # an invariant space: what is left of w is rounding
            return
        self.basis[j + 1] = w.scale_(1.0 / beta)
        if j + 1 < self.size:
            self.projected[j, j + 1] = self.projected[j + 1, j] = beta

    def restart(self) -> None:
        """Keep the wanted Ritz vectors and as many beside them as pays, then the residual's direction. Collective: yes."""
        values, vectors = self._ritz()
        kept = self._kept(values)
        couplings = self.beta * vectors[-1, kept]
        self.basis.rotate_(torch.from_numpy(np.ascontiguousarray(vectors[:, kept].T)))
        number = len(kept)
        self.basis[number] = self.basis[self.size]
        self.projected[:], self._solved = 0.0, None
        self.projected[range(number), range(number)] = values[kept]
        self.projected[number, :number] = self.projected[:number, number] = couplings
        self.filled, self.num_restarts = number, self.num_restarts + 1

    def _kept(self, values: Float) -> list[int]:
        """Choose the Ritz values that survive a restart: more as pairs converge, so that the search does not stall.

        As ARPACK (Lehoucq, Sorensen, Yang 1998, section 5.1.2): one for each that has converged, up to half of the room; at
        least a fifth of it. With both ends, the one that has more pairs to go keeps more.
        """
        pairs, room = self.pairs(), self.size - self.num_wanted
        going = pairs.residuals > self.tolerance * pairs.scale
        extra = max(room // 5, min(int((~going).sum()), room // 2))
        if self.which != "both":
            return sorted(_first(values, self.num_wanted + extra, self.which))
        below, above = int(going[: self.count].sum()), int(going[self.count :].sum())
        low = round(extra * (below + 0.5) / (below + above + 1))
        return [*range(self.count + low), *range(len(values) - self.count - (extra - low), len(values))]

    @staticmethod
    def most_kept(size: int, count: int, which: Which) -> int:
        """Return how many vectors survive a restart at most."""
        wanted = num_wanted(count, which)
        return wanted + (size - wanted) // 2

    # -- to be kept and taken up ---------------------------------------------------------------------------------

    def to_state(self) -> dict[str, Any]:
        """Return, as JSON-able values, what a resume needs besides basis vectors 0..filled."""
        names = ("filled", "beta", "num_products", "num_restarts", "asymmetry", "exhausted")
        return {**{name: getattr(self, name) for name in names}, "projected": self.projected.tolist()}

    def from_state(self, state: dict[str, Any]) -> None:
        """Take up what :meth:`to_state` gave."""
        for name, value in state.items():
            setattr(self, name, np.array(value) if name == "projected" else value)
        self._solved = None

    # -- what has been found -------------------------------------------------------------------------------------

    @property
    def num_wanted(self) -> int:
        """Pairs that are wanted, of both ends together."""
        return num_wanted(self.count, self.which)

    def _ritz(self) -> tuple[Float, Float]:
        """Diagonalise T, once a step and the same on every rank: vectors are combined by it, and its signs are arbitrary."""
        if self._solved is None:
            own = np.linalg.eigh(self.projected[: self.filled, : self.filled])
            self._solved = self.operator.space.agreed((own.eigenvalues, own.eigenvectors), "Ritz pairs")
        return self._solved

    def pairs(self) -> Pairs:
        """Return the wanted Ritz pairs of the basis as it is (fewer than wanted at the beginning). Collective: yes."""
        values, vectors = self._ritz()
        if self.which == "both":
            low = min(self.count, len(values))
            chosen = sorted({*range(low), *range(max(0, len(values) - self.count), len(values))})
        else:
            chosen = sorted(_first(values, self.count, self.which))
        residuals = np.abs(self.beta * vectors[-1, chosen])
        return Pairs(values[chosen], residuals, vectors[:, chosen].T, float(np.abs(values).max()), self.basis)

    @property
    def finished(self) -> bool:
        """Whether every wanted pair has converged, or the Krylov space is exhausted (all exact then). Collective: yes."""
        if self.filled == 0:
            return False
        if self.exhausted:
            return True
        pairs = self.pairs()
        return len(pairs.values) == self.num_wanted and bool((pairs.residuals <= self.tolerance * pairs.scale).all())


@dataclass(frozen=True)
class Pairs:
    """Ritz pairs, ascending: ``values``, ``residuals`` |A u - theta u|; ``coefficients`` (pair, vector) in a basis."""

    values: Float
    residuals: Float
    coefficients: Float
    scale: float  # the largest |Ritz value|
    basis: Basis

    def vector(self, number: int) -> Vector:
        """Return Ritz vector ``number``, of norm 1 up to rounding. Collective: no."""
        return self.basis.combine(torch.from_numpy(self.coefficients[number].copy()))


def _first(values: Float, count: int, which: Which) -> NDArray[np.int64]:
    """Return the indices of the ``count`` values that matter most."""
    keys = {"largest": -values, "smallest": values, "magnitude": -np.abs(values)}
    return np.argsort(keys[which], kind="stable")[:count]


def eigenpairs(process: ThickRestart, most_products: int) -> Pairs:
    """Step until the pairs have converged or ``most_products`` were spent. Collective: yes."""
    while not process.finished and process.num_products < most_products:
        process.step()
    return process.pairs()
