"""When a run stops: its own time limit and the end of its Slurm job, whichever comes first."""

import signal
import time

import pytest

from hpc_hess.errors import LaunchError
from hpc_hess.parallel.world import World
from hpc_hess.session import stopping
from hpc_hess.session.stopping import Stopper


@pytest.mark.parametrize(
    ("limit", "job_ends_in_s", "fits_s", "late_s"),
    [
        ("", None, 1e9, None),
        ("00:10:00", None, 590, 610),
        ("", 600, 570, 590),
        ("00:05:00", 600, 290, 310),
        ("00:20:00", 600, 570, 590),
        ("", -5, 1e9, None),
    ],
    ids=["none", "run", "job", "run first", "job first", "a job that is gone"],
)
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


@pytest.mark.parametrize(
    ("signalled", "grace_s", "limit", "remaining_s", "expected"),
    [
        (False, 30, "", None, ""),
        (False, 30, "00:10:00", 500, ""),  # fits
        (False, 30, "00:10:00", 5000, ""),  # does not, but there is time until it must be given up
        (False, 30, "00:00:03", 5000, "the time limit is near"),
        (False, 30, "00:00:03", None, "the time limit is near"),
        (True, 30, "", 20, ""),
        (True, 30, "", 40, "a signal asked for it"),
        (True, 30, "", None, "a signal asked for it"),
        (True, 300, "", 40, ""),
        (True, 300, "00:00:20", 40, "a signal asked for it"),
    ],
)
def test_a_product_is_given_up_if_it_does_not_fit(signalled, grace_s, limit, remaining_s, expected):
    with Stopper(World.alone(), limit, grace_s) as stopper:
        if signalled:
            signal.raise_signal(signal.SIGUSR1)
        assert stopper.agreed_within(remaining_s, save_s=5.0) == expected


def test_the_end_of_a_job_counts_more_than_the_grace(monkeypatch):
    monkeypatch.setattr(stopping, "job_end_time", lambda env: time.time() + 100)
    with Stopper(World.alone(), "", 1.0) as stopper:
        signal.raise_signal(signal.SIGUSR1)
        assert stopper.agreed_within(70, 5.0) == ""
        assert stopper.agreed_within(90, 5.0) == "a signal asked for it"


def test_a_job_whose_end_nobody_knows(monkeypatch):
    def unknown(env):
        raise LaunchError("nobody knows")

    monkeypatch.setattr(stopping, "job_end_time", unknown)
    with Stopper(World.alone()) as stopper:
        assert stopper.note == "nobody knows"
        assert stopper.agreed(1e9) == ""
    with Stopper(World.alone(), "00:10:00") as stopper:
        assert stopper.note == ""
