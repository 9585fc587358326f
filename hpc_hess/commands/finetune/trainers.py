"""The two trainings of an intrinsic dimension's search, by Adam: of all parameters, and of w in theta_0 + Phi^T w.

Each keeps its state in a file and takes it up again, on any number of ranks. Schioppa 2024, section 5.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpc_hess.parallel.vector import Vector
from hpc_hess.session.model_files import Cut, cut_like_selected, read_tensors, write_tensors
from hpc_hess.session.problem import Problem
from hpc_hess.sketch.sketch import Sketch
from hpc_hess.storage.agree import attempt

MOMENTS = ("exp_avg", "exp_avg_sq")
Gradient = Callable[[Vector], object]  # fills a vector with the gradient of a batch; collective


def optimizer_state(steps: int, like: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return Adam's state of one parameter after ``steps`` updates, its moments zero, to be filled."""
    return {"step": torch.tensor(float(steps)), **{name: torch.zeros_like(like) for name in MOMENTS}}


class Whole:
    """Training of the model's selected parameters. Construction: not collective."""

    file = "parameters.state"  # in the format of safetensors

    def __init__(self, problem: Problem, rate: float) -> None:
        self._model, self.steps = problem.model, 0
        self._gradient = problem.model.space.zeros()
        self._parameters = problem.model.local_parameters
        parts = problem.model.pieces_of(self._gradient.data)
        for parameter, part in zip(self._parameters, parts, strict=True):
            parameter.grad = part
        self._optimizer = torch.optim.Adam(self._parameters, lr=rate)

    def step(self, gradient: Gradient) -> None:
        """Take one update. Collective: yes."""
        gradient(self._gradient)
        self._optimizer.step()
        self._model.written()
        self.steps += 1

    def write(self, path: Path) -> None:
        """Keep the state. Collective: yes. Raises StoreError."""
        write_tensors(path, self._cuts(), self._model.world)

    def take_up(self, path: Path, steps: int) -> None:
        """Go on after ``steps`` updates from what :meth:`write` kept. Collective: yes. Raises StoreError."""
        self.steps = steps
        for parameter in self._parameters:
            self._optimizer.state[parameter] = optimizer_state(steps, parameter)
        with attempt(self._model.world, path, "take up the training"):
            read_tensors(path, self._cuts())
        self._model.written()

    def _cuts(self) -> list[Cut]:
        states = [self._optimizer.state[parameter] for parameter in self._parameters]
        flats = {"theta": self._parameters, **{name: [state[name] for state in states] for name in MOMENTS}}
        return [cut for name, parts in flats.items() for cut in cut_like_selected(self._model, name, parts)]


class Subspace:
    """Training of w [D], the same on every rank. Construction is collective."""

    file = "subspace.npz"

    def __init__(self, problem: Problem, sketch: Sketch, theta0: torch.Tensor, rate: float) -> None:
        self._model, self._sketch, self._theta0, self.steps = problem.model, sketch, theta0, 0
        self._gradient = problem.model.space.zeros()
        self._w = torch.zeros(sketch.dimension, dtype=torch.float64, device=theta0.device)
        self._optimizer = torch.optim.Adam([self._w], lr=rate)
        self._move()

    def step(self, dimension: int, gradient: Gradient) -> None:
        """Move the first ``dimension`` entries of w by the gradient at theta_0 + Phi^T w. Collective: yes."""
        gradient(self._gradient)
        self._w.grad = self._sketch.apply(self._gradient)
        self._w.grad[dimension:] = 0.0
        self._optimizer.step()
        self.steps += 1
        self._move()

    def _move(self) -> None:
        self._model.move_parameters(self._theta0, self._sketch.transpose(self._w, self._model.space).data, 1.0)

    def write(self, path: Path) -> None:
        """Keep the state. Collective: yes. Raises StoreError."""
        state = self._optimizer.state[self._w]
        with attempt(self._model.world, path, "keep the training"):
            if self._model.world.rank == 0:
                with path.open("wb") as file:
                    np.savez(file, w=self._w.cpu().numpy(), **{name: state[name].cpu().numpy() for name in MOMENTS})
                    file.flush()
                    os.fsync(file.fileno())  # before a record names it

    def take_up(self, path: Path, steps: int) -> None:
        """Go on after ``steps`` updates from what :meth:`write` kept. Collective: yes. Raises StoreError."""
        kept: dict[str, Any] = {}
        world = self._model.world
        with attempt(world, path, "take up the training"):
            if world.rank == 0:
                with np.load(path) as arrays:
                    kept = dict(arrays)
        kept = world.broadcast(kept, "state of a training")
        self.steps, state = steps, optimizer_state(steps, self._w)
        for name, tensor in (("w", self._w), *state.items()):
            if name in kept:
                tensor.copy_(torch.from_numpy(kept[name]))
        self._optimizer.state[self._w] = state
        self._move()
