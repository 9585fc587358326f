"""What a study of a run is given: a study is a function of it that returns JSON-able findings, the same on every rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hpc_hess.config import AnalysisSection
from hpc_hess.curvature.decomposition import Cotangent, Groups
from hpc_hess.linalg.keeping import Keep
from hpc_hess.linalg.measure import Recurrence
from hpc_hess.linalg.operator import LinearOperator
from hpc_hess.parallel.basis import Basis
from hpc_hess.parallel.vector import Vector

FIRST_PROBE = 1 << 16  # of studies: the quadrature's own probes come before


@dataclass(frozen=True)
class Bench:
    """The tools of one study.

    Attributes
    ----------
    settings, seed, steps : [analysis], and the seed and steps of [lanczos].
    operator : at theta_0; its products are counted, shown and given up in time. Several directions at a time share work.
    keep : what is asked of it is committed, and found again by a run that goes on.
    basis : basis(rows): memory for so many vectors; raises ConfigError where there is no room.
    gradient : the gradient of the mean loss at theta_0. Collective: yes.
    eigenvectors : those that the run's search found, if any, with their eigenvalues, ascending. Collective: yes.
    recurrences : alpha and beta of every probe of the run's quadrature.
    save : save(name, array): keep a small array (alike on all ranks) as NAME.npy in the study's directory. Collective: yes.
    save_vectors : save_vectors(name, vectors): keep vectors there as rows of a store NAME, by file index. Collective: yes.
    head_dim : entries of an attention head, 0 where the model does not tell.
    target_counts : how often each token of the vocabulary is a target in the whole data set, (V,). Collective: no.
    group_weights : P_cc' of groups of tokens: see curvature.decomposition.weights. Collective: yes.
    pull : pull(cotangent): J^T u / n of cotangents at the logits: see curvature.decomposition.Pullback. Collective: yes.

    """

    settings: AnalysisSection
    seed: int
    steps: int
    operator: LinearOperator
    keep: Keep
    basis: Callable[[int], Basis]
    gradient: Callable[[], Vector]
    eigenvectors: Callable[[], list[tuple[float, Vector]]]
    recurrences: Sequence[Recurrence]
    save: Callable[[str, np.ndarray], None]
    save_vectors: Callable[[str, Sequence[Vector]], None]
    head_dim: int
    target_counts: Callable[[], np.ndarray]
    group_weights: Callable[[Groups], np.ndarray]
    pull: Callable[[Cotangent], Vector]


Study = Callable[[Bench], dict[str, Any]]  # returns the findings, JSON-able. Collective: yes
