"""From the tensors of a checkpoint to the parameters of the model, by transformers' own conversion table.

transformers 5 keeps, per architecture, the renamings and rearrangements between checkpoint and model (experts merged,
projections fused, ...). They are applied here to lazy tensors, so that a rank reads only the boxes it needs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hpc_hess.errors import ModelError
from hpc_hess.model.sources.lazy import Computed, Joined, Lazy, Part, Stacked, Transposed


class _NotLazyError(Exception):
    """An operation that has no box-by-box form."""


@dataclass
class Mapped:
    """A checkpoint by the model's names.

    ``tensors``: what the model takes; ``sources``: the stored names that each is made of; ``unused``: stored names of
    which the model takes nothing, with what they were renamed to.
    """

    tensors: dict[str, Lazy] = field(default_factory=dict)
    sources: dict[str, list[str]] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)


def model_tensors(stored: Mapping[str, Lazy], model: nn.Module) -> Mapped:
    """Return the model's tensors by name in its state dict, as far as ``stored`` has them.

    ``model`` may be sharded. Collective: no.

    Raises
    ------
    ModelError : two stored tensors are for the same parameter.

    """
    from transformers.core_model_loading import rename_source_key

    renamings, converters = _transforms(model)
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    known = dict.fromkeys(model.state_dict(), True)
    prefix = getattr(model, "base_model_prefix", "")
    groups: dict[str, tuple[Any, dict[str, list[str]]]] = {}
    found = Mapped()
    for key in sorted(stored, key=_natural):
        name, pattern = rename_source_key(key, renamings, converters, prefix, known)
        if name not in known and key in known:  # stored under the model's own name already
            name, pattern = key, None
        if name not in known:
            found.unused[key] = name
        elif pattern is None:
            _take(found, {name: stored[key]}, [key])
        else:
            group = groups.setdefault(name, (by_pattern[pattern], {}))
            group[1].setdefault(pattern, []).append(key)
    for name, (converter, sources) in groups.items():
        _take(found, _convert(name, converter, sources, stored, model), [k for keys in sources.values() for k in keys])
    return found


def renamed(key: str, model: nn.Module) -> str | None:
    """Return the model's name of a parameter that was stored as ``key``, None where it is none, or a part of one."""
    from transformers.core_model_loading import rename_source_key

    renamings, converters = _transforms(model)
    known = dict.fromkeys(model.state_dict(), True)
    name, pattern = rename_source_key(key, renamings, converters, getattr(model, "base_model_prefix", ""), known)
    return name if pattern is None and name in known else None


def _take(found: Mapped, tensors: dict[str, Lazy], keys: list[str]) -> None:
    for name, tensor in tensors.items():
        if name in found.tensors:
            raise ModelError(
                f"the checkpoint holds '{name}' twice, as '{found.sources[name][0]}' and as '{keys[0]}': remove one of them"
            )
        found.tensors[name], found.sources[name] = tensor, keys


def _transforms(model: nn.Module) -> tuple[list[Any], list[Any]]:
    """Return the renamings, and the other rearrangements, of the model's class."""
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    if not isinstance(model, PreTrainedModel):
        return [], []
    sharded = type(model)  # fully_shard gives the model a class of its own, FSDPxxx, which the table does not list
    model.__class__ = next(c for c in sharded.__mro__ if not c.__name__.startswith("FSDP"))
    try:
        found = get_model_conversion_mapping(model)
        return [t for t in found if isinstance(t, WeightRenaming)], [t for t in found if isinstance(t, WeightConverter)]
    finally:
        model.__class__ = sharded


def _natural(key: str) -> list[tuple[int, int, str]]:
    """Sort key under which expert 10 comes after expert 9."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in key.split(".")]


def _convert(
    name: str, converter: Any, sources: dict[str, list[str]], stored: Mapping[str, Lazy], model: nn.Module
) -> dict[str, Lazy]:
    """Apply a converter's operations to lazy tensors. Returns the model's tensors by full name."""
    targets = converter.target_patterns
    try:
        state: dict[str, Lazy | list[Lazy]] = {p: [stored[k] for k in keys] for p, keys in sources.items()}
        for operation in converter.operations:
            state = _apply(operation, state, converter, name, model)
        if not set(state) <= set(targets):
            raise _NotLazyError
        return {name.replace(targets[0], target, 1): _single(tensor) for target, tensor in state.items()}
    except _NotLazyError:
        names = [name.replace(targets[0], target, 1) for target in targets]
        shapes = {k: tuple(v.shape) for k, v in model.state_dict().items() if k in names}
        return {
            full: Computed(shape, _whole(name, full, converter, sources, stored, model)) for full, shape in shapes.items()
        }


def _single(tensor: Lazy | list[Lazy]) -> Lazy:
    if isinstance(tensor, list):
        if len(tensor) != 1:
            raise _NotLazyError
        return tensor[0]
    return tensor


def _apply(
    operation: Any, state: dict[str, Lazy | list[Lazy]], converter: Any, name: str, model: nn.Module
) -> dict[str, Lazy | list[Lazy]]:
    """Return the state after one of transformers' operations."""
    kind, targets = type(operation).__name__, converter.target_patterns
    if kind == "MergeModulelist":
        merged = {p: Stacked(t, operation.dim) if isinstance(t, list) else t for p, t in state.items()}
        return {targets[0]: next(iter(merged.values()))} if len(merged) == 1 and len(targets) == 1 else dict(merged)
    if kind == "Concatenate" and len(targets) == 1:
        parts: list[Lazy] = []
        for pattern in converter.source_patterns:
            tensors = state.get(pattern, [])
            parts.extend(tensors if isinstance(tensors, list) else [tensors])
        return {targets[0]: Joined(parts, operation.dim)}
    if len(state) != 1:
        raise _NotLazyError
    tensor = _single(next(iter(state.values())))
    if kind == "Chunk" and getattr(operation, "num_shards_attribute", None) is None:
        extent = tensor.shape[operation.dim]
        size = -(-extent // len(targets))
        return _cut(tensor, operation.dim, targets, [min(size, extent - i * size) for i in range(len(targets))])
    if kind == "Split":
        full = [name.replace(targets[0], target, 1) for target in targets]
        return _cut(tensor, operation.dim, targets, [model.get_parameter(f).shape[operation.dim] for f in full])
    if kind == "Transpose" and len(targets) == 1:
        if getattr(operation, "check_dims", False) and tensor.shape == tuple(model.get_parameter(name).shape):
            return {targets[0]: tensor}
        return {targets[0]: Transposed(tensor, operation.dim0, operation.dim1)}
    raise _NotLazyError


def _cut(tensor: Lazy, dim: int, targets: list[str], sizes: list[int]) -> dict[str, Lazy | list[Lazy]]:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return {t: Part(tensor, dim, start, size) for t, start, size in zip(targets, starts, sizes, strict=True)}


def _whole(
    name: str, full: str, converter: Any, sources: dict[str, list[str]], stored: Mapping[str, Lazy], model: nn.Module
) -> Callable[[], torch.Tensor]:
    """Return a function that lets transformers convert whole tensors: the way out for operations we cannot slice."""

    def read(key: str) -> torch.Tensor:
        return stored[key].read(tuple((0, n) for n in stored[key].shape))

    def compute() -> torch.Tensor:
        fresh = copy.deepcopy(converter)
        for pattern, keys in sources.items():
            for key in keys:
                fresh.add_tensor(name, key, pattern, lambda key=key: read(key))
        converted = fresh.convert(name, model=model, config=model.config)
        tensor = converted[full]
        result: torch.Tensor = tensor[0] if isinstance(tensor, list) else tensor
        return result

    return compute
