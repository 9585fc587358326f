"""Programs of examples/, as their first lines say that they are started."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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


def test_a_loop_of_accelerate() -> None:
    text = launched("accelerate_loop.py", "--steps", "4", "--every", "2")
    assert [step for step, _, _ in re.findall(r"step (\d+): lambda max (\S+), trace (\S+)", text)] == ["2", "4"]


def test_a_trainer_with_the_callback(tmp_path: Path) -> None:
    """Its training is bitwise the one without spectra."""
    numbers = r"'hessian/lambda_max': '([\d.]+)', 'hessian/lambda_min': '(\S+)', 'hessian/trace': '(\S+)'"
    text = launched("trainer.py", "--steps", "4", "--every", "2", "--save", str(tmp_path / "with.pt"))
    assert len(re.findall(numbers, text)) == 2
    assert 0 <= float(re.findall(r"'hessian/overlap': '([\d.]+)'", text)[0]) <= 1
    launched("trainer.py", "--steps", "4", "--every", "0", "--save", str(tmp_path / "without.pt"))
    first, second = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("with", "without"))
    assert all(torch.equal(first[name], second[name]) for name in second)


def test_a_loop_of_lightning(tmp_path: Path) -> None:
    """FSDP2; its training is bitwise the one without spectra, and its log has the spectra."""
    pytest.importorskip("lightning")
    for name, every in (("with", 2), ("without", 0)):
        options = ["--steps", "4", "--every", str(every), "--folder", str(tmp_path / name)]
        text = launched("lightning_loop.py", *options, "--save", str(tmp_path / f"{name}.pt"))
        assert len(re.findall(r"step \d+: lambda max (\S+), trace (\S+)", text)) == (2 if every else 0)
    with open(tmp_path / "with" / "metrics.csv", newline="") as file:
        logged = [row for row in csv.DictReader(file) if row["hessian/lambda_max"]]
    assert [row["step"] for row in logged] == ["2", "4"]
    assert all(float(row["hessian/lambda_max"]) > 0 for row in logged)
    first, second = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("with", "without"))
    assert len(second) > 10
    assert all(torch.equal(first[name], second[name]) for name in second)
