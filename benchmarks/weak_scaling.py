"""Weak scaling by the planner: one sequence a rank, from one node to 128, on GPUs that are not here.

Each point traces the program as one of so many ranks; arithmetic and traffic are those of a machine described by its data
sheet (see hpc_hess.planning.machine). Nothing is run: this shows where traffic would overtake, not what a cluster did.
"""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.common import ROOT, write
from hpc_hess.config import make_config
from hpc_hess.planning.planner import Planner

SHAPES = {"Llama 3 8B": "llama3_8b", "Llama 3 70B": "llama3_70b"}
PER_NODE = 8


def point(shape: str, nodes: int, length: int, gpu: str) -> dict[str, Any]:
    ranks = nodes * PER_NODE
    source = ROOT / "launch" / "configs" / SHAPES[shape] / "config.json"
    config = make_config({
        "model": {"source": str(source), "activation_checkpointing": True},
        "data": {"sequences": ranks, "sequence_length": length}, "operator": {"check": False},
    })  # fmt: skip
    plan = Planner(config, PER_NODE, gpu, 1 << 40).plan(nodes)
    return {
        "model": shape, "nodes": nodes, "ranks": ranks, "fits": "yes" if plan.fits else "no",
        "memory a device, GB": plan.device_bytes / 1e9, "arithmetic, s": plan.product.compute,
        "traffic, s": plan.product.traffic, "product, s, all hidden": plan.product.least, "none hidden": plan.product.most,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--nodes", nargs="+", type=int, default=[1, 2, 8, 32, 128])
    parser.add_argument("--lengths", nargs="+", type=int, default=[128, 512, 2048])
    parser.add_argument("--gpu", default="h100")
    args = parser.parse_args()
    rows = []
    for shape in args.models:
        for length in args.lengths:
            for nodes in args.nodes:
                row = point(shape, nodes, length, args.gpu)
                rows.append({"model": row.pop("model"), "tokens a rank": length, **row})
                print(rows[-1], flush=True)
    settings = {"gpu": args.gpu, "ranks a node": PER_NODE}
    write("weak_scaling", "Weak scaling of a central product by the planner", rows, settings, NOTE)


NOTE = (
    "Predicted, not run. Arithmetic stays; traffic grows to its limit once it leaves the node. Where it passes arithmetic, "
    "more tokens a rank, or replicas within which ranks share the parameters (parallel.replicate), help."
)


if __name__ == "__main__":
    main()
