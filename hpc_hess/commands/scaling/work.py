"""``hpc-hess scaling``: run a study point by point, fit the laws to finished runs, measure the machine."""

from __future__ import annotations

import json
import statistics
import subprocess
import tempfile
import timeit
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpc_hess.commands.scaling.page import write_scaling_page
from hpc_hess.config import make_config
from hpc_hess.console.progress import Progress
from hpc_hess.errors import ConfigError, LaunchError
from hpc_hess.linalg import probes
from hpc_hess.parallel import devices
from hpc_hess.parallel.memory import host_bytes_free
from hpc_hess.parallel.world import World
from hpc_hess.planning import laws
from hpc_hess.planning.laws import Law, Observed, fit, fitted_and_predicted
from hpc_hess.planning.machine import Machine, measure, seconds
from hpc_hess.planning.planner import trace
from hpc_hess.planning.sweep import Measured, Point, measured, points, read_study
from hpc_hess.session.operators import build_operator, exact_operator
from hpc_hess.session.problem import load_problem
from hpc_hess.storage.run_files import write_aside

_TRIAL: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 8192,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_TRIAL_ON_GPU = {"hidden_size": 2048, "intermediate_size": 6144, "max_position_embeddings": 2048}
_TRIAL_REPEATS = 3
_LAUNCH = Path(__file__).resolve().parents[3] / "launch"


def run_study(path: Path, only: Sequence[int] = ()) -> int:
    """Run every point of a study that has no result yet, or those numbered in ``only``; one after the other.

    Returns the exit code of the first that fails; one that stopped early (75) is gone on with by the same command. Raises
    ConfigError, LaunchError.
    """
    study = read_study(path)
    everything = points(study)
    if any(not 0 <= k < len(everything) for k in only):
        raise ConfigError(f"{path} has points 0 to {len(everything) - 1}, not {list(only)}")
    launcher = _LAUNCH / f"{study.launcher}.sh"
    if not launcher.is_file():
        raise LaunchError(f"{launcher} is not there: run studies from a clone of the repository")
    for number in only or range(len(everything)):
        point = everything[number]
        if (Path(study.out) / point.name / "result.json").exists():
            print(f"{point.name}: done before", flush=True)
        elif code := _run(launcher, study.config, point):
            return code
    return 0


def _run(launcher: Path, config: str, point: Point) -> int:
    print(f"{point.name}: begins", flush=True)
    options = [word for override in point.overrides for word in ("--set", override)]
    command = [str(launcher), "-n", str(point.ranks), config, *options]
    return subprocess.run(command, check=False).returncode


def fit_runs(folders: Sequence[Path], out: Path) -> int:
    """Fit the laws to runs, hold the largest out, and write OUT/scaling.json and OUT/scaling.html. Raises ConfigError."""
    runs = [measured(folder) for folder in folders]
    record: dict[str, Any] = {"operators": {}, "runs": [_row(run) for run in runs]}
    for operator in dict.fromkeys(run.operator for run in runs):
        same = [run for run in runs if run.operator == operator]
        record["operators"][operator] = {
            "runs": [run.name for run in same],
            "time": _fitted(same, laws.TIME_TERMS, laws.times),
            "memory": _fitted(same, laws.MEMORY_TERMS, laws.memories),
        }
    out.mkdir(parents=True, exist_ok=True)
    write_aside(out / "scaling.json", json.dumps(record, indent=1) + "\n")
    print(write_scaling_page(out, record))
    return 0


def _fitted(
    runs: list[Measured], terms: tuple[str, ...], observe: Callable[[Sequence[Measured]], Observed]
) -> dict[str, Any]:
    """Fit a law to all runs, and once more without the largest, which that one predicts."""
    found = _law(fit(terms, observe(runs)))
    try:
        small, large = fitted_and_predicted(runs)
    except ConfigError as error:
        return {**found, "hold_out": {"note": str(error)}}
    law, truth = fit(terms, observe(small)), observe(large)
    errors = truth.design @ law.coefficients / truth.values - 1
    return {**found, "hold_out": {"runs": [large[k].name for k in truth.run], "errors": errors.tolist()}}


def _row(run: Measured) -> dict[str, Any]:
    steps = run.steps[1:] or run.steps
    return {
        "name": run.name,
        "operator": run.operator,
        "num_params": run.num_params,
        "ranks": run.ranks,
        "tokens": run.tokens,
        "memory_bytes": run.memory_bytes,
        "hvp_s": float(np.median([hvp for _, hvp, _ in steps])),
        "lanczos_s": float(np.median([lanczos for _, _, lanczos in steps])),
    }


def _law(law: Law) -> dict[str, Any]:
    return {
        "terms": law.terms,
        "coefficients": law.coefficients.tolist(),
        "low": law.low.tolist(),
        "high": law.high.tolist(),
        "run": law.run,
        "measured": law.measured.tolist(),
        "predicted": law.predicted.tolist(),
    }


def measure_machine(out: Path) -> int:
    """Time this machine's device and write what ``hpc-hess plan --gpu OUT`` reads."""
    device = torch.device(devices.find_kind() or "cpu")
    if devices.is_gpu(device):
        name, memory = devices.name(device), devices.total_bytes(device)
    else:
        name, memory = f"{torch.get_num_threads()} threads", host_bytes_free()
    machine = measure(device, name, memory)
    machine = replace(machine, shares=_shares(machine, device))
    write_aside(out, machine.to_json())
    rates = ", ".join(f"{dtype} {rate / 1e9:.4g} GFLOP/s" for dtype, rate in machine.flops_per_s.items())
    print(
        f"{name}: {rates}; copies {machine.bytes_per_s / 1e9:.3g} GB/s; {machine.operation_s * 1e6:.3g} us an operation; "
        + ", ".join(
            f"products by {kind.replace('_', ' ')} at {100 * share:.3g} % of what these say"
            for kind, share in machine.shares.items()
        )
    )
    print(out)
    return 0


def _shares(machine: Machine, device: torch.device) -> dict[str, float]:
    """Return, by operator.method, how long a product with a small model should take by ``machine``, over how long it does.

    Matrix products are smaller than those that were timed, memory is fresh, Python takes its time: less than one.
    """
    shape = _TRIAL | (_TRIAL_ON_GPU if devices.is_gpu(device) else {})
    length, found = shape["max_position_embeddings"], {}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(shape))
        np.save(Path(folder) / "tokens.npy", np.random.default_rng(0).integers(3, shape["vocab_size"], length))
        for method in ("finite_difference", "exact"):
            config = make_config(
                {
                    "model": {"source": f"{folder}/config.json"},
                    "parallel": {"device": device.type},
                    "data": {"source": f"tokens:{folder}/tokens.npy", "sequence_length": length, "sequences": 1},
                    "operator": {"method": method, "step": 0.1, "check": False},
                }
            )
            traced = trace(config, 1, 1, gloo=device.type == "cpu")
            problem = load_problem(config, World.alone(device.type), Progress(0))
            exact = exact_operator(config, problem) if method == "exact" else None
            operator = build_operator(config, problem, *problem.gradient(), exact)
            v = probes.draw(problem.space, seed=0, probe=0, distribution="rademacher")
            # norm: waits for a GPU
            taken_s = timeit.repeat(lambda a=operator, v=v: a.matvec(v).norm(), number=1, repeat=1 + _TRIAL_REPEATS)  # type: ignore[misc]
            found[method] = seconds(traced.product, machine, 1, 1).most / statistics.median(taken_s[1:])
    return found
