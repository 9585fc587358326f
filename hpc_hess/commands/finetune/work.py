"""A small training loop over the sharded model: checkpoints whose spectra are then compared (see commands.dynamics).

Schioppa 2024, section 5: SGD of constant rate on batches of 32. Dropout stays off: what is trained is the function whose
Hessian is taken. A checkpoint is a Hugging Face directory and a point that an interrupted training goes on from.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from hpc_hess.commands.arguments import Training
from hpc_hess.commands.finetune.trainers import MOMENTS, optimizer_state
from hpc_hess.config import Config
from hpc_hess.console.words import number
from hpc_hess.errors import ConfigError, NumericsError, StoreError
from hpc_hess.model.data.data import objective_of
from hpc_hess.model.sources.source import Source, resolve_source
from hpc_hess.parallel.world import World
from hpc_hess.session.model_files import cut_like_selected, read_tensors, save_model
from hpc_hess.session.problem import Problem, fills_a_cache, in_turn, load_problem
from hpc_hess.session.session import opened
from hpc_hess.storage.agree import attempt
from hpc_hess.storage.disk import explaining
from hpc_hess.storage.events import append_lines
from hpc_hess.storage.identity import must_match
from hpc_hess.storage.run_files import write_aside

LOG_NAME = "training.jsonl"
STATE_NAME = "training.json"  # in each checkpoint: after how many steps, of which training
_MOMENTS_NAME = "optimizer.state"  # AdamW's moments, in the format of safetensors


def checkpoint(out: Path, step: int) -> Path:
    """Return the directory of the checkpoint after ``step`` updates."""
    return out / f"step-{step:06d}"


def finetune(config: Config, world: World, training: Training) -> int:
    """Train, or go on with it; returns the exit code. Writes OUT/step-NNNNNN and OUT/training.jsonl. Collective: yes.

    Losses and weights are the same on any number of ranks, up to rounding.

    Raises
    ------
    HpcHessError : as one sentence for the user; every checkpoint stays.

    """
    out = training.out
    if config.model.adapter != "merge":
        raise ConfigError("training writes whole models: set model.adapter = 'merge'")
    with opened(config, world, out, training.steps) as session:
        progress = session.progress
        name, shared = "read the model's configuration", fills_a_cache(config.model, config.data)
        source = in_turn(world, lambda: resolve_source(config.model), name, shared=shared)
        bound_to = _identity(config, training, source)
        there: dict[int, dict[str, Any]] = {}
        with attempt(world, out, "read the checkpoints"):
            if world.rank == 0:
                there = _checkpoints(out)
        there = world.broadcast(there, "checkpoints")
        for state in there.values():
            _compare(out, state["training"], bound_to)
        missing = [step for step in training.points if step not in there]
        if not missing:
            progress.note(f"this training is already finished: its checkpoints are {out}/step-*")
            return 0
        start = max((step for step in there if step <= missing[0]), default=None)
        problem = load_problem(_starting_from(config, out, start), world, progress)
        bound_to["data_fingerprint"] = problem.samples.fingerprint
        if start is not None:
            _compare(out, there[start]["training"], bound_to)
        if training.batch > len(problem.samples):
            progress.note(f"a batch is all {len(problem.samples)} sequences of data.sequences, not {training.batch}")
        loop = _Loop(training, problem, source, world, bound_to)
        if start:
            loop.resume(start)
            progress.resume_at(start)
            progress.note(f"going on after step {start}")
        progress.phase("training")
        for step in range(start or 0, missing[-1] + 1):
            if step in missing:
                loop.save(step)
                session.progressed = True
                progress.note(f"saved {checkpoint(out, step)}")
            if step == missing[-1]:
                break
            if reason := session.stopper.agreed(loop.slowest_s):
                return session.stopped(reason, f" before step {step + 1}")
            loss = loop.step(step)
            progress.resume_at(step + 1)
            progress.status(f"training: step {step + 1} of {training.steps} | loss {number(loss, 5)}")
    world.barrier("finish")
    return 0


class _Loop:
    """The state of a training: the model's parameters, the optimizer, the log."""

    def __init__(self, training: Training, problem: Problem, source: Source, world: World, bound_to: dict[str, Any]) -> None:
        self._training, self._problem, self._source, self._world = training, problem, source, world
        self._bound_to = bound_to
        self.slowest_s = 0.0
        model = problem.model
        self._gradient = model.space.zeros()
        self._parameters = model.local_parameters  # this rank's parts: both optimizers work entry by entry
        for parameter, part in zip(self._parameters, model.pieces_of(self._gradient.data), strict=True):
            parameter.grad = part
        kinds = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
        self._optimizer = kinds[training.optimizer](self._parameters, lr=training.learning_rate)
        self._log = _Log(training.out / LOG_NAME) if world.rank == 0 else None

    def step(self, step: int) -> float:
        """Take update number ``step`` + 1; return the batch's mean loss before it. Collective: yes.

        Raises
        ------
        NumericsError : the loss is not finite.

        """
        began = time.perf_counter()
        problem, training = self._problem, self._training
        batch = min(training.batch, len(problem.samples))
        rows = batch_rows(len(problem.samples), batch, step, training.seed)
        whole, world = problem.labelled, self._world
        size = len(whole.micro_batches[0].sample_ids)
        batch_objective = objective_of(problem.samples, rows, world.rank, world.size, size, whole.device)
        try:
            loss, gradient = problem.gradient.over(batch_objective)(self._gradient)
        except NumericsError as error:
            rate = f"--learning-rate {training.learning_rate:g}"
            raise NumericsError(f"in step {step + 1} {error}; or {rate} is too large") from None
        norm = gradient.norm()
        self._optimizer.step()
        problem.model.written()
        seconds = self._world.max_over_ranks(time.perf_counter() - began, "step time")
        self.slowest_s = max(self.slowest_s, seconds)
        with attempt(self._world, training.out / LOG_NAME, "write the log"):
            if self._log is not None:
                self._log.write(step, loss=loss, gradient_norm=norm, seconds=seconds)
        return loss

    def save(self, step: int) -> None:
        """Write the checkpoint after ``step`` updates. Collective: yes."""
        tensors = {}
        if self._optimizer.state and self._training.optimizer == "adamw":
            states = [self._optimizer.state[parameter] for parameter in self._parameters]
            tensors[_MOMENTS_NAME] = [
                cut
                for name in MOMENTS
                for cut in cut_like_selected(self._problem.model, name, [state[name] for state in states])
            ]
        state = json.dumps({"step": step, "training": self._bound_to}, indent=1) + "\n"
        path = checkpoint(self._training.out, step)
        save_model(path, self._problem.model, self._source, self._world, texts={STATE_NAME: state}, tensors=tensors)

    def resume(self, step: int) -> None:
        """Take up the optimizer's state of the checkpoint after ``step`` updates. Collective: yes."""
        if self._training.optimizer != "adamw":
            return
        model, file = self._problem.model, checkpoint(self._training.out, step) / _MOMENTS_NAME
        for parameter in self._parameters:
            self._optimizer.state[parameter] = optimizer_state(step, parameter)
        with attempt(self._world, file, "read the optimizer's state"):
            for name in MOMENTS:
                read_tensors(
                    file,
                    cut_like_selected(
                        model, name, [self._optimizer.state[parameter][name] for parameter in self._parameters]
                    ),
                )


class _Log:
    """training.jsonl: one line for each step; what an interrupted training repeats is not written again. Rank 0."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._written: set[int] = set()
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("}\n")]  # a kill can cut the last one short
            with explaining(path, "read the log"):
                self._written = {json.loads(line)["step"] for line in whole}
            write_aside(path, "".join(whole))

    def write(self, step: int, **values: float) -> None:
        """Append what the update number ``step`` + 1 measured at the parameters after ``step`` updates."""
        if step not in self._written:
            append_lines(self._path, [json.dumps({"step": step, **values})])


def batch_rows(num_samples: int, batch: int, step: int, seed: int) -> list[int]:
    """Return the samples of batch ``step``: permutations of all samples, one after the other, cut into batches."""
    rows: list[int] = []
    while len(rows) < batch:
        epoch, place = divmod(step * batch + len(rows), num_samples)
        order = torch.randperm(num_samples, generator=torch.Generator().manual_seed((seed << 32) + epoch)).tolist()
        rows += order[place : place + batch - len(rows)]
    return rows


def _starting_from(config: Config, out: Path, step: int | None) -> Config:
    """Return the configuration with the checkpoint's weights; experts are chosen anew in each step."""
    model = config.model
    if step is not None:  # a checkpoint is a whole model
        model = model.model_copy(update={"source": str(checkpoint(out, step)), "base": ""})
    return config.model_copy(update={"model": model, "operator": config.operator.model_copy(update={"routing": "free"})})


def _checkpoints(out: Path) -> dict[int, dict[str, Any]]:
    """Return the state of each checkpoint that is there, by step."""
    states = {}
    for file in sorted(out.glob(f"step-*[0-9]/{STATE_NAME}")):
        try:
            state = json.loads(file.read_text(encoding="utf-8"))
            states[int(state["step"])] = state
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"{file} cannot be read ({error}): remove {file.parent} and start the same command again"
            ) from error
    return states


def _identity(config: Config, training: Training, source: Source) -> dict[str, Any]:
    """What the weights of a checkpoint follow from; a directory is bound to it."""
    keys = ("learning_rate", "batch", "optimizer", "seed")
    return {key: getattr(training, key) for key in keys} | {
        "model_fingerprint": source.fingerprint,
        "parameters": config.parameters.model_dump(),
        "master_dtype": config.model.master_dtype,
        "compute_dtype": config.model.compute_dtype,
    }


def _compare(out: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    must_match(found, wanted, f"{out} holds a training", "choose another --out, or go back to that")
