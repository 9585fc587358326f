"""Peak memory of a rank on SmolLM2-135M against the sum of what a run must hold."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from benchmarks.common import run_program, write
from hpc_hess.config import make_config
from hpc_hess.model.data.data import load_samples
from hpc_hess.model.sharded.blocklist import find_blocks
from hpc_hess.model.sharded.skeleton import build_skeleton
from hpc_hess.model.sources.source import resolve_source


def activation_bytes(sequence_length: int) -> tuple[int, int, int, int]:
    """Bytes saved for backward by one micro-batch (counted by hooks), logits, largest block and root group in float32."""
    from transformers import AutoModelForCausalLM

    config = make_config({})
    source = resolve_source(config.model)
    skeleton = build_skeleton(source, config.model)
    blocks = find_blocks(skeleton)
    assert blocks is not None
    block = max(sum(p.numel() for p in b.parameters()) for b in blocks) * 4
    root = sum(p.numel() for p in skeleton.parameters()) * 4 - sum(p.numel() for b in blocks for p in b.parameters()) * 4
    samples = load_samples(config.data, config.model, source)
    model = AutoModelForCausalLM.from_config(source.hf_config, attn_implementation="sdpa").eval()
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = samples.input_ids[:1, :sequence_length]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        logits = model(input_ids=ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())
    del loss
    return sum(saved.values()), logits.numel() * 4, block, root


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--check", choices=["both", "with", "without"], default="both", help="against the exact product")
    args = parser.parse_args()
    length = 128
    cases = {"with the check against the exact product (the default)": True, "without it": False}
    if args.check != "both":
        cases = {name: check for name, check in cases.items() if check == (args.check == "with")}
    data = {"sequences": args.ranks, "sequence_length": length}
    results = {
        name: run_program({"data": data, "lanczos": {"steps": args.steps}, "operator": {"check": check}}, args.ranks)
        for name, check in cases.items()
    }
    shard = -(-next(iter(results.values()))["num_params"] // args.ranks) * 4
    activations, logits, block, root = activation_bytes(length)
    parts = {
        "parameters": shard, "gradients": shard, "theta_0": shard, "3 vectors": 3 * shard,
        f"basis, {args.steps} rows": args.steps * shard, "activations": activations,
        # a group is there as gathered parameters, as gradients, and as the buffers of its collectives
        "largest unsharded group and its buffers": 3 * max(block, root) + root, "logits and their gradient": 2 * logits,
    }  # fmt: skip
    total = sum(parts.values())
    rows: list[dict[str, Any]] = [{"part": name, "MB": value / 1e6, "of the sum": ""} for name, value in parts.items()]
    rows.append({"part": "sum", "MB": total / 1e6, "of the sum": "asked: <= 1.10"})
    for name, result in results.items():
        measured = result["memory"]["peak_bytes"] - result["memory"]["baseline_bytes"]
        rows.append({"part": f"measured (peak RSS above RSS after the imports), {name}", "MB": measured / 1e6,
                     "of the sum": measured / total})  # fmt: skip
    write("memory", "Peak memory of a rank, SmolLM2-135M", rows,
          {"ranks": args.ranks, "steps": args.steps, "micro_batch": f"1 x {length}", "reorthogonalise": "full"})  # fmt: skip


if __name__ == "__main__":
    main()
