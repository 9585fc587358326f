"""A user's model is as it was after every call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from hpc_hess.parallel.devices import exact_float32


@contextlib.contextmanager
def undisturbed(module: nn.Module | None) -> Iterator[None]:
    """Compute with a user's model in eval mode, with gradients and full float32 products; leave everything as it was.

    That is the training flag of each part, each parameter's ``grad``, the buffers, and torch's modes.
    """
    if module is None:
        yield
        return
    flags = [(m, m.training) for m in module.modules()]
    grads = [(p, p.grad) for p in module.parameters()]
    buffers = [(m, k, b, b.clone()) for m in module.modules() for k, b in m._buffers.items() if b is not None]
    try:
        for part, _ in flags:
            part.training = False
        for parameter, _ in grads:
            parameter.grad = None
        with exact_float32(), torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for parameter, grad in grads:
            parameter.grad = grad
        for part, training in flags:
            part.training = training
        with torch.no_grad():
            for part, key, buffer, before in buffers:
                part._buffers[key] = buffer
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
