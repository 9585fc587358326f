"""Time of one gradient sketch of SmolLM2-135M, by kind and dimension, beside the gradient's own time.

Explicit: the gradient is sketched. Implicit: theta_0 + Phi^T w is differentiated. Dense maps are timed on a part of the
vector and scaled, since they cost N D. Schioppa 2024, tables 3, 4, 8, 9, 11. Memory: benchmarks.sketch_memory.
``--traker PYTHON``: an environment with it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch.nn.functional import cross_entropy

from benchmarks.frame import Table, benchmark
from benchmarks.processes import run
from benchmarks.sketch_memory import sketch_once
from hpc_hess.config import make_config
from hpc_hess.console.progress import Progress
from hpc_hess.parallel.world import World
from hpc_hess.session.problem import Problem, load_problem
from hpc_hess.sketch.implicit import implicit_gradient, implicit_product
from hpc_hess.sketch.kinds import SketchSettings
from hpc_hess.sketch.sketch import Sketch

PART = 1 << 20  # entries that a dense map is timed on

_TRAKER = """
import sys, time, torch
from trak.projectors import BasicProjector
n, d = int(sys.argv[1]), int(sys.argv[2])
projector = BasicProjector(grad_dim=n, proj_dim=d, seed=0, proj_type="rademacher", device="cpu", block_size=100)
x = torch.randn(1, n)
projector.project(x, model_id=0)
t = time.perf_counter(); projector.project(x, model_id=0); print(time.perf_counter() - t)
"""


def best(function: Callable[[], Any], times: int) -> float:
    """Return the median time of a function, after one run that warms up."""
    function()
    seconds = []
    for _ in range(times):
        settle()
        began = time.perf_counter()
        function()
        settle()
        seconds.append(time.perf_counter() - began)
    return sorted(seconds)[len(seconds) // 2]


def settle() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def explicit(problem: Problem, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    size = problem.model.space.size
    gradient_s = best(problem.gradient, args.times)
    x = problem.gradient()[1].data
    yield {"sketch": "gradient alone", "seconds": gradient_s, "of a gradient": 1.0}
    cases = [(k, p) for k in ("qk", "afjl", "affd") for p in (("hadamard", "fft", "haar") if k != "qk" else ("haar",))]
    for kind, preconditioner in [*cases, ("ffd", "hadamard"), ("fjl", "hadamard")]:
        for bits in args.bits:
            if kind == "fjl" and bits > 16:
                continue  # its non-zero entries alone would take over a minute
            settings = SketchSettings(kind=kind, dimension=1 << bits, preconditioner=preconditioner)  # type: ignore[arg-type]
            sketch = Sketch(size, settings)
            slow = kind in ("ffd", "fjl")
            seconds = best(lambda s=sketch: sketch_once(s, x), 1 if slow else args.times)  # type: ignore[misc]
            row = {
                "sketch": kind,
                "within": "" if kind == "qk" else preconditioner,
                "log2 D": bits,
                "seconds": seconds,
                "of a gradient": seconds / gradient_s,
            }
            yield row
    for kind in ("rademacher", "gaussian"):
        for bits in args.bits[:1]:
            sketch = Sketch(PART, SketchSettings(kind=kind, dimension=1 << bits))  # type: ignore[arg-type]
            part = x[:PART]
            began = time.perf_counter()
            sketch_once(sketch, part)
            seconds = (time.perf_counter() - began) * size / PART
            yield {
                "sketch": f"dense {kind}",
                "log2 D": bits,
                "seconds": seconds,
                "of a gradient": seconds / gradient_s,
                "note": f"{PART:,} entries, scaled",
            }
    if args.traker:
        for bits in args.bits[:1]:
            printed = run(args.traker, "-c", _TRAKER, PART, 1 << bits, PYTHONPATH="")
            seconds = float(printed.split()[-1]) * size / PART
            yield {
                "sketch": "traker BasicProjector",
                "log2 D": bits,
                "seconds": seconds,
                "of a gradient": seconds / gradient_s,
                "note": f"{PART:,} entries, scaled",
            }


def forms(problem: Problem, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Gradients and Hessian products in both forms."""
    model, space = problem.model.module, problem.model.space
    batch = problem.objective.micro_batches[0]
    theta0 = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        logits = torch.func.functional_call(
            model, parameters, (), {"input_ids": batch.input_ids.to(space.device), "use_cache": False}
        ).logits
        return cross_entropy(logits[0, :-1], batch.labels[0, 1:].to(space.device))

    def whole(create_graph: bool = False) -> tuple[torch.Tensor, ...]:
        leaves = {n: t.detach().requires_grad_() for n, t in theta0.items()}
        return leaves, torch.autograd.grad(loss(leaves), list(leaves.values()), create_graph=create_graph)  # type: ignore[return-value]

    def ordered(leaves: dict[str, torch.Tensor], parts: Any) -> torch.Tensor:
        found = dict(zip(leaves, parts, strict=True))
        return torch.cat([found[p.name].reshape(-1) for p in space.layout.parameters])

    for kind, preconditioner in [
        ("affd", "hadamard"),
        ("affd", "haar"),
        ("affd", "fft"),
        ("afjl", "hadamard"),
        ("afjl", "haar"),
        ("afjl", "fft"),
        ("qk", "haar"),
    ]:
        settings = SketchSettings(kind=kind, dimension=1 << args.forms_bits, preconditioner=preconditioner)  # type: ignore[arg-type]
        sketch = Sketch(space.size, settings)
        v = torch.randn(sketch.dimension, device=space.device)

        def explicit_gradient(sketch: Sketch = sketch) -> torch.Tensor:
            return sketch_once(sketch, ordered(*whole()))

        def explicit_product(sketch: Sketch = sketch, v: torch.Tensor = v) -> torch.Tensor:
            flat = torch.empty(space.size, device=space.device)
            sketch.lift(v, flat, [0], [space.size])
            leaves, gradient = whole(create_graph=True)
            direction = {
                p.name: flat[p.global_offset : p.global_offset + p.numel].view(p.shape) for p in space.layout.parameters
            }
            found = torch.autograd.grad(gradient, list(leaves.values()), [direction[n] for n in leaves])
            return sketch_once(sketch, ordered(leaves, found))

        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            times = {
                "gradient, explicit": best(explicit_gradient, args.times),
                "gradient, implicit": best(
                    lambda s=sketch: implicit_gradient(loss, theta0, s, space.layout),
                    args.times,  # type: ignore[misc]
                ),
                "product, explicit": best(explicit_product, 1),
                "product, implicit": best(lambda s=sketch, v=v: implicit_product(loss, theta0, v, s, space.layout), 1),  # type: ignore[misc]
            }
        row = {
            "sketch": kind,
            "within": preconditioner,
            **times,
            "gradient, ratio": times["gradient, implicit"] / times["gradient, explicit"],
            "product, ratio": times["product, implicit"] / times["product, explicit"],
        }
        yield row


@benchmark("Cost of one gradient sketch of SmolLM2-135M")
def main(
    table: Table,
    bits: tuple[int, ...] = (12, 14, 16, 18, 20),
    forms_bits: int = 16,
    length: int = 128,
    times: int = 3,
    traker: Annotated[Path | None, "Python of an environment with traker"] = None,
    only: Literal["explicit", "forms"] | None = None,
) -> None:
    world = World.alone("cuda" if torch.cuda.is_available() else "cpu")
    config = make_config({"data": {"sequences": 1, "sequence_length": length}})
    problem = load_problem(config, world, Progress(0))
    table.settings |= {"N": problem.model.space.size, "threads": torch.get_num_threads()}
    if only != "forms":
        table.note = "Within: the orthogonal transform. Medians. Memory: sketch_memory."
        for row in explicit(problem, table.given):
            table.add(row)
    if only != "explicit":
        if table.rows:
            table.finish()
        table.name, table.title = "sketch_forms", "Explicit and implicit sketches of SmolLM2-135M"
        table.note = (
            "Seconds; ratios are implicit over explicit. Products by two passes backwards through the whole model "
            "in both forms, attention by matrix products."
        )
        for row in forms(problem, table.given):
            table.add(row)


if __name__ == "__main__":
    main()
