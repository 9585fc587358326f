"""A plain FSDP2 training loop that takes a spectrum of the Hessian every so many steps.

    torchrun --nproc-per-node 2 examples/fsdp2_loop.py --steps 30 --every 10
    torchrun --nproc-per-node 2 examples/fsdp2_loop.py --model HuggingFaceTB/SmolLM2-135M --text corpus.txt

Without a model a small Llama is trained on a made-up language. What belongs to the spectrum is marked with #.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import hpc_hess  #


def arguments() -> argparse.Namespace:
    """Return what was asked for on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory or name of a Hugging Face causal LM; a small Llama without it")
    parser.add_argument("--text", help="file to train on; without it a made-up language of 64 words")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--every", type=int, default=10, help="steps between two spectra; 0: none")
    parser.add_argument("--rows", type=int, default=4, help="rows of a batch on each rank")
    parser.add_argument("--length", type=int, default=32, help="tokens of a row")
    parser.add_argument("--lanczos-steps", type=int, default=10)
    parser.add_argument("--rate", type=float, default=3e-3)
    return parser.parse_args()


def made_up(count: int, generator: torch.Generator) -> torch.Tensor:
    """Return tokens of a language in which the next word is one of two that follow from the last."""
    ids = torch.randint(64, (count,), generator=generator)
    coins = torch.randint(2, (count,), generator=generator)
    for k in range(1, count):
        ids[k] = (5 * ids[k - 1] + 1 + 7 * coins[k]) % 64
    return ids


def main() -> None:
    """Train."""
    asked = arguments()
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    if asked.model:
        model: Any = AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.float32)
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=64,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
            )
        )
    if asked.text:
        with open(asked.text, encoding="utf-8") as file:
            ids = AutoTokenizer.from_pretrained(asked.model)(file.read(), return_tensors="pt")["input_ids"][0]
    else:
        ids = made_up(1 << 14, torch.Generator().manual_seed(1))
    rows = ids[: len(ids) // asked.length * asked.length].view(-1, asked.length)[rank::size].to(device)

    model.to(device)
    mesh = init_device_mesh(device.type, (size,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=asked.rate)

    held_out = [{"input_ids": rows[-asked.rows :]}]  # this rank's batches of the spectrum
    rows, began, in_spectra = rows[: -asked.rows], time.perf_counter(), 0.0
    for step in range(1, asked.steps + 1):
        pick = torch.arange((step - 1) * asked.rows, step * asked.rows) % len(rows)
        loss = model(input_ids=rows[pick], labels=rows[pick]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if asked.every and step % asked.every == 0:
            before = time.perf_counter()
            operator = hpc_hess.hessian(model, held_out)  #
            spectrum = hpc_hess.slq(operator, steps=asked.lanczos_steps)  #
            in_spectra += time.perf_counter() - before
            if rank == 0:
                print(
                    f"step {step}: loss {float(loss.detach()):.3f}, lambda max {spectrum.lambda_max:.3g}, "
                    f"lambda min {spectrum.lambda_min:.3g}, trace {spectrum.trace.mean:.3g}",
                    flush=True,
                )
    if rank == 0:
        print(f"spectra took {in_spectra / (time.perf_counter() - began):.0%} of the time")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
