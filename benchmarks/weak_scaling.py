"""Weak scaling by the planner: one sequence a rank, from one node to 128, on GPUs that are not here.

Each point traces the program as one of so many ranks; arithmetic and traffic are those of a machine described by its data
sheet (see hpc_hess.planning.machine). Nothing is run: this shows where traffic would overtake, not what a cluster did.
"""

from __future__ import annotations

from typing import Annotated, Any

from benchmarks.frame import Option, Table, benchmark
from benchmarks.tables import ROOT
from hpc_hess.config import make_config
from hpc_hess.planning.planner import Planner

SHAPES = {"Llama 3 8B": "llama3_8b", "Llama 3 70B": "llama3_70b"}
PER_NODE = 8


def point(shape: str, nodes: int, length: int, gpu: str) -> dict[str, Any]:
    ranks = nodes * PER_NODE
    source = ROOT / "launch" / "configs" / SHAPES[shape] / "config.json"
    config = make_config(
        {
            "model": {"source": str(source), "activation_checkpointing": True},
            "data": {"sequences": ranks, "sequence_length": length},
            "operator": {"check": False},
        }
    )
    plan = Planner(config, PER_NODE, gpu, 1 << 40).plan(nodes)
    return {
        "model": shape,
        "nodes": nodes,
        "ranks": ranks,
        "fits": "yes" if plan.fits else "no",
        "memory a device, GB": plan.device_bytes / 1e9,
        "arithmetic, s": plan.product.compute,
        "traffic, s": plan.product.traffic,
        "product, s, all hidden": plan.product.least,
        "none hidden": plan.product.most,
    }


@benchmark(
    "Weak scaling of a central product by the planner",
    note="Predicted, not run. Arithmetic stays; traffic grows to its limit once it leaves the node. Where it passes "
    "arithmetic, more tokens a rank, or replicas within which ranks share the parameters (parallel.replicate), help.",
)
def main(
    table: Table,
    models: Annotated[tuple[str, ...], Option(choices=(*SHAPES,))] = (*SHAPES,),
    nodes: tuple[int, ...] = (1, 2, 8, 32, 128),
    lengths: tuple[int, ...] = (128, 512, 2048),
    gpu: str = "h100",
) -> None:
    table.settings["ranks a node"] = PER_NODE
    for shape in models:
        for length in lengths:
            for count in nodes:
                row = point(shape, count, length, gpu)
                table.add({"model": row.pop("model"), "tokens a rank": length, **row})


if __name__ == "__main__":
    main()
