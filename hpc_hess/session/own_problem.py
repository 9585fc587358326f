"""A problem of the user's own: a function of theirs returns the model, each rank's batches, and the loss."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from hpc_hess.config import Config, ProblemSection
from hpc_hess.errors import ConfigError, HpcHessError, ModelError, in_a_line
from hpc_hess.intake import given
from hpc_hess.intake.findings import Finding
from hpc_hess.model.blocks.users import of_user, require_causal, tried_once
from hpc_hess.model.sharded.borrowed import take_over, without_hooks
from hpc_hess.model.sharded.loss import CausalLMObjective
from hpc_hess.model.sharded.own_loss import CallableObjective, LossFunction, own_objective
from hpc_hess.model.sharded.placed import Placed, placed
from hpc_hess.model.sharded.shard import ShardedModel, shard_model
from hpc_hess.model.sharded.undisturbed import undisturbed
from hpc_hess.model.sources.fingerprint import Fingerprint
from hpc_hess.model.sources.source import Source
from hpc_hess.parallel.world import World

_SAMPLED = 1 << 16  # entries of a parameter that its fingerprint reads, at most


class Built(NamedTuple):
    """What the user's function returned. ``loss``: None for a causal LM's own."""

    model: nn.Module
    batches: Any
    loss: LossFunction | None


def build(config: Config, world: World) -> tuple[Built, Source]:
    """Call the user's function; return what it gives, and what tells it from other problems. Collective: yes.

    Raises
    ------
    ConfigError : there is no such file or function. ModelError : it fails, or returns something else, or other weights on
        another rank.

    """
    section = config.problem
    with world.together("build the problem"):
        path, function = _function(section)
        built = _called(function, section, world)
    said = path.read_bytes() + json.dumps(section.settings, sort_keys=True).encode()
    print_of = fingerprint_of(built.model, world, said)
    source = Source("problem", section.build, path, getattr(built.model, "config", None), None, print_of)
    everyone = world.gather(str(source.fingerprint), "compare the problem of the ranks")
    with world.together("compare the problem of the ranks"):
        if other := next((rank for rank, text in enumerate(everyone) if text != everyone[0]), None):
            raise ModelError(
                f"problem.build = '{section.build}' gives ranks 0 and {other} other files, settings or weights: seed what "
                "it draws, and let every rank read the same files"
            )
    return built, source


def _function(section: ProblemSection) -> tuple[Path, Callable[..., Any]]:
    name, _, function = section.build.rpartition(":")
    path = Path(name)
    if section.in_program:
        raise ConfigError(f"a program made this run by {section.build}(..., out=...): start that program again")
    if not name.endswith(".py") or not function.isidentifier():
        raise ConfigError(f"problem.build = '{section.build}' should be FILE.py:FUNCTION")
    if not path.is_file():
        raise ConfigError(f"problem.build = '{section.build}': there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # dataclasses and pickles look for it there
    if (beside := str(path.parent.resolve())) not in sys.path:  # modules that it imports, also later
        sys.path.insert(0, beside)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's code: any kind
        raise ConfigError(f"cannot load {path}: {_last_line(error, path)}") from error
    found = getattr(module, function, None)
    if not callable(found):
        raise ConfigError(f"problem.build = '{section.build}': {path} has no function {function}")
    return path, found


def _called(function: Callable[..., Any], section: ProblemSection, world: World) -> Built:
    try:
        found = function(world, section.settings)
    except HpcHessError:
        raise
    except Exception as error:  # the user's code: any kind
        raise ModelError(f"{section.build} fails: {_last_line(error, Path(section.build.rpartition(':')[0]))}") from error
    if not isinstance(found, tuple | list) or len(found) not in (2, 3):
        what = f"{len(found)} values" if isinstance(found, tuple | list) else f"a {type(found).__name__}"
        raise ModelError(f"{section.build} returns {what}: it should return (model, batches, loss)")
    built = Built(found[0], found[1], found[2] if len(found) == 3 else None)
    given.model(built.model)
    if built.loss is not None and not callable(built.loss):
        raise ModelError(
            f"{section.build} returns a {type(built.loss).__name__} as the loss, not a function loss(model, batch)"
        )
    return built


def _last_line(error: Exception, path: Path) -> str:
    """Return an error's kind and message, and where in the user's file it arose."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == path.resolve()]
    return in_a_line(error) + (f" (line {lines[-1]})" if lines else "")


def fingerprint_of(module: nn.Module, world: World, beside: bytes = b"") -> Fingerprint:
    """Return what tells a module from others: its weights and buffers (sampled), and ``beside``. Collective: if sharded."""
    digest = hashlib.sha256(beside)
    for name, tensor in sorted([*module.named_parameters(), *module.named_buffers()], key=lambda named: named[0]):
        with world.guard("sample the weights"):
            whole = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().reshape(-1)
        part = whole[:: max(1, whole.numel() // _SAMPLED)].cpu().contiguous()
        digest.update(repr((name, tuple(tensor.shape), tensor.dtype)).encode())
        digest.update(part.view(torch.uint8).numpy().tobytes())
    text = digest.hexdigest()
    return Fingerprint.of(text, lambda: text)


class Sharded(NamedTuple):
    """The user's model over the ranks: ``plain`` is its skeleton without hooks, where it is sharded."""

    model: ShardedModel
    plain: nn.Module | None
    findings: list[Finding]


def shard(built: Built, config: Config, world: World, dtype: torch.dtype) -> Sharded:
    """Lay the user's model over the ranks, as it is already where they called fully_shard. Collective: yes.

    Raises
    ------
    ModelError, LayoutError : on every rank.

    """
    module, include, exclude = built.model.eval(), config.parameters.include, config.parameters.exclude
    if any(isinstance(p, DTensor) for p in module.parameters()):
        found = placed(module)
        with world.together("look at the mesh"):
            if found.world.size != world.size:
                raise ModelError(
                    f"the model's mesh has {found.world.size} of {world.size} ranks: pass world.mesh to fully_shard"
                )
            if wrong := next((n for n, p in module.named_parameters() if p.is_floating_point() and p.dtype != dtype), None):
                raise ModelError(
                    f"parameter '{wrong}' is not in {dtype}, the model.master_dtype of the configuration: convert the model "
                    "before fully_shard, or set the key"
                )
        model, findings = of_user(module, include, exclude, Placed(module, world, sharded=True))
        take_over(module)
        return Sharded(model, without_hooks(module), findings)
    module = module.to(dtype=dtype, device=world.device)
    if world.size == 1:
        model, findings = of_user(module, include, exclude, Placed(module, world))
        return Sharded(model, None, findings)
    on_meta = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in module.parameters()}
    plain = copy.deepcopy(module, on_meta)
    return Sharded(
        shard_model(module, world, include=include, exclude=exclude, master_dtype=dtype, compute_dtype=dtype), plain, []
    )


def objective_of(
    built: Built, model: ShardedModel, config: Config
) -> tuple[CausalLMObjective | CallableObjective, list[Finding]]:
    """Return the mean of the user's loss over the batches of all ranks, tried on the first. Collective: yes.

    Raises
    ------
    ConfigError, DataError, ModelError, NumericsError : on every rank.

    """
    objective: CausalLMObjective | CallableObjective
    notes = list[Finding]()
    with undisturbed(model.module):  # passes without a way back would leave parameters gathered
        if built.loss is None:
            objective, notes = own_objective(built.batches, model.module, model.space.device, model.world)
        else:
            objective = CallableObjective(built.batches, built.loss, model.module, model.world)
        tried, rounded = tried_once(model, objective)
        notes += require_causal(model, objective)
    if rounded and config.operator.method == "finite_difference":
        raise ConfigError(given.ROUNDED)
    return objective, [*notes, *tried]
