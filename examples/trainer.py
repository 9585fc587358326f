"""Hugging Face's Trainer with a callback that logs the spectrum of the Hessian every so many steps.

    python examples/trainer.py --steps 20 --every 10
    torchrun --nproc-per-node 2 examples/trainer.py --fsdp

A small Llama learns a made-up language. What belongs to the spectrum is marked with #.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import hpc_hess  #


class Rows(Dataset[dict[str, torch.Tensor]]):
    """Rows of a language in which the next word is one of two that follow from the last."""

    def __init__(self, count: int, length: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(64, (count, length), generator=generator)
        coins = torch.randint(2, (count, length), generator=generator)
        for k in range(1, length):
            self.ids[:, k] = (5 * self.ids[:, k - 1] + 1 + 7 * coins[:, k]) % 64

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--every", type=int, default=10, help="steps between two spectra; 0: none")
    parser.add_argument("--fsdp", action="store_true", help="shard the model by FSDP2")
    parser.add_argument("--save", help="write the trained parameters to this file")
    asked = parser.parse_args()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model,
            TrainingArguments(
                folder,
                max_steps=asked.steps,
                per_device_train_batch_size=4,
                learning_rate=3e-3,
                logging_steps=5,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=not torch.cuda.is_available(),
                fsdp=asked.fsdp,
                fsdp_config={"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]} if asked.fsdp else None,
            ),
            train_dataset=Rows(512, 16),
        )
        if asked.every:
            trainer.add_callback(hpc_hess.HessianCallback(trainer, every=asked.every, steps=10, eigenvectors=2))  #
        trainer.train()
        if asked.save:
            state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
            if trainer.is_world_process_zero():
                torch.save(state, asked.save)


if __name__ == "__main__":
    main()
