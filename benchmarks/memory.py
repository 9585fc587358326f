"""Peak memory of a rank on SmolLM2-135M against the sum of what a run must hold."""

from __future__ import annotations

from typing import Annotated, Literal

import torch

from benchmarks.frame import Table, benchmark
from benchmarks.processes import run_program
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


@benchmark("Peak memory of a rank, SmolLM2-135M", asked="measured: at most 1.10 of the sum")
def main(
    table: Table,
    ranks: int = 2,
    steps: int = 20,
    check: Annotated[Literal["both", "with", "without"], "against the exact product"] = "both",
) -> None:
    length = 128
    table.settings |= {"micro-batch": f"1 x {length}", "reorthogonalise": "full"}
    cases = {"with the check against the exact product (the default)": True, "without it": False}
    data = {"sequences": ranks, "sequence_length": length}
    results = {
        name: run_program({"data": data, "lanczos": {"steps": steps}, "operator": {"check": checked}}, ranks)
        for name, checked in cases.items()
        if check == "both" or checked == (check == "with")
    }
    shard = -(-next(iter(results.values()))["num_params"] // ranks) * 4
    activations, logits, block, root = activation_bytes(length)
    parts = {
        "parameters": shard,
        "gradients": shard,
        "theta_0": shard,
        "3 vectors": 3 * shard,
        f"basis, {steps} rows": steps * shard,
        "activations": activations,
        # a group is there as gathered parameters, as gradients, and as the buffers of its collectives
        "largest unsharded group and its buffers": 3 * max(block, root) + root,
        "logits and their gradient": 2 * logits,
    }
    total = sum(parts.values())
    for name, value in {**parts, "sum": total}.items():
        table.add({"part": name, "MB": value / 1e6, "of the sum": ""})
    for name, result in results.items():
        measured = result["memory"]["peak_bytes"] - result["memory"]["baseline_bytes"]
        table.add(
            {
                "part": f"measured (peak RSS above RSS after the imports), {name}",
                "MB": measured / 1e6,
                "of the sum": measured / total,
            }
        )


if __name__ == "__main__":
    main()
