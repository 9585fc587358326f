"""Extreme eigenpairs in bounded memory: Lanczos with thick restarts, as a value with ``step()``.

Wu and Simon, "Thick-restart Lanczos method for large symmetric eigenvalue problems", SIAM J. Matrix Anal. Appl. 22 (2000).
A full basis is replaced by its best Ritz vectors and the residual's direction, so that

    A V = V T + beta v_next e_last^T

goes on to hold, T being diagonal where Ritz vectors are, with a row of couplings to the vector after them. Every new
vector is orthogonalised against the whole basis, locked vectors included: no copy of an eigenvalue (ghost) can appear.

A Krylov space holds one vector of each eigenspace, so an eigenvalue's other copies are not in it. They are found from new
random directions, orthogonal to what is known: one where the space is exhausted before all pairs are there, and, with
``copies``, one after all have converged, until a direction finds nothing more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from hpc_hess.errors import ConfigError, NumericsError
from hpc_hess.linalg import probes
from hpc_hess.linalg.operator import Enough, LinearOperator
from hpc_hess.linalg.wanted import Float, Wanted, Which, least_basis, risk_of_missing
from hpc_hess.parallel.basis import Basis
from hpc_hess.parallel.vector import Vector

_RISK = 0.01  # that a direction is believed to find nothing more, though there is a copy


@dataclass
class ThickRestart:
    """Krylov state: the projected matrix T, the basis, the last residual norm beta.

    Parameters
    ----------
    operator : the symmetric operator.
    basis : rows for ``size`` + 1 vectors, in memory.
    size : of the basis; at least :func:`least_basis`, or the dimension of the space where that is smaller.
    count : eigenpairs wanted; of each end with ``which`` = "both".
    which : "largest" and "smallest" by value, "magnitude" by absolute value.
    tolerance : of the residuals |A u - theta u|, relative to the largest |Ritz value|.
    copies : search for copies of the pairs that were found, too.
    seed : of the new directions.

    Attributes
    ----------
    filled : basis vectors that T is complete for.
    num_products, num_restarts : so far.
    asymmetry : as in Lanczos.
    exhausted : the Krylov space of the last direction is: its Ritz pairs are exact.
    directions : new directions drawn so far.
    locked : basis vectors that were there when the last one was drawn.
    known, dropped : the wanted values then, and the residuals that the locked vectors were left with.
    looks : steps that the last direction took before a restart.

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
    copies: bool = False
    seed: int = 0
    directions: int = 0
    locked: int = 0
    known: list[float] = field(default_factory=list)
    dropped: list[float] = field(default_factory=list)
    looks: int = 0
    _solved: tuple[Float, Float] | None = None

    def __post_init__(self) -> None:
        """Check what was asked for. Raises ConfigError."""
        dimension = self.operator.space.size
        if not 1 <= self.count <= dimension:
            raise ConfigError(f"{self.count} pairs were asked for: the matrix has {dimension}")
        least = min(least_basis(self.count, self.which), dimension)
        if self.size < least:
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
        """Restart if it is time to; then one product and its orthogonalisation. Collective: yes.

        Raises
        ------
        NumericsError : the product is not finite.

        """
        if self.full:
            self.restart()
        self.advance(self.operator.matvec(self.basis[self.filled]))

    @property
    def full(self) -> bool:
        """Whether the next step must begin with a restart. Collective: yes."""
        return self.filled == self.size or self._told

    @property
    def has_next(self) -> bool:
        """Whether the vector after the ``filled`` ones is there: not where the space is exhausted, until a new direction."""
        return not self.exhausted or bool(self.directions and self.filled == self.locked)

    @property
    def spanned(self) -> bool:
        """Whether the basis spans the whole space: every pair is known, and exact."""
        return self.filled == self.operator.space.size

    def advance(self, w: Vector) -> None:
        """Finish the step with w = A v of vector number ``filled`` (overwritten). Collective: yes. Raises NumericsError."""
        j, locked = self.filled, self.locked
        coefficients, beta = self.basis.orthogonalise_(w, 0, j + 1)
        row = coefficients.numpy()
        if not (np.isfinite(row).all() and math.isfinite(beta)):
            raise NumericsError(f"product {self.num_products + 1} of the eigenpair search is not finite")
        if j > locked:
            difference = row[locked:j] - self.projected[locked:j, j]
            self.asymmetry = max(self.asymmetry, float(np.abs(difference).max()))
        self.projected[:locked, j] = self.projected[j, :locked] = row[:locked]  # below the tolerance, but known
        self.projected[j, j], self._solved = row[j], None
        self.looks += self.looks == j - locked  # a restart takes j back
        self.filled, self.beta, self.num_products = j + 1, beta, self.num_products + 1
        scale = float(np.abs(self.projected[: j + 1, : j + 1]).max()) + beta
        self.exhausted = self.spanned or beta <= 100 * torch.finfo(self.operator.space.dtype).eps * scale
        if not self.exhausted:
            self.basis[j + 1] = w.scale_(1.0 / beta)
            if j + 1 < self.size:
                self.projected[j, j + 1] = self.projected[j + 1, j] = beta
            return
        self.beta = 0.0  # an invariant space: what is left of w is rounding
        if not self.finished and (self.filled < self._most or self.size >= self.operator.space.size):
            self._turn()

    def restart(self) -> None:
        """Keep the wanted Ritz vectors and as many beside them as pays, then the residual's direction. Collective: yes.

        Or a new direction after the wanted ones, where the last has told what it could.
        """
        if self._told:
            pairs, (values, vectors) = self.pairs(), self._ritz()
            self._keep(values, vectors, 0, self.wanted.of(values))
            self.dropped = pairs.residuals.tolist()
            self._turn()
        elif self.locked and not self._changed:
            values, vectors = self._last()
            kept = max(1, min((self.size - self.locked) // 2, self._most - self.locked))
            self._keep(values, vectors, self.locked, self.wanted.ends(np.abs(vectors[-1]), kept))
        else:
            values, vectors = self._ritz()
            pairs = self.pairs()
            kept_ones = self.wanted.kept(values, pairs.residuals > self.tolerance * pairs.scale, self.size)
            self.dropped = (np.array(self.dropped) @ vectors[: self.locked, kept_ones]).tolist() if self.locked else []
            self._keep(values, vectors, 0, kept_ones)
            self.locked, self.known = 0, []
        self.num_restarts += 1

    def _keep(self, values: Float, vectors: Float, first: int, kept: list[int]) -> None:
        """Replace the vectors from ``first`` on by the Ritz vectors ``kept`` of their part of T, and the residual's."""
        number, chosen = first + len(kept), vectors[:, kept]
        couplings, before = self.beta * chosen[-1], self.projected[:first, first : self.filled] @ chosen
        matrix = np.eye(number, self.filled)
        matrix[first:, first:] = chosen.T
        self.basis.rotate_(torch.from_numpy(np.ascontiguousarray(matrix)))
        self.basis[number] = self.basis[self.filled]
        self.projected[first:], self.projected[:, first:], self._solved = 0.0, 0.0, None
        self.projected[range(first, number), range(first, number)] = values[kept]
        self.projected[:first, first:number], self.projected[first:number, :first] = before, before.T
        self.projected[number, first:number] = self.projected[first:number, number] = couplings
        self.filled = number

    # -- new directions ------------------------------------------------------------------------------------------

    def _turn(self) -> None:
        """Go on with a new direction, orthogonal to the basis. Collective: yes."""
        filled = self.filled
        self.dropped += [0.0] * (filled - len(self.dropped))
        self.projected[filled:], self.projected[:, filled:] = 0.0, 0.0
        self.directions, self.locked, self.looks, self.beta = self.directions + 1, filled, 0, 0.0
        self._solved = None
        self.known = self.pairs().values.tolist()
        new = probes.draw(self.operator.space, seed=self.seed, probe=self.directions, distribution="gaussian")
        _, norm = self.basis.orthogonalise_(new, 0, filled)
        self.basis[filled] = new.scale_(1.0 / norm)

    @property
    def wanted(self) -> Wanted:
        """What is searched for."""
        return Wanted(self.count, self.which, self.operator.space.size)

    @property
    def num_wanted(self) -> int:
        """Pairs that are wanted, of both ends together."""
        return self.wanted.number

    @property
    def _most(self) -> int:
        return self.wanted.most_kept(self.size)

    @property
    def _told(self) -> bool:
        """Whether to go on from a new direction: all has converged, or the space is exhausted. Collective: yes."""
        if self.filled == self.locked or self.finished:
            return False
        if self.exhausted and not self.has_next:
            return True
        # twice as well, as the residuals that are dropped add to those that the next direction leaves
        return self._within(0.5 * self.tolerance) and (not self.directions or self._changed)

    @property
    def _changed(self) -> bool:
        """Whether the last direction has changed the wanted pairs."""
        pairs = self.pairs()
        if len(self.known) < len(pairs.values):
            return True
        return bool(np.abs(pairs.values - self.known).max() > self.tolerance * pairs.scale)

    @property
    def complete(self) -> bool:
        """Whether all pairs have converged and none is missing, copies of an eigenvalue included. Collective: yes.

        The last direction was a new one and has changed nothing; and its own best Ritz pair has converged, or it has
        made too many steps to have missed one (:func:`risk_of_missing`).
        """
        if self.spanned:
            return True
        if not self.directions or self.filled == self.locked or not self.converged or self._changed:
            return False
        if self.exhausted:
            return True
        pairs, (values, vectors), (everything, _) = self.pairs(), self._last(), self._ritz()
        slack, residuals = self.tolerance * pairs.scale, self._beyond(vectors)

        def nothing_beyond(sign: int, edge: float) -> bool:
            """Whether the last direction has no eigenvalue beyond ``edge`` at the end ``sign``."""
            best, lowest = int(np.argmax(sign * values)), float((sign * everything).min())
            share = (edge + slack - sign * float(values[best])) / (edge + slack - lowest)
            risk = risk_of_missing(share, self.looks, self.wanted.dimension)
            return bool(residuals[best] <= slack) or risk <= _RISK

        return all(nothing_beyond(sign, edge) for sign, edge in self.wanted.edges(pairs.values))

    @staticmethod
    def most_kept(size: int, count: int, which: Which) -> int:
        """Return how many vectors survive a restart at most."""
        return Wanted(count, which, size).most_kept(size)

    # -- to be kept and taken up ---------------------------------------------------------------------------------

    def to_state(self) -> dict[str, Any]:
        """Return, as JSON-able values, what a resume needs besides basis vectors 0..filled."""
        names = (
            "filled",
            "beta",
            "num_products",
            "num_restarts",
            "asymmetry",
            "exhausted",
            "directions",
            "locked",
            "known",
            "dropped",
            "looks",
        )
        return {**{name: getattr(self, name) for name in names}, "projected": self.projected.tolist()}

    def from_state(self, state: dict[str, Any]) -> None:
        """Take up what :meth:`to_state` gave."""
        for name, value in state.items():
            setattr(self, name, np.array(value) if name == "projected" else value)
        self._solved = None

    # -- what has been found -------------------------------------------------------------------------------------

    def _last(self) -> tuple[Float, Float]:
        """Return the Ritz pairs of the last direction alone. Collective: yes."""
        mine = slice(self.locked, self.filled)
        own = np.linalg.eigh(self.projected[mine, mine])
        return self.operator.space.agreed((own.eigenvalues, own.eigenvectors), "Ritz pairs of a direction")

    def _ritz(self) -> tuple[Float, Float]:
        """Diagonalise T, once a step and the same on every rank: vectors are combined by it, and its signs are arbitrary."""
        if self._solved is None:
            own = np.linalg.eigh(self.projected[: self.filled, : self.filled])
            self._solved = self.operator.space.agreed((own.eigenvalues, own.eigenvectors), "Ritz pairs")
        return self._solved

    def _beyond(self, vectors: Float) -> Float:
        """Return how far A takes the newest vectors, combined by columns, out of the basis: by beta, or by the couplings."""
        if self.filled == self.size:
            return np.abs(self.beta * vectors[-1])
        return np.abs(self.projected[self.filled, self.filled - len(vectors) : self.filled] @ vectors)

    def pairs(self) -> Pairs:
        """Return the wanted Ritz pairs of the basis as it is (fewer than wanted at the beginning). Collective: yes."""
        values, vectors = self._ritz()
        chosen = self.wanted.of(values)
        residuals = self._beyond(vectors[:, chosen])
        if any(self.dropped):
            residuals += np.abs(np.array(self.dropped) @ vectors[: len(self.dropped), chosen])
        return Pairs(values[chosen], residuals, vectors[:, chosen].T, float(np.abs(values).max()), self.basis)

    @property
    def converged(self) -> bool:
        """Whether as many pairs as are wanted have residuals within the tolerance. Collective: yes."""
        return self._within(self.tolerance)

    def _within(self, tolerance: float) -> bool:
        if self.filled == 0:
            return False
        pairs = self.pairs()
        return len(pairs.values) == self.wanted.number and bool((pairs.residuals <= tolerance * pairs.scale).all())

    @property
    def finished(self) -> bool:
        """Whether there is nothing more to do: all have converged and, with ``copies``, none is missing. Collective: yes."""
        return self.converged and (self.complete or not self.copies)


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


def eigenpairs(process: ThickRestart, most_products: int) -> Pairs:
    """Step until the search has finished, ``most_products`` were spent, or Enough. Collective: yes."""
    while not process.finished and process.num_products < most_products:
        try:
            process.step()
        except Enough:
            if not process.filled:
                raise
            break
    return process.pairs()
