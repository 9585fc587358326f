"""PyTorch Lightning's FSDP2 strategy with a callback that logs the spectrum of the Hessian every so many steps.

    python examples/lightning_loop.py --devices 2 --steps 20 --every 10

A small Llama learns a made-up language. What belongs to the spectrum is marked with #.
"""

from __future__ import annotations

import argparse
from typing import Any

import lightning
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import hpc_hess  #


class Spectra(lightning.Callback):  #
    """Logs the spectrum every so many optimizer steps, where the Trainer logs. Each rank takes a share of the batches."""

    def __init__(self, batches: list[Any], every: int) -> None:
        self.batches, self.every, self.last = batches, every, 0

    def on_train_batch_end(self, trainer: lightning.Trainer, module: Any, *of_the_batch: Any) -> None:
        """Log a spectrum after every so many steps of the optimizer, on every rank."""
        del of_the_batch
        if trainer.global_step % self.every or trainer.global_step == self.last:  # gradients are being added up
            return
        self.last = trainer.global_step
        own = self.batches[trainer.global_rank :: trainer.world_size]
        operator = hpc_hess.hessian(module.model, own)
        spectrum = hpc_hess.slq(operator, steps=10, progress=False)
        found = {"hessian/lambda_max": spectrum.lambda_max, "hessian/trace": float(spectrum.trace.mean)}
        if trainer.logger is not None:
            trainer.logger.log_metrics(found, step=self.last)
        if trainer.is_global_zero:
            print(f"step {self.last}: lambda max {spectrum.lambda_max:.3g}, trace {spectrum.trace.mean:.3g}", flush=True)


class Language(lightning.LightningModule):
    """A small Llama, sharded where Lightning asks for it."""

    def configure_model(self) -> None:
        """Make and shard the model, once."""
        if hasattr(self, "model"):
            return
        torch.manual_seed(0)
        self.model: Any = LlamaForCausalLM(
            LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
        )
        mesh = self.device_mesh["data_parallel"]
        for layer in self.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)

    def training_step(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the loss."""
        loss: torch.Tensor = self.model(input_ids=rows, labels=rows).loss
        self.log("loss", loss.detach())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def made_up(count: int, length: int) -> torch.Tensor:
    """Return rows of a language in which the next word is one of two that follow from the last."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(64, (count, length), generator=generator)
    coins = torch.randint(2, (count, length), generator=generator)
    for k in range(1, length):
        ids[:, k] = (5 * ids[:, k - 1] + 1 + 7 * coins[:, k]) % 64
    return ids


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--every", type=int, default=10, help="steps between two spectra; 0: none")
    parser.add_argument("--folder", default="lightning_logs", help="directory of metrics.csv")
    parser.add_argument("--save", help="write the trained parameters to this file")
    asked = parser.parse_args()
    rows = made_up(512, 16)
    module = Language()
    trainer = lightning.Trainer(
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices=asked.devices,
        strategy=ModelParallelStrategy(data_parallel_size=asked.devices, tensor_parallel_size=1),
        max_steps=asked.steps,
        callbacks=[Spectra(list(rows[:32].split(4)), asked.every)] if asked.every else [],  #
        logger=CSVLogger(asked.folder, name="", version=""),
        log_every_n_steps=5,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(rows, batch_size=4))  # type: ignore[arg-type]
    if asked.save:
        state = get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if trainer.is_global_zero:
            torch.save(state, asked.save)


if __name__ == "__main__":
    main()
