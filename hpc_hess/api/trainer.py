"""Spectra within Hugging Face's Trainer: a callback that logs them where the Trainer logs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from hpc_hess.api.operators import hessian
from hpc_hess.api.spectra import eigenpairs, slq
from hpc_hess.errors import ConfigError, DataError
from hpc_hess.intake import given
from hpc_hess.model.sharded.own_loss import LossFunction
from hpc_hess.model.sharded.undisturbed import generators


class HessianCallback(TrainerCallback):
    """Logs the Hessian of the training loss every so many steps.

    >>> trainer.add_callback(hpc_hess.HessianCallback(trainer, every=500))   # doctest: +SKIP

    The entries are hessian/lambda_max, hessian/lambda_min, hessian/trace with its standard error where there are several
    probes, and hessian/seconds. The training goes on as if nothing had been. One process, DDP, and FSDP2. Collective: yes.

    Parameters
    ----------
    trainer : whose model, data and ``compute_loss`` are used.
    every : optimiser steps between two spectra.
    batches : of this rank, as the data collator makes them. None: the first ``num_batches`` of the training data.
    loss : loss(model, batch), as for :func:`hpc_hess.hessian`. None: the trainer's ``compute_loss``; batches count equally.
    steps, probes, seed : as for :func:`hpc_hess.slq`.
    eigenvectors : so many of the largest eigenvalues, and the share of their eigenvectors' space that lay in the space of
        the time before (1: the same, 0: none of it), are logged as hessian/eigenvalue_1, ... and hessian/overlap.

    Raises
    ------
    ConfigError : a number is not valid. DataError : the training data have no length: pass ``batches``.

    """

    def __init__(
        self,
        trainer: Trainer,
        *,
        every: int = 500,
        batches: Sequence[Any] | None = None,
        num_batches: int = 4,
        loss: LossFunction | None = None,
        eigenvectors: int = 0,
        **of_slq: Any,
    ) -> None:
        if strange := set(of_slq) - {"steps", "probes", "seed"}:
            raise ConfigError(f"HessianCallback takes no '{min(strange)}': it takes steps, probes and seed, as slq does")
        self._trainer, self._loss, self._of_slq = trainer, loss, {"steps": 20, **of_slq}
        self._every, self._num_batches = given.whole("every", every), given.whole("num_batches", num_batches)
        self._eigenvectors = given.whole("eigenvectors", eigenvectors, 0)
        self._batches = None if batches is None else list(batches)
        self._before: torch.Tensor | None = None  # rows: this rank's part of the last eigenvectors

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Log a spectrum if it is time."""
        del args, control, more
        if state.global_step % self._every == 0:
            self._trainer.log(self.measure())

    def measure(self) -> dict[str, float]:
        """Return what would be logged now. Collective: yes."""
        trainer, began = self._trainer, time.perf_counter()
        if self._batches is None:
            self._batches = _first(trainer, self._num_batches)
        model = trainer.model_wrapped
        with _without_autocast(model):
            operator = hessian(model, self._batches, self._loss or self._own_loss)
            spectrum = slq(operator, progress=False, **self._of_slq)
            found = {
                "lambda_max": spectrum.lambda_max,
                "lambda_min": spectrum.lambda_min,
                "trace": float(spectrum.trace.mean),
            }
            if spectrum.trace.stderr is not None:
                found["trace_stderr"] = float(spectrum.trace.stderr)
            if self._eigenvectors:
                pairs = eigenpairs(
                    operator, self._eigenvectors, which="largest", tolerance=1e-2, copies=False, progress=False
                )
                found |= {f"eigenvalue_{k + 1}": float(value) for k, value in enumerate(pairs.values)}
                now = torch.as_tensor(pairs.vectors)
                if self._before is not None and self._before.shape == now.shape:
                    products = operator.space.sum((self._before @ now.T).double(), "overlap of eigenvectors")
                    found["overlap"] = float(products.square().sum()) / len(now)
                self._before = now
        found["seconds"] = time.perf_counter() - began
        return {f"hessian/{name}": value for name, value in found.items()}

    def _own_loss(self, model: Any, batch: Any) -> torch.Tensor:
        value = self._trainer.compute_loss(model, dict(batch))
        assert isinstance(value, torch.Tensor)
        return value


def _first(trainer: Trainer, count: int) -> list[Any]:
    """Return the first batches of this rank's training data, in the order of the first epoch; no generator is moved."""
    if not hasattr(trainer.train_dataset, "__len__"):
        raise DataError("the training data have no length, so drawing from them would move them on: pass batches=[...]")
    prepared = trainer.accelerator._dataloaders
    known = len(prepared)
    with generators(trainer.args.device):
        loader: Any = trainer.get_train_dataloader()
        batches = [trainer._prepare_inputs(batch) for batch in islice(getattr(loader, "base_dataloader", loader), count)]
    del prepared[known:]
    return batches  # perhaps none on this rank: hessian() sees to that together with the others


@contextlib.contextmanager
def _without_autocast(model: Any) -> Iterator[None]:
    """Take the model's own forward where accelerate has put one into half precision around it."""
    own = [part for part in model.modules() if "_original_forward" in part.__dict__]
    wrapped = [part.forward for part in own]
    try:
        for part in own:
            part.forward = part._original_forward
        yield
    finally:
        for part, forward in zip(own, wrapped, strict=True):
            part.forward = forward
