"""A user's model, and the program around it, are as they were after every call."""

from __future__ import annotations

import contextlib
import random
import signal
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from hpc_hess.model.sharded.borrowed import borrowed
from hpc_hess.parallel.devices import exact_float32, is_gpu

_SIGNALS = ("SIGINT", "SIGTERM", "SIGALRM", "SIGUSR1", "SIGUSR2")
_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")  # of parameters: clipping, optimizers in the backward pass


@contextlib.contextmanager
def undisturbed(module: nn.Module | None) -> Iterator[None]:
    """Compute with a user's model in eval mode, with gradients and full float32 products; leave everything as it was.

    That is the training flag of each part, each parameter's ``grad`` and its hooks, the buffers, what FSDP2 keeps, torch's
    modes, and the random generators. Collective: no.
    """
    if module is None:
        yield
        return
    with borrowed(module):
        flags = [(m, m.training) for m in module.modules()]
        parameters = list(module.parameters())
        grads = [p.grad for p in parameters]
        hooks = [(p, name, found) for p in parameters for name in _HOOKS if (found := getattr(p, name, None))]
        buffers = [(m, k, b, b.clone()) for m in module.modules() for k, b in m._buffers.items() if b is not None]
        device = parameters[0].device if parameters else torch.device("cpu")
        try:
            for part, _ in flags:
                part.training = False
            for parameter in parameters:
                parameter.grad = None
            for parameter, name, _ in hooks:
                setattr(parameter, name, None)
            with _modes(module, device), generators(device):
                yield
        finally:
            with uninterrupted():
                for parameter, name, found in hooks:
                    setattr(parameter, name, found)
                for parameter, grad in zip(parameters, grads, strict=True):
                    parameter.grad = grad
                for part, training in flags:
                    part.training = training
                with torch.no_grad():
                    for part, key, buffer, before in buffers:
                        part._buffers[key] = buffer
                        if not torch.equal(buffer, before):
                            buffer.copy_(before)


@contextlib.contextmanager
def _modes(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Compute in full, with gradients, and without torch.compile: it would compile anew for the mode of evaluation."""
    compiled = any(getattr(m, "_compiled_call_impl", None) or hasattr(m, "_orig_mod") for m in module.modules())
    with (
        exact_float32(),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
        torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext(),
    ):
        yield


@contextlib.contextmanager
def generators(device: torch.device) -> Iterator[None]:
    """Put the global random generators of torch, NumPy and Python back to where they stood."""
    state, others = random.getstate(), np.random.get_state()  # noqa: NPY002  # programs use it
    own = torch.random.fork_rng([device], device_type=device.type) if is_gpu(device) else torch.random.fork_rng([])
    try:
        with own:
            yield
    finally:
        random.setstate(state)
        np.random.set_state(others)  # noqa: NPY002


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Put off what signals would do in Python until the block is over: what is being put back is put back whole."""
    if threading.current_thread() is not threading.main_thread():  # where Python runs no handlers
        yield
        return
    came: list[tuple[int, Any]] = []
    known = [getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)]
    handlers: dict[int, Any] = {s: h for s in known if callable(h := signal.getsignal(s))}
    for number in handlers:
        signal.signal(number, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number, frame in came:
            handlers[number](number, frame)
