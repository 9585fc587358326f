"""Training in a subspace: Adam on w in theta = theta_0 + Phi^T w. Schioppa 2024, section 5."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from hpc_hess.problem import Problem
from hpc_hess.sketch.sketch import Sketch


class Subspace:
    """Adam on w [D]: the same on every rank. Takes up ``kept`` where that is given."""

    def __init__(
        self, problem: Problem, sketch: Sketch, theta0: torch.Tensor, rate: float, kept: dict[str, np.ndarray] | None
    ) -> None:  # fmt: skip
        self._model, self._sketch, self._theta0 = problem.model, sketch, theta0
        self._buffer = problem.model.space.zeros()
        self._w = torch.zeros(sketch.dimension, dtype=torch.float64, device=theta0.device)
        self._optimizer = torch.optim.Adam([self._w], lr=rate)
        self.steps = 0
        if kept is not None:
            self.steps = int(kept["steps"])
            self._w.copy_(torch.from_numpy(kept["w"]))
            self._optimizer.state[self._w] = {
                "step": torch.tensor(float(self.steps)),
                **{key: torch.from_numpy(kept[key]).to(theta0.device) for key in ("exp_avg", "exp_avg_sq")},
            }
        self._move()

    def step(self, dimension: int, gradient: Callable[[Any], float]) -> None:
        """Move the first ``dimension`` entries of w by the gradient at theta_0 + Phi^T w. Collective: yes."""
        gradient(self._buffer)
        self._w.grad = self._sketch.apply(self._buffer)
        self._w.grad[dimension:] = 0.0
        self._optimizer.step()
        self.steps += 1
        self._move()

    def _move(self) -> None:
        self._model.move_parameters(self._theta0, self._sketch.transpose(self._w, self._model.space).data, 1.0)

    def state(self) -> dict[str, np.ndarray]:
        """Return what :class:`Subspace` takes up."""
        moments = {key: self._optimizer.state[self._w][key].cpu().numpy() for key in ("exp_avg", "exp_avg_sq")}
        return {"steps": np.int64(self.steps), "w": self._w.cpu().numpy(), **moments}  # type: ignore[dict-item]
