"""Programs of examples/, as their first lines say that they are started."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.support.spawn import clean_environment, free_port

ROOT = Path(__file__).resolve().parents[2]


def launched(script: str, *arguments: str, ranks: int = 2) -> str:
    """Return what a program prints on several ranks of torchrun."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--master-port={free_port()}"]
    environment = {**clean_environment(), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [*torchrun, str(ROOT / "examples" / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_plain_fsdp2_loop() -> None:
    text = launched("fsdp2_loop.py", "--steps", "6", "--every", "3", "--lanczos-steps", "4", "--length", "12", "--rows", "2")
    lines = re.findall(r"step (\d+): loss ([\d.]+), lambda max (\S+), lambda min (\S+), trace (\S+)", text)
    assert [line[0] for line in lines] == ["3", "6"]
    for _, loss, largest, smallest, trace in lines:
        assert 2 < float(loss) < 5
        assert float(largest) > max(float(smallest), 0)
        assert float(trace) == float(trace)
    assert re.search(r"spectra took \d+% of the time", text)
