"""Memory that one sketch of a vector as long as SmolLM2-135M's gradient takes beside it, each in a process of its own.

The process has the vector and nothing that was freed before: what its peak rises by is the sketch's, its tables included.
"""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.frame import Table, benchmark
from benchmarks.processes import apart
from hpc_hess.sketch.kinds import Kind, SketchSettings
from hpc_hess.sketch.sketch import Sketch

SIZE = 134_515_008  # N of SmolLM2-135M


def sketch_once(sketch: Sketch, x: torch.Tensor) -> torch.Tensor:
    """Return the sketch of the whole vector ``x``."""
    collection = sketch.begin(x.device)
    sketch.add(collection, x, [0], [len(x)])
    return sketch.end(collection)


def added_mb(kind: Kind, preconditioner: str, bits: int) -> float:
    """Return by how much a sketch raises the peak of this process' memory, on its GPU if it has one."""
    settings = SketchSettings(kind=kind, dimension=1 << bits, preconditioner=preconditioner)  # type: ignore[arg-type]
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


@benchmark("Memory of one sketch beside its input")
def main(table: Table, bits: tuple[int, ...] = (12, 14, 16, 18, 20)) -> None:
    table.settings |= {"N": SIZE, "input, MB": SIZE * 4 / 1e6}
    cases = [(k, p) for k in ("affd", "afjl") for p in ("hadamard", "fft", "haar")] + [("qk", "haar"), ("ffd", "hadamard")]
    for kind, preconditioner in cases:
        table.add(
            {
                "sketch": kind,
                "within": preconditioner,
                **{f"2^{each}, MB": apart(added_mb, kind, preconditioner, each)[0] for each in bits},
            }
        )


if __name__ == "__main__":
    main()
