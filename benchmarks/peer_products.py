"""One tool of benchmarks/peers.py in a process of its own: seconds of gradients, products and Lanczos steps, memory, error.

Reads a folder that peers.py wrote: ``tokens.npy`` (rows, length), ``v_of_model.npy`` and ``reference_of_model.npy`` (the
exact product in float64, rounded to float32), in the order of ``model.named_parameters()``. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peer_eigsh import Logits, write_out_silu  # the same folder: this runs as a script
from torch import nn

Product = Callable[[torch.Tensor], torch.Tensor]
Tool = tuple[Product, Callable[[int], object] | None]  # a product, and so many Lanczos steps


def load(path: Path, attention: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    file: dict[str, Any] = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    model = AutoModelForCausalLM.from_pretrained(
        path.parent if file else path, dtype=torch.float32, attn_implementation=attention, **file
    )
    return Logits(model.eval())


def loss_of(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    ids, labels = batch
    return nn.functional.cross_entropy(model(ids), labels)


def eigenthings(model: nn.Module, batches: list[Any], method: Any) -> Tool:
    from hessian_eigenthings import HessianOperator
    from hessian_eigenthings.algorithms.lanczos import lanczos_tridiagonal

    operator = HessianOperator(model, batches, loss_of, method=method)
    return operator.matvec, lambda steps: lanczos_tridiagonal(operator, torch.randn(operator.size), steps)


def curvlinops(model: nn.Module, batches: list[Any]) -> Tool:
    from curvlinops import HessianLinearOperator
    from curvlinops.papyan2020traces.spectrum import fast_lanczos

    write_out_silu(model)
    operator = HessianLinearOperator(
        model, nn.CrossEntropyLoss(), list(model.parameters()), batches, check_deterministic=False
    )
    return operator.__matmul__, lambda steps: fast_lanczos(operator, steps)


def pyhessian(model: nn.Module, batches: list[Any]) -> Tool:
    from pyhessian import hessian

    operator = hessian(model, nn.CrossEntropyLoss(), dataloader=batches, cuda=False)

    def product(v: torch.Tensor) -> torch.Tensor:
        pieces = v.split([p.numel() for p in operator.params])
        _, found = operator.dataloader_hv_product([x.view_as(p) for x, p in zip(pieces, operator.params, strict=True)])
        return torch.cat([x.flatten() for x in found])

    return product, lambda steps: operator.density(iter=steps, n_v=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tool", choices=["eigenthings-autograd", "eigenthings-differences", "curvlinops", "pyhessian"])
    parser.add_argument("--model", type=Path, required=True, help="a directory with safetensors, or a .gguf file")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    torch.manual_seed(0)
    # no fused attention kernel has second derivatives; differences need none
    model = load(args.model, "sdpa" if args.tool == "eigenthings-differences" else "eager")
    ids = torch.from_numpy(np.load(args.folder / "tokens.npy"))
    batches = [(rows, rows[:, 1:].flatten()) for rows in ids.split(args.micro_batch)]

    def gradient() -> object:
        return [torch.autograd.grad(loss_of(model, batch), list(model.parameters())) for batch in batches]

    gradient_s = [timed(gradient)[1] for _ in range(args.repeats)]
    builders: dict[str, Callable[[], Tool]] = {
        "eigenthings-autograd": lambda: eigenthings(model, batches, "autograd"),
        "eigenthings-differences": lambda: eigenthings(model, batches, "finite_difference"),
        "curvlinops": lambda: curvlinops(model, batches),
        "pyhessian": lambda: pyhessian(model, batches),
    }
    product, lanczos = builders[args.tool]()
    v, reference = (torch.from_numpy(np.load(args.folder / name)) for name in ("v_of_model.npy", "reference_of_model.npy"))
    found: dict[str, Any] = {}
    seconds, costs = [], []
    for _ in range(args.repeats):
        result, spent = timed(lambda: product(v))
        gradient_s.append(timed(gradient)[1])
        seconds.append(spent)
        costs.append(2 * spent / sum(gradient_s[-2:]))
    error = float((result - reference).norm() / reference.norm())
    del result, reference
    found = {
        "gradient_s": statistics.median(gradient_s),
        "product_s": statistics.median(seconds),
        "gradients": statistics.median(costs),
        "error": error,
    }
    if lanczos is not None:
        began = time.perf_counter()
        try:
            lanczos(args.steps)
            found["finishes"] = "yes"
        except Exception as failure:  # what a user of the tool would see
            found["finishes"] = f"no: {str(failure).splitlines()[0][:90]}"
        found["step_s"] = (time.perf_counter() - began) / args.steps
    found["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    print(json.dumps(found))


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    value = function()
    return value, time.perf_counter() - began


if __name__ == "__main__":
    main()
