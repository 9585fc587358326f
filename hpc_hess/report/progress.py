"""What a person sees while a run goes on: a bar on a terminal, plain lines elsewhere, nothing on other ranks."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import IO, Any

from hpc_hess.report.words import duration, number

_LINE_INTERVAL_S = 2.0


class Progress:
    """The silent display, and the interface of the others. No method raises or communicates.

    ``total_steps`` counts the Lanczos steps of all probes; ``done`` of them lie before this start (a resumed run).
    """

    def __init__(self, total_steps: int, done: int = 0) -> None:
        self.total_steps, self.done = total_steps, done

    def phase(self, text: str) -> None:
        """Name what is going on: "loading", "calibrating", "probe 1/2"."""

    def step(self, *, probe: int, step: int, hvp_s: float, ritz_min: float, ritz_max: float) -> None:
        """Report one finished step: 1-based ``step`` of ``probe``, seconds of its product, extreme Ritz values."""

    def note(self, text: str) -> None:
        """Show a line that stays."""

    def close(self) -> None:
        """End the display. Safe to call twice."""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class _Clock:
    """Time left, from the last steps' wall time: the first step also pays for compilation and caches."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now, self._ends = now, deque([now()], maxlen=11)

    def restart(self) -> None:
        """Forget the past, since what comes next is not a step (a phase such as loading)."""
        self._ends.clear()
        self._ends.append(self._now())

    def tick(self) -> None:
        self._ends.append(self._now())

    def eta_s(self, left: int) -> float | None:
        """Seconds for ``left`` further steps; None before the first one."""
        if len(self._ends) < 2:
            return None
        return (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1) * left


def _described(hvp_s: float, ritz_min: float, ritz_max: float) -> str:
    return f"Hv {duration(hvp_s)} | λ in [{number(ritz_min)}, {number(ritz_max)}]"


class _Lines(Progress):
    """Plain lines, at most one per two seconds besides phases and notes, flushed: logs of batch jobs are pipes."""

    def __init__(self, total_steps: int, done: int, stream: IO[str], now: Callable[[], float] = time.monotonic) -> None:
        super().__init__(total_steps, done)
        self._stream, self._now, self._clock = stream, now, _Clock(now)
        self._phase, self._shown_at, self._held = "", -float("inf"), ""

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def phase(self, text: str) -> None:
        self._flush()
        if text != self._phase:
            self._print(f"[{text}]")
        self._phase = text
        if self.done == 0 or not text.startswith("probe"):
            self._clock.restart()

    def step(self, *, probe: int, step: int, hvp_s: float, ritz_min: float, ritz_max: float) -> None:
        self.done += 1
        self._clock.tick()
        left = max(self.total_steps - self.done, 0)
        eta = self._clock.eta_s(left)
        self._held = (
            f"probe {probe + 1} step {step} ({self.done}/{self.total_steps}) | "
            f"{_described(hvp_s, ritz_min, ritz_max)}" + (f" | {duration(eta)} left" if eta and left else "")
        )
        if left == 0 or self._now() - self._shown_at >= _LINE_INTERVAL_S:
            self._flush()

    def _flush(self) -> None:
        """Show the newest step not yet shown, so that a phase never ends on an old number."""
        if self._held:
            self._print(self._held)
            self._shown_at, self._held = self._now(), ""

    def note(self, text: str) -> None:
        self._flush()
        self._print(text)

    def close(self) -> None:
        self._flush()


class _Bar(Progress):
    """A rich progress bar with the phase before it and the numbers after it; notes scroll above."""

    def __init__(self, total_steps: int, done: int, stream: IO[str], now: Callable[[], float] = time.monotonic) -> None:
        # late: plain-line ranks and the API never pay for rich
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn
        from rich.progress import Progress as RichProgress

        super().__init__(total_steps, done)
        self._clock, self._closed, self._last_phase = _Clock(now), False, ""
        self._bar = RichProgress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}", markup=False),
            console=Console(file=stream, highlight=False),
            refresh_per_second=4,
        )
        self._task: Any = self._bar.add_task("starting", total=total_steps, completed=done, numbers="")
        self._bar.start()

    def phase(self, text: str) -> None:
        self._bar.update(self._task, description=text)
        if self.done == 0 or not text.startswith("probe"):
            self._clock.restart()

    def step(self, *, probe: int, step: int, hvp_s: float, ritz_min: float, ritz_max: float) -> None:
        self.done += 1
        self._clock.tick()
        left = max(self.total_steps - self.done, 0)
        eta = self._clock.eta_s(left)
        numbers = _described(hvp_s, ritz_min, ritz_max) + (f" | {duration(eta)} left" if eta and left else "")
        self._bar.update(self._task, completed=self.done, numbers=numbers)

    def note(self, text: str) -> None:
        self._bar.console.print(text, markup=False)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._bar.stop()


def make_progress(enabled: bool, total_steps: int, done: int = 0, stream: IO[str] | None = None) -> Progress:
    """Return the display for this rank: a bar on a terminal, lines on a pipe or file, silence when not ``enabled``.

    ``enabled``: this rank speaks (rank 0). ``total_steps``: Lanczos steps of all probes, including the ``done`` ones of
    an earlier start of the same run. ``stream``: standard output when None.
    """
    if not enabled:
        return Progress(total_steps, done)
    out = stream if stream is not None else sys.stdout
    if out.isatty():
        return _Bar(total_steps, done, out)
    return _Lines(total_steps, done, out)
