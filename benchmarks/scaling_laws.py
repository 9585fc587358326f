"""Laws fitted to small runs, and the largest model predicted by them: ``hpc_hess scaling run`` and ``scaling fit``.

Random Llamas on 1 and 2 ranks of one thread each, two lengths of sequences, both products. The largest model is left out of
the fit; its seconds and its memory are then predicted.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import tomli_w

from benchmarks.frame import Option, Table, benchmark
from benchmarks.llamas import LLAMAS, random_llama
from benchmarks.processes import program
from benchmarks.tables import ROOT

SEQUENCES = 2  # of a rank


def held_out(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each law and each run that it did not see, from scaling.json."""
    runs, rows = {run["name"]: run for run in record["runs"]}, []
    for operator, found in record["operators"].items():
        for law in ("time", "memory"):
            held = found[law]["hold_out"]
            for name in dict.fromkeys(held["runs"]):
                run = runs[name]
                ratios = [1 + error for of, error in zip(held["runs"], held["errors"], strict=True) if of == name]
                rows.append(
                    {
                        "product": operator,
                        "law": law,
                        "parameters": f"{run['num_params']:,}",
                        "ranks": run["ranks"],
                        "tokens": run["tokens"],
                        "predicted / measured": sum(ratios) / len(ratios),
                        "least": min(ratios),
                        "most": max(ratios),
                    }
                )
    return rows


@benchmark("The largest model, predicted by laws fitted to the smaller ones")
def main(
    table: Table,
    models: Annotated[tuple[str, ...], Option(choices=(*LLAMAS,))] = ("9 M", "24 M", "51 M", "93 M"),
    ranks: tuple[int, ...] = (1, 2),
    lengths: tuple[int, ...] = (128, 256),
    methods: tuple[str, ...] = ("finite_difference", "exact"),
    steps: int = 4,
) -> None:
    table.settings |= {"sequences of a rank": SEQUENCES, "threads of a rank": 1}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        shapes = [LLAMAS[name] for name in models]
        given = [stack.enter_context(random_llama(shape, SEQUENCES * max(ranks), max(lengths))) for shape in shapes]
        config = {**given[0], "parallel": {"device": "cpu"}, "run": {"report": False}}  # its few tokens are known to all
        (folder / "config.toml").write_text(tomli_w.dumps(config))
        study = {
            "config": str(folder / "config.toml"),
            "out": str(folder / "study"),
            "set": {
                "lanczos.steps": steps,
                "lanczos.reorthogonalise": "full",
                "operator.check": False,
                "operator.step": 0.1,
                "data.micro_batch": 1,
            },
            "per_rank": {"data.sequences": SEQUENCES},
            "sweep": {
                "ranks": list(ranks),
                "model.source": [each["model"]["source"] for each in given],
                "data.sequence_length": list(lengths),
                "operator.method": list(methods),
            },
        }
        (folder / "study.toml").write_text(tomli_w.dumps(study))
        program("scaling", "run", folder / "study.toml", threads=1)
        out = ROOT / "runs" / "scaling_laws"  # the page stays there
        program("scaling", "fit", *sorted((folder / "study").iterdir()), "--out", out, threads=1)
    for row in held_out(json.loads((out / "scaling.json").read_text())):
        table.add(row)


if __name__ == "__main__":
    main()
