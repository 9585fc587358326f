"""Ctrl-C in a terminal, as it arrives in a program that computes a spectrum."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

from tests.support.spawn import clean_environment

ROOT = Path(__file__).parents[2]
PROGRAM = """
import signal
import time
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background would ignore
import torch
import hpc_hess

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(6, 40), torch.nn.Tanh(), torch.nn.Linear(40, 3)).double()
x, y = torch.randn(50, 6).double(), torch.randint(0, 3, (50,))

def loss(model, batch):
    time.sleep(0.05)
    return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])

before = [p.detach().clone() for p in model.parameters()]
operator = hpc_hess.hessian(model, [(x, y)], loss)
print("begins", flush=True)
spectrum = hpc_hess.slq(operator, steps=400, probes=2)
print("steps", spectrum.steps, "probes", len(spectrum.alphas), flush=True)
spectrum.save("spectrum.npz")
assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
assert spectrum.lambda_max <= hpc_hess.slq(operator, steps=30, progress=False).lambda_max * 1.001
print("whole", flush=True)
"""


def _read(terminal: int, shown: bytearray) -> None:
    """Add what is written to a terminal to ``shown``, until its other end is closed."""
    with contextlib.suppress(OSError):
        while part := os.read(terminal, 1 << 16):
            shown += part


def test_ctrl_c_ends_a_spectrum_with_what_there_is(tmp_path: Path) -> None:
    """The bar is on the terminal; what is printed goes to a pipe."""
    ours, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 100))  # without a size there is no room for a bar
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdout=subprocess.PIPE,
        stderr=terminal,
        cwd=tmp_path,
        env=clean_environment() | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        text=True,
        start_new_session=True,
    )
    os.close(terminal)
    shown = bytearray()
    reading = threading.Thread(target=_read, args=(ours, shown), daemon=True)  # as a terminal does, all the time
    reading.start()
    try:
        assert program.stdout is not None
        assert program.stdout.readline() == "begins\n"
        deadline = time.monotonic() + 120
        while max((int(n) for n in re.findall(rb"slq:.* (\d+)/800", shown.replace(b"\r", b"\n"))), default=0) < 5:
            time.sleep(0.05)
            assert time.monotonic() < deadline, bytes(shown)
        program.send_signal(signal.SIGINT)
        steps = int(program.stdout.readline().split()[1])
        assert 5 <= steps < 400
        assert program.stdout.readline() == "whole\n"
        assert program.wait(60) == 0
        reading.join(60)
    finally:
        program.kill()
        program.wait()
        os.close(ours)
    assert f"slq was interrupted after {steps} of at most 800 products" in shown.decode()
    assert (tmp_path / "spectrum.npz").exists()
