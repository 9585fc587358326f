"""Kernels that one Llama block launches in an exact product: operation by operation, and compiled.

Counted on the traced graphs of a toy Llama, whose block has the operations of a large one. Views launch nothing. Matrix
products stay calls of a library; everything else is fused into kernels of the compiler.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._inductor import metrics

from benchmarks.frame import Table, benchmark
from benchmarks.products import LLAMAS, load, probe
from hpc_hess.curvature.exact import programs
from hpc_hess.curvature.exact.exact import ExactHessian
from hpc_hess.curvature.exact.streaming import Settings

_PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "attention"}


def _launched(graph: fx.GraphModule) -> list[str]:
    """Return the names of operations that write memory."""
    found = []
    for node in graph.graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            schema = node.target._schema
            view = any(a.alias_info and not a.alias_info.is_write for a in schema.arguments)
            if not view:
                found.append(schema.name.split("::")[1].removesuffix("_"))
    return found


@benchmark("Kernels of one Llama block in an exact product", asked="fewer")
def main(table: Table) -> None:
    from benchmarks.llamas import random_llama

    compile_graph, counted = programs.compile_graph, list[dict[str, Any]]()

    def counting(graph: fx.GraphModule, tensors: list[torch.Tensor], path: Any) -> Any:
        operations = _launched(graph)
        before = metrics.generated_kernel_count
        program = compile_graph(graph, tensors, None)
        products = sum(name in _PRODUCTS for name in operations)
        counted.append(
            {
                "kernels, operation by operation": len(operations),
                "of them matrix products": products,
                "kernels, compiled": metrics.generated_kernel_count - before + products,
            }
        )
        return program

    programs.compile_graph = counting
    _, shape, rows, length = LLAMAS["toy"]
    with random_llama(shape, rows, length) as config, torch._inductor.config.patch(fx_graph_cache=False):
        problem = load(config, "float32")
        for width in (1, 4):
            counted.clear()
            operator = ExactHessian(problem.model, problem.objective, settings=Settings(compile="on"))
            operator.matmat([probe(problem, k) for k in range(width)])
            for way, row in zip(("there", "loss", "back"), counted, strict=True):
                table.add({"directions": width, "function": way, **row})


if __name__ == "__main__":
    main()
