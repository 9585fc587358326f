"""What a person sees while a run goes on: a bar on a terminal, plain lines elsewhere, nothing on other ranks."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from types import TracebackType
from typing import IO, Any

from hpc_hess.console.words import duration, number, printable, probes_text, roughly

_LINE_INTERVAL_S = 2.0


class Progress:
    """The silent display, and the interface of the others. No method raises or communicates.

    ``total_steps`` counts the Lanczos steps of all probes; ``done`` of them lie before this start (a resumed run).
    """

    def __init__(self, total_steps: int, done: int = 0) -> None:
        self.total_steps, self.done = total_steps, done

    def phase(self, text: str) -> None:
        """Name what is going on: "loading", "calibrating", "probe 1 of 2"."""

    def resume_at(self, done: int) -> None:
        """Say that ``done`` steps were finished by an earlier start of the same run."""
        self.done = done

    def step(
        self, *, probes: Sequence[int], step: int, hvp_s: float, ritz_min: float, ritz_max: float, aside_s: float = 0.0
    ) -> None:
        """Report a finished step of ``probes``: 1-based ``step``, seconds of one product, extreme Ritz values.

        ``aside_s`` : seconds since the last one that steps do not take in general, such as for a calibration.
        """

    def status(self, text: str) -> None:
        """Say how far something is that is no Lanczos step: the newest text counts."""

    def note(self, text: str) -> None:
        """Show a line that stays."""

    def close(self) -> None:
        """End the display. Safe to call twice."""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class _Clock:
    """Time left, from the wall time of the last ten steps, whatever happened between them.

    The first ones of a start are not counted: they warm up, compile, and are compared with a reference.
    """

    def __init__(self, now: Callable[[], float], today: Callable[[], datetime]) -> None:
        self._now, self._today, self._last, self._warm = now, today, now(), False
        self._seconds: deque[float] = deque(maxlen=10)

    def begin(self) -> None:
        """Say that what comes next is a step; what lies before (loading, say) is not counted."""
        self._last = self._now()

    def end_steps(self, count: int, aside_s: float) -> None:
        """Count the time since the last call, but ``aside_s``, as ``count`` steps: of probes that advanced together."""
        now = self._now()
        if self._warm:
            self._seconds.extend([(now - self._last - aside_s) / count] * count)
        self._last, self._warm = now, True

    def left(self, steps: int) -> str:
        """Describe the time that ``steps`` more steps take, and its end; nothing where no step counts, or none is left."""
        if not self._seconds or steps <= 0:
            return ""
        seconds, now = sum(self._seconds) / len(self._seconds) * steps, self._today()
        end = now + timedelta(seconds=seconds)
        day = "" if end.date() == now.date() else f"{end:%Y-%m-%d} "
        return f" | about {roughly(seconds)} left, until {day}{end:%H:%M}"


def _described(hvp_s: float, ritz_min: float, ritz_max: float) -> str:
    return f"Hv {duration(hvp_s)} | λ in [{number(ritz_min)}, {number(ritz_max)}]"


class _Lines(Progress):
    """Plain lines, at most one per two seconds besides phases and notes, flushed: logs of batch jobs are pipes."""

    def __init__(
        self,
        total_steps: int,
        done: int,
        stream: IO[str],
        now: Callable[[], float] = time.monotonic,
        today: Callable[[], datetime] = datetime.now,
    ) -> None:
        super().__init__(total_steps, done)
        self._stream, self._now, self._clock = stream, now, _Clock(now, today)
        self._phase, self._shown_at, self._held = "", -float("inf"), ""

    def _print(self, text: str) -> None:
        print(printable(text, self._stream), file=self._stream, flush=True)

    def phase(self, text: str) -> None:
        self._flush()
        if text != self._phase:
            self._print(f"[{text}]")
        self._phase = text
        self._clock.begin()

    def step(
        self, *, probes: Sequence[int], step: int, hvp_s: float, ritz_min: float, ritz_max: float, aside_s: float = 0.0
    ) -> None:
        self.done += len(probes)
        self._clock.end_steps(len(probes), aside_s)
        left = self.total_steps - self.done
        place = f"{probes_text(probes)} step {step} ({self.done}/{self.total_steps})"
        self._held = f"{place} | {_described(hvp_s, ritz_min, ritz_max)}{self._clock.left(left)}"
        if left <= 0 or self._now() - self._shown_at >= _LINE_INTERVAL_S:
            self._flush()

    def status(self, text: str) -> None:
        self._held = text
        if self._now() - self._shown_at >= _LINE_INTERVAL_S:
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

    def __init__(self, total_steps: int, done: int, stream: IO[str]) -> None:
        # late: plain-line ranks and the API never pay for rich
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn
        from rich.progress import Progress as RichProgress

        super().__init__(total_steps, done)
        self._clock, self._closed, self._stream = _Clock(time.monotonic, datetime.now), False, stream
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
        self._clock.begin()

    def step(
        self, *, probes: Sequence[int], step: int, hvp_s: float, ritz_min: float, ritz_max: float, aside_s: float = 0.0
    ) -> None:
        self.done += len(probes)
        self._clock.end_steps(len(probes), aside_s)
        numbers = _described(hvp_s, ritz_min, ritz_max) + self._clock.left(self.total_steps - self.done)
        self._bar.update(self._task, completed=self.done, numbers=printable(numbers, self._stream))

    def status(self, text: str) -> None:
        self._bar.update(self._task, description=printable(text, self._stream), numbers="")

    def resume_at(self, done: int) -> None:
        super().resume_at(done)
        self._bar.update(self._task, completed=done)

    def note(self, text: str) -> None:
        self._bar.console.print(printable(text, self._stream), markup=False)

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
    # mpirun gives its ranks a pseudo-terminal even where its own output is a log file
    if out.isatty() and "OMPI_COMM_WORLD_SIZE" not in os.environ:
        return _Bar(total_steps, done, out)
    return _Lines(total_steps, done, out)
