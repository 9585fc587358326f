"""The Lanczos process as a value with ``step()``: A V = V T + beta_m v_{m+1} e_m^T.

Reorthogonalisation "full" is classical Gram-Schmidt with two passes against every earlier vector, a number r against
the last r vectors, "none" the three-term recurrence of Paige (1972), which keeps two vectors.

Processes of one operator can advance in lock-step: :func:`next_products` for all, then ``advance`` for each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from hpc_hess.errors import NumericsError
from hpc_hess.linalg.operator import LinearOperator, products
from hpc_hess.parallel.basis import Basis
from hpc_hess.parallel.vector import Vector

Reorthogonalise = int | str  # "full", "none" or a window


@dataclass(frozen=True)
class Window:
    """Which of its vectors v_0, v_1, ... a process of ``steps`` steps reads and keeps."""

    rule: Reorthogonalise
    steps: int

    @property
    def length(self) -> int:
        """The most vectors that a step reads; at least two, for the three-term recurrence."""
        if self.rule == "full":
            return self.steps
        return 2 if self.rule == "none" else max(2, int(self.rule))

    def reads(self, j: int) -> range:
        """Return the vectors that step ``j`` (0, 1, ...) reads; v_j is the last one."""
        return range(max(0, j + 1 - self.length), j + 1)

    @property
    def rows(self) -> int:
        """Basis rows: one more than a step reads, so that v_{j+1} never overwrites what a resume of step j needs."""
        return min(self.steps, self.length + 1)


def basis_rows(reorthogonalise: Reorthogonalise, steps: int) -> int:
    """Return how many basis rows a process of ``steps`` steps keeps."""
    return Window(reorthogonalise, steps).rows


@dataclass
class Lanczos:
    """Krylov state: ``alpha`` (diagonal of T), ``beta`` (off-diagonal; the last one is the residual norm), the basis.

    Parameters
    ----------
    operator : the symmetric operator.
    basis : rows for :func:`basis_rows` vectors of the operator's space.
    steps : where the process ends.
    reorthogonalise : "full", "none" or a window.

    Attributes
    ----------
    broke_down : the Krylov space is exhausted.
    asymmetry : largest |<v_{j-1}, A v_j> - <v_j, A v_{j-1}>| seen (with reorthogonalisation): the product's error.

    """

    operator: LinearOperator
    basis: Basis
    steps: int
    reorthogonalise: Reorthogonalise = "full"
    alpha: list[float] = field(default_factory=list)
    beta: list[float] = field(default_factory=list)
    broke_down: bool = False
    asymmetry: float = 0.0

    @property
    def step_count(self) -> int:
        """Completed steps."""
        return len(self.alpha)

    @property
    def window(self) -> Window:
        """Which vectors the steps read."""
        return Window(self.reorthogonalise, self.steps)

    @property
    def finished(self) -> bool:
        """Whether all steps are done or the Krylov space is exhausted (a breakdown: every Ritz value is exact)."""
        return self.broke_down or self.step_count >= self.steps

    def start(self, vector: Vector) -> None:
        """Begin with ``vector`` normalised (the caller's vector is scaled in place). Collective: yes.

        Raises
        ------
        NumericsError : the vector is zero or not finite.

        """
        norm = vector.norm()
        if not (math.isfinite(norm) and norm > 0):
            raise NumericsError(f"the start vector has norm {norm}")
        self.alpha, self.beta, self.broke_down, self.asymmetry = [], [], False, 0.0
        self.basis[0] = vector.scale_(1.0 / norm)

    def rows_needed(self) -> list[int]:
        """Vectors that the next step reads: what a resume must find in the store."""
        return list(self.window.reads(min(self.step_count, self.steps - 1)))

    def resume(self, alpha: Sequence[float], beta: Sequence[float], ended: bool) -> None:
        """Take up a process after ``len(alpha)`` steps; the basis must hold :meth:`rows_needed` unless it has ended."""
        self.alpha, self.beta = list(alpha), list(beta)
        self.broke_down = ended and self.step_count < self.steps

    def advance(self, w: Vector) -> None:
        """Finish the step with w = A v_j (overwritten): alpha_j, beta_j, v_{j+1}. Collective: yes.

        Raises
        ------
        NumericsError : the product is not finite.

        """
        j = self.step_count
        if self.reorthogonalise == "none":
            if j > 0:
                w.axpy_(-self.beta[-1], self.basis[j - 1])
            alpha = w.dot(self.basis[j])
            beta = w.axpy_(-alpha, self.basis[j]).norm()
        else:
            read = self.window.reads(j)
            coefficients, beta = self.basis.orthogonalise_(w, read.start, read.stop)
            alpha = float(coefficients[-1])
            if j > 0:  # <v_{j-1}, A v_j> against <v_j, A v_{j-1}>: symmetry for free
                self.asymmetry = max(self.asymmetry, abs(float(coefficients[-2]) - self.beta[-1]))
        if not (math.isfinite(alpha) and math.isfinite(beta)):
            raise NumericsError(f"the product of Lanczos step {j + 1} is not finite (alpha = {alpha}, beta = {beta})")
        self.alpha.append(alpha)
        self.beta.append(beta)
        scale = max(abs(a) for a in self.alpha) + max(self.beta)
        # below this the rest is rounding: the space is invariant, and a normalised remainder would be noise
        if beta <= 100 * self._epsilon() * scale:
            self.broke_down = True
        elif self.step_count < self.steps:
            self.basis[j + 1] = w.scale_(1.0 / beta)

    def step(self) -> None:
        """One product and its orthogonalisation. Collective: yes."""
        self.advance(next_products([self])[0])

    def _epsilon(self) -> float:
        import torch

        return float(torch.finfo(self.operator.space.dtype).eps)


def next_products(processes: Sequence[Lanczos]) -> list[Vector]:
    """Return A v_j for the next step of each process, which all have the same operator. Collective: yes."""
    return products(processes[0].operator, [process.basis[process.step_count] for process in processes])
