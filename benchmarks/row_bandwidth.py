"""How fast a basis row of SmolLM2-135M reaches the disk from 2 ranks, with both drivers, against ``dd conv=fsync``.

Row and dd take turns on the same disk, five times; a row counts from the first rank's start to the last one's agreement
that it is durable, its checksum included.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from benchmarks.frame import Table, benchmark
from benchmarks.processes import Launcher, apart, run
from hpc_hess.config import ModelSection
from hpc_hess.model.sharded.skeleton import build_skeleton
from hpc_hess.model.sources.source import resolve_source
from hpc_hess.parallel.layout import Layout
from hpc_hess.parallel.world import World
from hpc_hess.storage.store import Store

TURNS, RANKS = 5, 2
LAUNCHERS: dict[str, Launcher] = {"files": "torchrun", "mpio": "mpirun"}  # by driver


def turns(driver: str, folder: str) -> dict[str, Any]:
    """Write rows and let dd write as much, in turns; return the bytes, and the seconds of both."""
    world = World.join("cpu", 120.0, want_mpi=driver == "mpio")
    section = ModelSection()
    skeleton = build_skeleton(resolve_source(section), section)
    layout = Layout({name: tuple(p.shape) for name, p in skeleton.named_parameters()}, world.size)
    shard = layout.shard(world.rank)
    store = Store.create(
        Path(folder) / "run",
        layout=layout,
        shard=shard,
        world=world,
        probes=1,
        steps=TURNS + 1,
        rows=TURNS + 1,
        attributes={},
        driver=driver,
    )
    values = np.random.default_rng(world.rank).standard_normal(shard.size, np.float32)
    seconds: dict[str, list[float]] = {"row": [], "dd": []}
    for turn in range(TURNS + 1):
        world.barrier("row")
        began = time.perf_counter()
        store.write_row(0, turn, values)
        seconds["row"].append(world.max_over_ranks(time.perf_counter() - began, "row"))
        if world.rank == 0:
            seconds["dd"].append(dd(Path(folder) / "dd", 4 * layout.num_params))
        world.barrier("dd")
    store.close()
    world.leave()
    return {"bytes": 4 * layout.num_params, **seconds}


def dd(path: Path, count: int) -> float:
    """Return the seconds that dd takes to write ``count`` bytes to a new file and sync it."""
    block = 1 << 24
    began = time.perf_counter()
    run("dd", "if=/dev/zero", f"of={path}", f"bs={block}", f"count={-(-count // block)}", "conv=fsync")
    seconds = time.perf_counter() - began
    path.unlink()
    return seconds * count / (-(-count // block) * block)


@benchmark("Write bandwidth of a basis row, SmolLM2-135M", asked="row / dd: >= 0.6")
def main(table: Table, folder: Annotated[Path | None, "where to write: the disk that is measured"] = None) -> None:
    table.settings |= {"ranks": RANKS, "turns": TURNS}
    for driver, launcher in LAUNCHERS.items():
        with tempfile.TemporaryDirectory(dir=folder) as place:
            found = apart(turns, driver, place, ranks=RANKS, launcher=launcher, threads=1)[0]
        pairs = list(zip(found["row"], found["dd"], strict=True))[1:]  # the first turn finds the disk's caches as they are
        table.add(
            {
                "driver": driver,
                "row, MB/s": found["bytes"] / 1e6 / statistics.median(row for row, _ in pairs),
                "dd, MB/s": found["bytes"] / 1e6 / statistics.median(d for _, d in pairs),
                "row / dd, median of the turns": statistics.median(d / row for row, d in pairs),
                "row / dd, each": " ".join(f"{d / row:.2f}" for row, d in pairs),
            }
        )


if __name__ == "__main__":
    main()
