"""How fast a basis row of SmolLM2-135M reaches the disk from 2 ranks, with both drivers, against ``dd conv=fsync``.

Row and dd take turns on the same disk, five times; a row counts from the first rank's start to the last one's agreement
that it is durable, its checksum included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.common import ROOT, write
from hpc_hess.config import ModelSection
from hpc_hess.model.sharded.skeleton import build_skeleton
from hpc_hess.model.sources.source import resolve_source
from hpc_hess.parallel.layout import Layout
from hpc_hess.parallel.world import World
from hpc_hess.storage.store import Store

TURNS, RANKS = 5, 2
LAUNCH = {
    "files": [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"],
    "mpio": ["mpirun", "--quiet", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", str(RANKS),
             sys.executable],
}  # fmt: skip


def worker(driver: str, folder: Path) -> None:
    """Write rows and let dd write as much, in turns; rank 0 prints the seconds of both."""
    world = World.join("cpu", 120.0, want_mpi=driver == "mpio")
    section = ModelSection()
    skeleton = build_skeleton(resolve_source(section), section)
    layout = Layout({name: tuple(p.shape) for name, p in skeleton.named_parameters()}, world.size)
    shard = layout.shard(world.rank)
    store = Store.create(
        folder / "run", layout=layout, shard=shard, world=world, probes=1, steps=TURNS + 1, rows=TURNS + 1,
        attributes={}, driver=driver,
    )  # fmt: skip
    values = np.random.default_rng(world.rank).standard_normal(shard.size, np.float32)
    seconds: dict[str, list[float]] = {"row": [], "dd": []}
    for turn in range(TURNS + 1):
        world.barrier("row")
        began = time.perf_counter()
        store.write_row(0, turn, values)
        seconds["row"].append(world.max_over_ranks(time.perf_counter() - began, "row"))
        if world.rank == 0:
            seconds["dd"].append(dd(folder / "dd", 4 * layout.num_params))
        world.barrier("dd")
    store.close()
    if world.rank == 0:
        print(json.dumps({"bytes": 4 * layout.num_params, **seconds}), flush=True)
    world.leave()


def dd(path: Path, count: int) -> float:
    """Return the seconds that dd takes to write ``count`` bytes to a new file and sync it."""
    block = 1 << 24
    command = ["dd", "if=/dev/zero", f"of={path}", f"bs={block}", f"count={-(-count // block)}", "conv=fsync"]
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    seconds = time.perf_counter() - began
    path.unlink()
    return seconds * count / (-(-count // block) * block)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", nargs=2, metavar=("DRIVER", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", default=None, help="where to write: the disk that is measured")
    args = parser.parse_args()
    if args.worker:
        worker(args.worker[0], Path(args.worker[1]))
        return
    rows = []
    for driver, launch in LAUNCH.items():
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            command = [*launch, "-m", "benchmarks.row_bandwidth", "--worker", driver, folder]
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        found = json.loads(done.stdout.splitlines()[-1])
        pairs = list(zip(found["row"], found["dd"], strict=True))[1:]  # the first turn finds the disk's caches as they are
        rows.append({
            "driver": driver, "row, MB/s": found["bytes"] / 1e6 / statistics.median(row for row, _ in pairs),
            "dd, MB/s": found["bytes"] / 1e6 / statistics.median(d for _, d in pairs),
            "row / dd, median of the turns": statistics.median(d / row for row, d in pairs), "asked": ">= 0.6",
            "row / dd, each": " ".join(f"{d / row:.2f}" for row, d in pairs),
        })  # fmt: skip
    write("row_bandwidth", "Write bandwidth of a basis row, SmolLM2-135M", rows, {"ranks": RANKS, "turns": TURNS})


if __name__ == "__main__":
    main()
