"""A user's FSDP2 model on loan: sums of gradients in the parameters' own precision, and afterwards every setting as before.

FSDP2 keeps settings and half-done sums in attributes of its states; setters exist for some of them, getters for none.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from hpc_hess.errors import ModelError
from hpc_hess.model.sharded.fsdp import free_gathered

_ABSENT = object()
_SETTINGS = {  # of a group of parameters that travel together
    "reduce_grads": True,
    "all_reduce_grads": True,
    "reshard_after_backward": True,
    "gradient_divide_factor": 1.0,
    "force_sum_reduction_for_comms": True,
    "reduce_scatter_unused_params": True,
    "_partial_reduce_output": None,
}


class _Kept:
    """Attributes as they were."""

    def __init__(self) -> None:
        self._before: list[tuple[Any, str, Any]] = []

    def put(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute, or with _ABSENT remove it."""
        self._before.append((owner, name, getattr(owner, name, _ABSENT)))
        self._set(owner, name, value)

    def restore(self) -> None:
        while self._before:
            self._set(*self._before.pop())

    @staticmethod
    def _set(owner: Any, name: str, value: Any) -> None:
        if value is not _ABSENT:
            setattr(owner, name, value)
        elif hasattr(owner, name):
            delattr(owner, name)


def states(module: nn.Module) -> list[Any]:
    """Return FSDP2's states of a module's parts, outer ones first."""
    from torch.distributed.fsdp import FSDPModule

    found = {id(state): state for m in module.modules() if isinstance(m, FSDPModule) and (state := m._get_fsdp_state())}
    return list(found.values())


def groups(state: Any) -> list[Any]:
    """Return the groups of parameters of one state."""
    several = getattr(state, "_fsdp_param_groups", None)
    one = state._fsdp_param_group if several is None else None
    return several if several is not None else [one] if one is not None else []


def gathered_as(module: nn.Module) -> dict[int, torch.Tensor]:
    """Return, by the identity of a sharded parameter, the whole one that autograd sees in its place."""
    parameters = [p for state in states(module) for group in groups(state) for p in group.fsdp_params]
    return {id(p.sharded_param): p._unsharded_param for p in parameters if hasattr(p, "_unsharded_param")}


def narrow(module: nn.Module) -> set[str]:
    """Return the types of fewer bits in which a mixed-precision policy lets parameters or gradients travel."""
    found = set[str]()
    for state in states(module):
        for group in groups(state):
            policy, own = group.mp_policy, {p.sharded_param.dtype for p in group.fsdp_params}
            found |= {str(t) for t in (policy.param_dtype, policy.reduce_dtype) if t is not None and t not in own}
    return {name.removeprefix("torch.") for name in found}


@contextlib.contextmanager
def borrowed(module: nn.Module) -> Iterator[None]:
    """Have backward passes of a sharded module add up gradients of all ranks; put everything back. Collective: no."""
    known = states(module)
    if not known:
        yield
        return
    for state in known:
        state._lazy_init()
    free_gathered(module)
    kept, orders = _Kept(), list[tuple[list[Any], list[Any]]]()
    try:
        for state in known:
            kept.put(state._state_ctx, "is_last_backward", True)
            orders.append((state._comm_ctx.post_forward_order, list(state._comm_ctx.post_forward_order)))
            for group in groups(state):
                orders.append((group._post_forward_indices, list(group._post_forward_indices)))
                _as_sums(group, kept)
                _own_precision(state, group, kept)
        yield
    except BaseException:
        _give_up(module, known)
        raise
    finally:
        free_gathered(module)
        kept.restore()
        for order, before in orders:
            order[:] = before


def take_over(module: nn.Module) -> None:
    """Have backward passes of a sharded module add up gradients of all ranks, for good. Collective: no."""
    for state in states(module):
        state._lazy_init()
        for group in groups(state):
            _as_sums(group, _Kept())
            _own_precision(state, group, _Kept())
    free_gathered(module)


def _as_sums(group: Any, kept: _Kept) -> None:
    for name, value in _SETTINGS.items():
        if hasattr(group, name):
            kept.put(group, name, value)
    for parameter in group.fsdp_params:  # a program may be adding up gradients without reducing them
        kept.put(parameter, "unsharded_accumulated_grad", None)
        if getattr(getattr(parameter, "_unsharded_param", None), "grad", None) is not None:
            kept.put(parameter._unsharded_param, "grad", None)


def _own_precision(state: Any, group: Any, kept: _Kept) -> None:
    """Let parameters and gradients travel, and modules compute, in the type that the parameters have."""
    policy = state._mp_policy
    if all(p.param_dtype is None and p.reduce_dtype is None for p in group.fsdp_params):
        return
    own = group.fsdp_params[0].orig_dtype
    wide = replace(policy, param_dtype=own, reduce_dtype=own, output_dtype=own if policy.output_dtype else None)
    kept.put(state, "_mp_policy", wide)
    kept.put(group, "mp_policy", wide)
    kept.put(group, "_reduce_dtype", None)
    for parameter in group.fsdp_params:
        kept.put(parameter, "param_dtype", None)
        kept.put(parameter, "reduce_dtype", None)
        kept.put(parameter, "all_gather_outputs", [])  # memory of the narrow type, made once
        kept.put(parameter, "_unsharded_param", _ABSENT)


def _give_up(module: nn.Module, known: list[Any]) -> None:
    """End a pass that an error has left half-way, so that the program's next one can begin."""
    for state in known:
        state._training_state = type(state._training_state).IDLE
        state._state_ctx.iter_forward_root = None
        state._state_ctx.post_backward_final_callback_queued = False
        for group in groups(state):
            work = getattr(group._all_gather_result, "all_gather_work", None)
            if work is not None:
                work.wait()
            group._all_gather_result = None
            group._training_state = type(group._training_state).IDLE
            group._to_sharded()
        state._comm_ctx.all_gather_state = None
        state._comm_ctx.post_forward_order.clear()
    free_gathered(module)


def without_hooks(module: nn.Module) -> nn.Module:
    """Return a copy of a sharded module as it was before fully_shard: parameters on the meta device. Collective: no.

    Raises
    ------
    ModelError : a parameter is not sharded.

    """
    from torch.distributed.fsdp import FSDPModule

    free_gathered(module)
    memo: dict[int, Any] = {id(state): state for state in states(module)}
    for name, p in module.named_parameters():
        if not isinstance(p, DTensor):
            raise ModelError(
                f"parameter '{name}' is not sharded, which exact products of sharded models need of every parameter: use "
                'method = "finite_difference"'
            )
        memo[id(p)] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta"), requires_grad=p.requires_grad)
    classes = [(m, type(m)) for m in module.modules() if isinstance(m, FSDPModule)]
    try:
        for part, kind in classes:
            part.__class__ = next(base for base in kind.__mro__ if not issubclass(base, FSDPModule))  # type: ignore[assignment]
        found = copy.deepcopy(module, memo)
    finally:
        for part, kind in classes:
            part.__class__ = kind
    known = {id(state) for state in states(module)}
    for each in found.modules():
        for hooks in (each._forward_pre_hooks, each._forward_hooks):
            for number, hook in list(hooks.items()):
                inner = getattr(hook, "__wrapped__", hook)  # of several modules that are sharded together
                if {id(getattr(f, "__self__", None)) for f in (hook, inner)} & known:
                    del hooks[number]
                    each._forward_pre_hooks_with_kwargs.pop(number, None)
    return found
