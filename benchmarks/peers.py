"""hpc_hess beside the other Hessian tools, in one run on one machine: SmolLM2-135M and a GPT-2 of random weights.

Each tool is a process of its own, on the same weights and tokens, with all cores. A product is timed between gradients of
the same process (the tool's own way to compute one): its cost in gradients is what compares machines. The error is that of
one random vector against the exact product in float64. The peers come from PyPI, in an environment of their own:

    python -m venv PEERS
    PEERS/bin/pip install curvlinops-for-pytorch==3.0.1 hessian-eigenthings==1.0.0a5 pyhessian==0.1 torch==2.13.0 \
        transformers gguf

HessFormer is left out: what it releases multiplies with another matrix than the loss's Hessian.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch

from benchmarks.frame import Option, Table, benchmark
from benchmarks.processes import FailedError, apart, run
from hpc_hess.config import make_config
from hpc_hess.console.progress import make_progress
from hpc_hess.curvature.differences.finite_difference import FiniteDifferenceHessian
from hpc_hess.curvature.exact.exact import ExactHessian
from hpc_hess.curvature.exact.streaming import Settings
from hpc_hess.linalg.lanczos import Lanczos
from hpc_hess.parallel.basis import Basis
from hpc_hess.parallel.world import World
from hpc_hess.session.problem import Problem, load_problem
from hpc_hess.session.reference import start_vector

OURS = {
    "central": "hpc_hess, central differences",
    "forward": "hpc_hess, forward differences",
    "exact": "hpc_hess, exact, compiled",
    "exact-keeping": "hpc_hess, exact, compiled, keeping state",
    "exact-lock-step": "hpc_hess, exact, compiled, 4 vectors in lock-step, each",
}
PEERS = {
    "eigenthings-differences": "hessian-eigenthings 1.0.0a5, finite differences",
    "eigenthings-autograd": "hessian-eigenthings 1.0.0a5, autograd",
    "curvlinops": "curvlinops-for-pytorch 3.0.1",
    "pyhessian": "pyhessian 0.1",
}
GPT2 = "GPT-2, 124 M, random"
SMOLLM2 = "SmolLM2-135M"
RESULTS_OF = {SMOLLM2: "peers", GPT2: "peers_gpt2"}  # a table a model: each is one run


@contextlib.contextmanager
def subject(name: str, rows: int, length: int) -> Iterator[dict[str, Any]]:
    """Yield the sections [model] and [data]."""
    if name == SMOLLM2:
        yield {"data": {"source": "text:launch/data/gpl-3.txt", "sequences": rows, "sequence_length": length}}
        return
    from transformers import GPT2Config, GPT2LMHeadModel

    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        GPT2LMHeadModel(GPT2Config()).save_pretrained(folder)
        np.save(Path(folder) / "tokens.npy", np.random.default_rng(0).integers(3, 50000, rows * length))
        data = {"source": f"tokens:{folder}/tokens.npy", "sequences": rows, "sequence_length": length}
        yield {"model": {"source": folder}, "data": data}


def load(config: dict[str, Any], dtype: str) -> Problem:
    model = {**config.get("model", {}), "master_dtype": dtype, "compute_dtype": dtype}
    return load_problem(make_config({**config, "model": model}), World.alone("cpu"), make_progress(False, 1))


def prepare(config: dict[str, Any], folder: Path) -> Path:
    """Write tokens, a vector and its exact product in float64, for every tool; return the weights' path."""
    problem = load(config, "float64")
    v = start_vector(problem.model.space, 0, 1, "gaussian")
    np.save(folder / "tokens.npy", problem.samples.input_ids.numpy())
    exact = ExactHessian(problem.model, problem.gradient.objective)
    reference = exact.matvec(problem.model.space.wrap(v.data.float().double()))
    places = {p.name: slice(p.file_offset, p.file_offset + p.numel) for p in problem.model.layout.parameters}
    for name, vector in (("v", v), ("reference", reference)):
        values = vector.data.float().numpy()
        np.save(folder / f"{name}.npy", values)
        # the peers' order is the model's, ours is by name
        np.save(
            folder / f"{name}_of_model.npy",
            np.concatenate([values[places[n]] for n, _ in problem.model.module.named_parameters()]),
        )
    return Path(problem.source.path)


def ours(tool: str, config: dict[str, Any], folder: str, repeats: int, steps: int) -> dict[str, Any]:
    """Measure one of our products in this process."""
    problem = load(config, "float32")
    space, out = problem.model.space, problem.model.space.zeros()
    v, reference = (space.wrap(torch.from_numpy(np.load(Path(folder) / name))) for name in ("v.npy", "reference.npy"))
    operator: Any
    if tool in ("central", "forward"):
        operator = FiniteDifferenceHessian(problem.gradient, tool)  # type: ignore[arg-type]
    else:
        settings = Settings(keep_state=tool == "exact-keeping", compile="on", programs=Path(folder))
        operator = ExactHessian(problem.model, problem.gradient.objective, settings=settings)
    width = 4 if tool == "exact-lock-step" else 1
    vectors = [v, *(start_vector(space, 0, 2 + k, "gaussian") for k in range(width - 1))]

    def gradient() -> float:
        began = time.perf_counter()
        problem.gradient(out)
        return time.perf_counter() - began

    if tool.startswith("exact"):
        operator.matmat(vectors)  # compiles
    gradient_s = [gradient() for _ in range(repeats)]
    seconds, costs, calibration_s = [], [], 0.0
    for _ in range(repeats):
        began = time.perf_counter()
        found = operator.matmat(vectors) if width > 1 else [operator.matvec(v)]
        spent = time.perf_counter() - began
        if tool in ("central", "forward"):
            calibration_s += operator.records[-1].calibration_s
            spent -= operator.records[-1].calibration_s
        gradient_s.append(gradient())
        seconds.append(spent / width)
        costs.append(2 * spent / width / sum(gradient_s[-2:]))
    error = float((found[0].data - reference.data).norm() / reference.data.norm())
    del found, reference
    step_s = None
    if width == 1:
        process = Lanczos(operator, Basis(space, steps), steps)
        process.start(vectors[0])
        before = getattr(operator, "records", [])[:]
        began = time.perf_counter()
        while not process.finished:
            process.step()
        step_s = time.perf_counter() - began
        step_s -= sum(record.calibration_s for record in getattr(operator, "records", [])[len(before) :])
        step_s /= steps
    return {
        "gradient_s": statistics.median(gradient_s),
        "product_s": statistics.median(seconds),
        "gradients": statistics.median(costs),
        "error": error,
        "step_s": step_s,
        "finishes": "yes",
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
        "calibration_s": calibration_s,
    }


def theirs(tool: str, python: Path, weights: Path, folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Measure a peer's product in its own environment."""
    words = ["--micro-batch", given.micro_batch, "--folder", folder, "--repeats", given.repeats, "--steps", given.steps]
    printed = run(python, "benchmarks/peer_products.py", tool, "--model", weights, *words, PYTHONPATH="")
    return dict(json.loads(printed.strip().splitlines()[-1]))


def line(model: str, title: str, found: dict[str, Any]) -> dict[str, Any]:
    """Return a row of the table."""
    step = found.get("step_s")
    return {
        "model": model,
        "tool": title,
        "product, s": found["product_s"],
        "in gradients": found["gradients"],
        "error": found["error"],
        "Lanczos step, s": "" if step is None else step,
        "beside its product, %": "" if step is None else 100 * (step / found["product_s"] - 1),
        "peak memory, GB": found["peak_bytes"] / 1e9,
        "gradient, s": found["gradient_s"],
        "finishes": found["finishes"],
    }


@benchmark(
    "Products and Lanczos steps beside other tools",
    note="A product is timed between two gradients of the same process; medians. A Lanczos step is the mean over a process "
    "of so many steps: hpc_hess and hessian-eigenthings reorthogonalise against the whole basis, curvlinops against none, "
    "pyhessian against all. Our exact products are compiled before. Calibration of our finite differences (done again every "
    "few products) is apart. The peers' gradients are autograd's of the whole loss; ours are written into a vector, with "
    "chunks of the cross-entropy.",
)
def main(
    table: Table,
    python: Annotated[Path, "of the environment with the peers"],
    models: Annotated[tuple[str, ...], Option(choices=(SMOLLM2, GPT2))] = (SMOLLM2, GPT2),
    sequences: int = 2,
    length: int = 128,
    micro_batch: int = 1,
    repeats: int = 3,
    steps: int = 8,
    only: Annotated[str, "tools whose name holds this text"] = "",
) -> None:
    table.settings["threads"] = os.cpu_count()
    for name in models:
        if table.rows:
            table.finish()
        table.name = RESULTS_OF[name]
        with subject(name, sequences, length) as config, tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            config.setdefault("data", {})["micro_batch"] = micro_batch
            weights = prepare(config, folder)
            for tool, title in {**OURS, **PEERS}.items():
                if only not in tool:
                    continue
                try:
                    (found,) = (
                        apart(ours, tool, config, place, repeats, steps)
                        if tool in OURS
                        else [theirs(tool, python, weights, folder, table.given)]
                    )
                    table.add(line(name, title, found))
                except FailedError as failed:
                    print(failed, flush=True)
                    table.add({"model": name, "tool": title, "finishes": f"no: {failed.why[:90]}"})


if __name__ == "__main__":
    main()
