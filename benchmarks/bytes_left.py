"""Bytes on disk of a run directory: while it runs at most, killed half way, cleaned, gone on with to its end, cleaned.

Allocated bytes, as ``du`` counts them. The run is the demo's, SmolLM2-135M on two ranks with rank files.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from benchmarks.common import ROOT, write
from hpc_hess.storage.disk import allocated


def steps_done(out: Path) -> int:
    """Return how many steps the run has logged."""
    events = out / "events.jsonl"
    return events.read_text().count('"event": "step"') if events.exists() else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="launch/configs/smollm2.toml")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--folder", default=None, help="where to write: a disk with room for the basis")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        out, rows, most = Path(folder) / "run", [], 0
        command = ["bash", "launch/torchrun.sh", "-n", str(args.ranks), args.config, "--set", f"run.out={out}",
                   "--set", f"lanczos.steps={args.steps}"]  # fmt: skip

        def measured(when: str) -> None:
            rows.append({"when": when, "steps": steps_done(out), "MB": allocated(out) / 1e6})
            print(rows[-1], flush=True)

        def clean() -> None:
            subprocess.run([sys.executable, "-m", "hpc_hess", "clean", str(out)], cwd=ROOT, check=True)

        process = subprocess.Popen(command, cwd=ROOT)
        try:
            while steps_done(out) < args.steps // 2:
                if process.poll() is not None:
                    raise SystemExit("the run ended before it could be killed: choose more --steps")
                time.sleep(0.05)
                most = max(most, allocated(out))
        finally:
            for each in [*psutil.Process(process.pid).children(recursive=True), process] if process.poll() is None else []:
                each.kill()
            process.wait()
        time.sleep(3)  # the ranks of a killed job live a little longer
        rows.append({"when": "at most, while it runs", "steps": steps_done(out), "MB": most / 1e6})
        measured("killed half way")
        clean()
        measured("cleaned")
        subprocess.run(command, cwd=ROOT, check=True)
        measured("gone on with to its end")
        clean()
        measured("cleaned")
        write(
            "bytes_left", "Bytes that a run directory takes on the disk", rows,
            {"config": args.config, "steps": args.steps, "ranks": args.ranks},
            "Asked: under 100 MB after the demo. A killed run keeps the rows that it goes on from.",
        )  # fmt: skip


if __name__ == "__main__":
    main()
