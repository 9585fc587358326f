"""Tiny models of all causal LM types of transformers through the intake: which are refused or noted, and why."""

from __future__ import annotations

import contextlib
import signal
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch

from benchmarks.frame import Option, Table, benchmark
from benchmarks.tiny_models import VOCABULARY, names, tiny_model
from hpc_hess.config import make_config
from hpc_hess.console.progress import Progress
from hpc_hess.errors import HpcHessError
from hpc_hess.parallel.world import World
from hpc_hess.session.problem import load_problem

_LONGEST_S = 120


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in a block that takes longer."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"took over {seconds} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def measured(kind: str, world: World) -> dict[str, str]:
    """Save the tiny model of a type and load it as ``run`` does; return what the intake said of it."""
    from transformers import AutoModelForCausalLM

    try:
        model = tiny_model(kind)
        with torch.no_grad():
            model(input_ids=torch.arange(3, 15)[None], use_cache=False)
    except Exception as error:
        return {"runs in transformers": "no", "verdict": "", "why": str(error).strip().splitlines()[0][:150]}
    with tempfile.TemporaryDirectory() as folder:
        model.config.architectures = [type(model).__name__]
        model.save_pretrained(folder)
        try:
            AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        except Exception as error:
            return {"runs in transformers": "not when saved", "verdict": "", "why": str(error).strip().splitlines()[0][:150]}
        np.save(Path(folder) / "tokens.npy", np.random.default_rng(0).integers(3, VOCABULARY, 48))
        config = make_config(
            {
                "model": {"source": folder, "attention": "eager"},
                "data": {"source": f"tokens:{folder}/tokens.npy", "sequence_length": 12, "sequences": 4},
            }
        )
        try:
            problem = load_problem(config, world, Progress(0))
        except HpcHessError as error:
            return {"runs in transformers": "yes", "verdict": "refused", "why": str(error).replace(folder, "DIR")}
    found = [f for f in problem.intake.findings if f.verdict != "passed"]
    text = "; ".join(f"{f.check}: {f.text}" for f in found).replace(folder, "DIR")
    return {"runs in transformers": "yes", "verdict": "noted" if found else "passed", "why": text}


@benchmark("The intake over tiny models of all causal LM types of transformers")
def main(
    table: Table, types: Annotated[tuple[str, ...], Option("measure these only, keep the other rows", positional=True)] = ()
) -> None:
    warnings.filterwarnings("ignore")
    import transformers

    transformers.logging.set_verbosity_error()
    world, kept = World.join("cpu", 60.0), {row["type"]: row for row in table.earlier()}
    for kind, name in names().items():
        if types and kind not in types:
            if kind in kept:
                table.add(kept[kind])
            continue
        try:
            with limited(_LONGEST_S):
                row = measured(kind, world)
        except Exception as error:  # a traceback: what this table is to find
            row = {"runs in transformers": "yes", "verdict": f"ERROR {type(error).__name__}", "why": str(error)[:150]}
        table.add({"type": kind, "class": name, **row})
    ran = [row for row in table.rows if row["runs in transformers"] == "yes"]
    counts = {verdict: sum(row["verdict"] == verdict for row in ran) for verdict in ("passed", "noted", "refused")}
    table.settings |= {
        "types": len(table.rows),
        "run a forward pass when tiny": len(ran),
        **counts,
        "error": len(ran) - sum(counts.values()),
    }


if __name__ == "__main__":
    main()
