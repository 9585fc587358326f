"""A training loop of accelerate that takes a spectrum of the Hessian every so many steps.

    accelerate launch --cpu --num_processes 2 examples/accelerate_loop.py --steps 20 --every 10
    torchrun --nproc-per-node 2 examples/accelerate_loop.py

A small network learns a made-up function. What belongs to the spectrum is marked with #.
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

import hpc_hess  #


def loss(model: nn.Module, batch: list[torch.Tensor]) -> tuple[torch.Tensor, int]:
    """Return the sum of squared errors of a batch, and its weight."""
    return mse_loss(model(batch[0]), batch[1], reduction="sum"), batch[1].numel()


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--every", type=int, default=10, help="steps between two spectra")
    asked = parser.parse_args()
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    torch.manual_seed(0)
    x = torch.randn(256, 8)
    data = TensorDataset(x, (x[:, :1] * x[:, 1:2]).sin())
    model: nn.Module = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, 16, shuffle=True))
    held_out = [batch for batch, _ in zip(loader, range(4), strict=False)]  # this rank's batches of the spectrum
    step = 0
    while step < asked.steps:
        for batch in loader:
            total, weight = loss(model, batch)
            accelerator.backward(total / weight)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step % asked.every == 0:
                operator = hpc_hess.hessian(model, held_out, loss)  #
                spectrum = hpc_hess.slq(operator, steps=10, progress=False)  #
                accelerator.print(f"step {step}: lambda max {spectrum.lambda_max:.3g}, trace {spectrum.trace.mean:.3g}")
            if step == asked.steps:
                break
    accelerator.end_training()


if __name__ == "__main__":
    main()
