"""What a study is made of, and what it is given: it returns JSON-able findings, the same on every rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hpc_hess.config import Config
from hpc_hess.linalg.keeping import Keep
from hpc_hess.linalg.measure import Recurrence
from hpc_hess.linalg.operator import LinearOperator
from hpc_hess.parallel.basis import Basis
from hpc_hess.parallel.vector import Vector, VectorSpace
from hpc_hess.session.problem import Problem
from hpc_hess.session.session import Session

FOLDER, FOUND, PIECES = "studies", "found.json", "pieces"  # RUN/studies/NAME: what was found; until then its pieces
FIRST_PROBE = 1 << 16  # of studies: the quadrature's own probes come before


@dataclass(frozen=True)
class Bench:
    """The tools of one study.

    Attributes
    ----------
    operator : at theta_0; its products are counted, shown and given up in time. Several directions at a time share work.
    keep : what is asked of it is committed, and found again by a run that goes on.
    basis : basis(rows): memory for so many vectors; raises ConfigError where there is no room.
    gradient : the gradient of the mean loss at theta_0. Collective: yes.
    eigenvectors : those that the run's search found, if any, with their eigenvalues, ascending. Collective: yes.
    recurrences : alpha and beta of every probe of the run's quadrature.
    save : save(name, array): keep a small array (alike on all ranks) as NAME.npy in the study's directory. Collective: yes.
    save_vectors : save_vectors(name, vectors): keep vectors there as rows of a store NAME, by file index. Collective: yes.

    """

    config: Config
    problem: Problem
    operator: LinearOperator
    keep: Keep
    basis: Callable[[int], Basis]
    gradient: Callable[[], Vector]
    eigenvectors: Callable[[], list[tuple[float, Vector]]]
    recurrences: Sequence[Recurrence]
    save: Callable[[str, np.ndarray], None]
    save_vectors: Callable[[str, Sequence[Vector]], None]

    @property
    def seed(self) -> int:
        """Of everything that is drawn."""
        return self.config.lanczos.seed


class Inputs(NamedTuple):
    """What the run has found before a study: recurrences of all probes, eigenvalues of the search, ascending."""

    config: Config
    recurrences: Sequence[Recurrence]
    eigenvalues: Sequence[float]


class Recipe(NamedTuple):
    """How a study is computed: RECIPE of its module ``compute``.

    Attributes
    ----------
    study : the findings. Collective: yes.
    rows : how many vectors it keeps at a time, at most.
    memory : the key of its settings to change where its vectors do not fit.
    came_from : what else its products follow from, under the names by which the findings hold it; where that has changed,
        the study is computed anew.
    compared : what needs no product, computed at each start: the findings beside the rest of the run.
    space : of the vectors that it keeps, given the run's own.
    check : check(session, problem, folder): refuse what does not suit the model or the machine, before anything is computed;
        ``folder`` is the study's. Collective: yes. Raises ConfigError.

    """

    study: Callable[[Bench], dict[str, Any]]
    rows: Callable[[Config], int]
    memory: str = "samples"
    came_from: Callable[[Inputs], dict[str, Any]] = lambda inputs: {}
    compared: Callable[[dict[str, Any], Inputs], dict[str, Any]] = lambda found, inputs: found
    space: Callable[[Config, VectorSpace], VectorSpace] = lambda config, space: space
    check: Callable[[Session, Problem, Path], None] = lambda session, problem, folder: None
