"""When a run stops: its own time limit and the end of its Slurm job, whichever comes first."""

import signal
import time

import pytest

from hpc_hess import stopping
from hpc_hess.parallel.world import World
from hpc_hess.stopping import Stopper


@pytest.mark.parametrize(
    ("limit", "job_ends_in_s", "fits_s", "late_s"),
    [("", None, 1e9, None), ("00:10:00", None, 590, 610), ("", 600, 570, 590), ("00:05:00", 600, 290, 310),
     ("00:20:00", 600, 570, 590), ("", -5, 1e9, None)],
    ids=["none", "run", "job", "run first", "job first", "a job that is gone"],
)  # fmt: skip
def test_a_step_must_fit_before_the_first_limit(monkeypatch, limit, job_ends_in_s, fits_s, late_s):
    end = None if job_ends_in_s is None else time.time() + job_ends_in_s
    monkeypatch.setattr(stopping, "job_end_time", lambda env: end)
    with Stopper(World.alone(), limit) as stopper:
        assert stopper.agreed(fits_s) == ""
        if late_s is not None:
            assert stopper.agreed(late_s) == "the time limit is near"


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_stops_and_handlers_are_restored(number):
    before = signal.getsignal(number)
    with Stopper(World.alone()) as stopper:
        signal.raise_signal(number)
        assert stopper.agreed(0.0) == "a signal asked for it"
    assert signal.getsignal(number) == before
