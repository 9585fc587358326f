import io
import os
import pty
import threading
from datetime import datetime, timedelta

import pytest

from hpc_hess.console.progress import _Lines, make_progress
from hpc_hess.console.words import roughly


class Clock:
    def __init__(self):
        self.seconds = 100.0

    def __call__(self):
        return self.seconds

    def today(self):
        return datetime(2026, 12, 3, 23, 39) + timedelta(seconds=self.seconds - 100.0)


def feed(progress, clock, seconds, probe, step):
    clock.seconds += seconds
    progress.step(probes=[probe], step=step, hvp_s=seconds, ritz_min=-float(step), ritz_max=10.0 * step)


def test_plain_lines_are_one_a_step_with_the_time_left():
    stream, clock = io.StringIO(), Clock()
    with _Lines(6, 0, stream, clock, clock.today) as progress:
        progress.phase("loading")
        clock.seconds += 600  # loading is not a step
        progress.phase("probe 1/2")
        feed(
            progress, clock, 500.0, 0, 1
        )  # nor does the first one, in which the step size is chosen, say how long others take
        for step in (2, 3):
            feed(progress, clock, 50.0, 0, step)
        progress.phase("probe 2/2")
        for step in (1, 2, 3):
            feed(progress, clock, 50.0, 1, step)
    assert stream.getvalue().splitlines() == [
        "[loading]",
        "[probe 1/2]",
        "probe 1 step 1 (1/6) | Hv 8 min 20 s | λ in [-1, 10]",
        "probe 1 step 2 (2/6) | Hv 50 s | λ in [-2, 20] | about 3 min left, until 2026-12-04 00:01",
        "probe 1 step 3 (3/6) | Hv 50 s | λ in [-3, 30] | about 2 min left, until 2026-12-04 00:01",
        "[probe 2/2]",
        "probe 2 step 1 (4/6) | Hv 50 s | λ in [-1, 10] | about 2 min left, until 2026-12-04 00:01",
        "probe 2 step 2 (5/6) | Hv 50 s | λ in [-2, 20] | about 50 s left, until 00:01",
        "probe 2 step 3 (6/6) | Hv 50 s | λ in [-3, 30]",
    ]


def test_probes_in_lock_step_advance_the_count_together():
    stream, clock = io.StringIO(), Clock()
    with _Lines(9, 0, stream, clock, clock.today) as progress:
        for step, probes in ((1, range(3)), (2, range(3)), (3, [0, 2])):
            clock.seconds += 2.0 * len(probes)
            progress.step(probes=probes, step=step, hvp_s=2.0, ritz_min=-1.0, ritz_max=1.0)
    assert stream.getvalue().splitlines() == [
        "probes 1 to 3 step 1 (3/9) | Hv 2 s | λ in [-1, 1]",
        "probes 1 to 3 step 2 (6/9) | Hv 2 s | λ in [-1, 1] | about 6 s left, until 23:39",
        "probes 1, 3 step 3 (8/9) | Hv 2 s | λ in [-1, 1] | about 2 s left, until 23:39",
    ]


def test_a_later_calibration_is_not_taken_for_what_steps_need():
    stream, clock = io.StringIO(), Clock()
    with _Lines(5, 0, stream, clock, clock.today) as progress:
        for step, aside in ((1, 300.0), (2, 300.0), (3, 0.0)):
            clock.seconds += 10.0 + aside
            progress.step(probes=[0], step=step, hvp_s=10.0, ritz_min=-1.0, ritz_max=1.0, aside_s=aside)
    assert [line.split(" | ")[3:] for line in stream.getvalue().splitlines()] == [
        [],
        ["about 30 s left, until 23:49"],
        ["about 20 s left, until 23:49"],
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "1 s"),
        (40.4, "40 s"),
        (99.4, "99 s"),
        (110, "2 min"),
        (3569, "59 min"),
        (3570, "1 h 00 min"),
        (11220, "3 h 07 min"),
    ],
)
def test_estimates_have_few_digits(seconds, text):
    assert roughly(seconds) == text


def test_quick_steps_are_thinned_and_the_last_is_always_shown():
    stream, clock = io.StringIO(), Clock()
    with _Lines(100, 0, stream, clock) as progress:
        progress.phase("probe 1/1")
        for step in range(1, 61):
            feed(progress, clock, 0.1, 0, step)
        progress.note("stopped early")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "[probe 1/1]"
    assert lines[1].startswith("probe 1 step 1 ")
    assert lines[-2].startswith("probe 1 step 60 ")
    assert lines[-1] == "stopped early"
    assert 4 <= len(lines) <= 7


def test_a_resumed_run_counts_what_was_done():
    stream, clock = io.StringIO(), Clock()
    progress = _Lines(20, 0, stream, clock, clock.today)
    progress.resume_at(16)
    progress.phase("probe 1/1")
    feed(progress, clock, 40.0, 0, 17)
    feed(progress, clock, 4.0, 0, 18)
    progress.close()
    assert "step 18 (18/20) | Hv 4 s | λ in [-18, 180] | about 8 s left, until 23:39" in stream.getvalue()


def test_other_ranks_are_silent(capsys):
    with make_progress(False, 3) as progress:
        progress.phase("loading")
        progress.note("x")
        progress.resume_at(1)
        progress.step(probes=[0], step=1, hvp_s=1.0, ritz_min=0.0, ritz_max=1.0)
    assert capsys.readouterr().out == ""


def test_standard_output_is_the_default_and_a_pipe_gets_lines(capsys):
    with make_progress(True, 1) as progress:
        progress.step(probes=[0], step=1, hvp_s=1.0, ritz_min=-1.0, ritz_max=1.0)
    assert capsys.readouterr().out == "probe 1 step 1 (1/1) | Hv 1 s | λ in [-1, 1]\n"


def test_a_stream_without_greek_gets_words():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    with make_progress(True, 1, stream=stream) as progress:
        progress.note("λ ≤ 3 → 4")
        progress.step(probes=[0], step=1, hvp_s=1.0, ritz_min=-1.0, ritz_max=1.0)
    stream.flush()
    assert raw.getvalue().decode().splitlines() == ["lambda <= 3 ? 4", "probe 1 step 1 (1/1) | Hv 1 s | lambda in [-1, 1]"]


def test_a_terminal_gets_a_bar_and_notes_stay():
    leader, follower = pty.openpty()
    seen = bytearray()

    def drain():
        while True:
            try:
                seen.extend(os.read(leader, 4096))
            except OSError:  # the other end was closed
                return

    reader = threading.Thread(target=drain, daemon=True)
    reader.start()
    with os.fdopen(follower, "w", encoding="utf-8") as stream:
        with make_progress(True, 4, stream=stream) as progress:
            progress.phase("probe 1/1")
            progress.note("a [note] that stays")
            for step in (1, 2, 3, 4):
                progress.step(probes=[0], step=step, hvp_s=0.5, ritz_min=-1396.0, ritz_max=893.0)
        progress.close()  # again, which does nothing
    reader.join(10)
    os.close(leader)
    text = seen.decode()
    assert "a [note] that stays" in text
    assert "4/4" in text
    assert "Hv 500 ms | λ in [-1396, 893]" in text
    assert text.rstrip().endswith("\x1b[?25h")  # the cursor is back
