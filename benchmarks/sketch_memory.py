"""Memory that one sketch of a vector as long as SmolLM2-135M's gradient takes beside it, each in a process of its own.

The process has the vector and nothing that was freed before: what its peak rises by is the sketch's, its tables included.
"""

from __future__ import annotations

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import write
from hpc_hess.sketch.kinds import SketchSettings
from hpc_hess.sketch.sketch import Sketch

SIZE = 134_515_008  # N of SmolLM2-135M


def sketch_once(sketch: Sketch, x: torch.Tensor) -> torch.Tensor:
    """Return the sketch of the whole vector ``x``."""
    collection = sketch.begin(x.device)
    sketch.add(collection, x, [0], [len(x)])
    return sketch.end(collection)


def added_mb(settings: SketchSettings) -> float:
    """Return by how much a sketch raises the peak of this process' memory, on its GPU if it has one."""
    if torch.cuda.is_available():
        x = torch.ones(SIZE, device="cuda")
        held = torch.cuda.memory_allocated()
        sketch_once(Sketch(SIZE, settings), x)
        return (torch.cuda.max_memory_allocated() - held) / 1e6
    sketch_once(Sketch(1 << 16, SketchSettings()), torch.ones(1 << 16))  # what torch takes for itself at its first calls
    x = torch.ones(SIZE)
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak_mb()
    sketch_once(Sketch(SIZE, settings), x)
    return _peak_mb() - before


def _peak_mb() -> float:
    """Return the process' peak since the mark in /proc was set back."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[12, 14, 16, 18, 20])
    args = parser.parse_args()
    cases = [(k, p) for k in ("affd", "afjl") for p in ("hadamard", "fft", "haar")] + [("qk", "haar"), ("ffd", "hadamard")]
    rows: list[dict[str, Any]] = []
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as fresh:
        for kind, preconditioner in cases:
            row: dict[str, Any] = {"sketch": kind, "within": preconditioner}
            for bits in args.bits:
                settings = SketchSettings(kind=kind, dimension=1 << bits, preconditioner=preconditioner)  # type: ignore[arg-type]
                row[f"2^{bits}, MB"] = fresh.submit(added_mb, settings).result()
            print(row, flush=True)
            rows.append(row)
    write("sketch_memory", "Memory of one sketch beside its input", rows, {"N": SIZE, "input, MB": SIZE * 4 / 1e6})


if __name__ == "__main__":
    main()
