"""The problem of an operator that a user's program has made: its model, its batches, its loss, as they lie there."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpc_hess.config import Config
from hpc_hess.intake.findings import Intake
from hpc_hess.model.data.data import Samples
from hpc_hess.model.sharded.borrowed import without_hooks
from hpc_hess.model.sharded.gradient import Gradient
from hpc_hess.model.sharded.micro_batch import MicroBatch
from hpc_hess.model.sharded.own_loss import CallableObjective
from hpc_hess.model.sharded.parts import Parts
from hpc_hess.model.sharded.routing import Routing
from hpc_hess.model.sources.source import Source
from hpc_hess.parallel.memory import used_bytes
from hpc_hess.session.own_problem import fingerprint_of
from hpc_hess.session.problem import Problem


def problem_of(parts: Parts, config: Config) -> Problem:
    """Return the problem of an operator. Collective: yes."""
    model, objective = parts.model, parts.objective
    model.written()
    module = model.module
    print_of = fingerprint_of(module, model.world)
    source = Source("problem", type(module).__name__, Path(), getattr(module, "config", None), None, print_of)
    exact, intake = config.operator.method == "exact", Intake()
    intake.add(*parts.findings)
    return Problem(
        source,
        _samples(parts),
        model,
        objective,
        Gradient(model, objective, Routing(module, "frozen")),
        without_hooks(module) if exact and model.sharded else None,
        used_bytes(model.world.device),
        intake,
    )


def _samples(parts: Parts) -> Samples:
    """Return what tells the batches of all ranks from others, in whichever order and on whichever ranks. Collective: yes."""
    objective = parts.objective
    batches = objective.batches if isinstance(objective, CallableObjective) else objective.micro_batches
    digests = []
    for batch in batches[: objective.num_own]:
        digest = hashlib.sha256()
        _tell(batch, digest.update)
        digests.append(digest.hexdigest())
    everyone = sorted(text for some in parts.model.world.gather(digests, "compare the batches") for text in some)
    return Samples({}, torch.empty(len(everyone)), 0, hashlib.sha256("".join(everyone).encode()).hexdigest())


def _tell(value: Any, update: Callable[[bytes], object]) -> None:
    """Hand all that a batch holds to ``update``: tensors, arrays, numbers, text. Of anything else its type alone."""
    if isinstance(value, MicroBatch):  # whose ids count the rows of a rank
        value = {k: v for k, v in vars(value).items() if k != "sample_ids"}
    if isinstance(value, torch.Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        update(repr((tuple(value.shape), value.dtype)).encode())
        update(flat.view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
        update(repr((value.shape, value.dtype.str)).encode())
        update(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, Mapping):
        for key in sorted(value, key=repr):
            update(repr(key).encode())
            _tell(value[key], update)
    elif isinstance(value, list | tuple):
        update(f"{len(value)} parts".encode())
        for part in value:
            _tell(part, update)
    elif isinstance(value, str | bytes | int | float | bool | None):
        update(repr(value).encode())
    else:
        update(type(value).__name__.encode())
