"""The window's arithmetic over (steps, window, stop): a step finds what it reads, and so does a resume of it."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_hess.linalg.lanczos import Lanczos, Window

steps = st.integers(1, 200)
rules = st.just("full") | st.just("none") | st.integers(1, 250)


@settings(deadline=None)
@given(rule=rules, steps=steps)
def test_a_step_reads_the_last_vectors_and_there_are_rows_for_them(rule: int | str, steps: int) -> None:
    window = Window(rule, steps)
    assert 1 <= window.rows <= steps
    for j in range(steps):
        read = list(window.reads(j))
        assert read == list(range(read[0], j + 1))
        assert read[0] >= 0
        assert j == 0 or j - 1 in read  # the three-term recurrence
        length = steps if rule == "full" else 2 if rule == "none" else max(2, int(rule))
        assert len(read) == min(length, j + 1)
        assert len({v % window.rows for v in read}) == len(read)  # each in a row of its own


@settings(deadline=None)
@given(data=st.data(), rule=rules, steps=steps)
def test_a_kill_at_any_instant_leaves_what_the_resume_reads(data: st.DataObject, rule: int | str, steps: int) -> None:
    """v_{j+1} is written while step j may still have to be done again: it lies in a row that step j does not read."""
    window, stop = Window(rule, steps), data.draw(st.integers(0, steps))
    rows = {0: 0}  # row -> the vector in it
    for j in range(stop):
        if j + 1 < steps:
            rows[(j + 1) % window.rows] = j + 1
        assert all(rows[v % window.rows] == v for v in window.reads(j))
    nothing: Any = None
    process = Lanczos(nothing, nothing, steps, rule, alpha=[0.0] * stop)
    assert all(rows[v % window.rows] == v for v in process.rows_needed())
    assert process.finished == (stop == steps)


@settings(deadline=None)
@given(steps=steps, more=st.integers(0, 50))
def test_a_window_as_long_as_the_process_is_full(steps: int, more: int) -> None:
    full, wide = Window("full", steps), Window(max(2, steps + more), steps)
    assert (full.rows, [full.reads(j) for j in range(steps)]) == (wide.rows, [wide.reads(j) for j in range(steps)])
