"""Where else a run is watched (run.track): rank 0 sends its events, and what it finds, to the trackers.

Each has a thread of its own, so that one which fails or hangs holds up neither the run nor the others. What it is sent is
what events.jsonl holds, from the first event on: the tracker leaves out what it has.
"""

from __future__ import annotations

import importlib.util
import math
import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from hpc_hess.commands.run.trackers import TRACKERS, Point, Tracker, Watched, flat
from hpc_hess.config import Config
from hpc_hess.errors import ConfigError, first_line
from hpc_hess.parallel.world import World
from hpc_hess.session.session import Session
from hpc_hess.storage.events import read_events
from hpc_hess.storage.schema import FILE, read_header
from hpc_hess.studies.quadrature.result import RESULT_NAME

_MOST_S = 60.0  # that the end of a run waits until everything is sent
_STOPPED_S = 5.0  # likewise where it stops early, with little time left
_AT = {"step": "step", "study": "product", "eigenpairs": "product"}  # the key that counts along a curve
_LEFT_OUT = {"time", "step", "probe", "product", "lock_step", "columns"}


def check_installed(config: Config, world: World) -> None:
    """Raise ConfigError where rank 0 lacks a tracker that is asked for. Collective: yes."""
    with world.together("trackers"):
        for name in config.run.track if world.rank == 0 else ():
            if importlib.util.find_spec(name) is None:
                raise ConfigError(
                    f'run.track names {name}, which is not installed: pip install "hpc-hess[{name}]", or leave it out'
                )


class _Sender(threading.Thread):
    """Hands jobs to one tracker, in order; after an error it takes them and does nothing."""

    def __init__(self, name: str, run: Watched) -> None:
        super().__init__(name=f"track-{name}", daemon=True)
        self.tracker_name, self._run = name, run
        self.said: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._jobs: queue.SimpleQueue[Callable[[Tracker], None] | None] = queue.SimpleQueue()
        self.start()

    def run(self) -> None:
        """Open the tracker and do what comes, until None comes."""
        try:
            tracker = TRACKERS[self.tracker_name](self._run)
            self.said.put(f"{self.tracker_name}: {tracker.place}")
            while (job := self._jobs.get()) is not None:
                job(tracker)
        except BaseException as error:  # of somebody else's program: SystemExit too
            self.said.put(f"{self.tracker_name} is sent nothing more of this run, which goes on: {first_line(error)}")

    def put(self, job: Callable[[Tracker], None] | None) -> None:
        """Do this next; None ends the thread."""
        self._jobs.put(job)


class Tracking:
    """The trackers of a run, on rank 0; elsewhere, and where none is asked for, all methods do nothing. Local."""

    def __init__(self, session: Session) -> None:
        self._session, self._senders = session, list[_Sender]()
        self._points: dict[tuple[str, int], None] = {}  # those that were sent

    def begin(self) -> None:
        """Open the trackers, send what the run directory holds, and then each event."""
        session = self._session
        if session.world.rank == 0 and session.config.run.track:
            run = Watched(session.out, read_header(session.out / FILE).schema.run_id, session.config.model_dump())
            self._senders = [_Sender(name, run) for name in dict.fromkeys(session.config.run.track)]
            self._take(read_events(session.out))
            session.events.follow(self._take)
            session.held.callback(self.close)

    def _take(self, events: list[dict[str, Any]]) -> None:
        """Send the points of events; a start that goes on repeats the step that it was killed in: the first one counts."""
        for event in events:
            if (where := _place(event)) is not None and where not in self._points:
                values = flat({key: value for key, value in event.items() if key not in _LEFT_OUT}, _is_number, by="/")
                point = Point(len(self._points), *where, event.get("time") or time.time(), values)
                self._points[where] = None
                for sender in self._senders:
                    sender.put(lambda tracker, point=point: tracker.add(point))  # type: ignore[misc]
        self._tell()

    def _tell(self) -> None:
        for sender in self._senders:
            while not sender.said.empty():
                self._session.progress.note(sender.said.get())

    def finish(self, result: Mapping[str, Any]) -> None:
        """Send the numbers of the result, the figures and the report; wait until they are there, for a minute at most."""
        out = self._session.out
        values = flat({key: value for key, value in result.items() if key != "format"}, _is_number, by="/")
        drawn = [*sorted((out / "figures").glob("*.png")), out / "report.html"] if self._session.config.run.report else []
        files = [out / RESULT_NAME, *drawn]
        for sender in self._senders:
            sender.put(lambda tracker: tracker.finish(values, files))
        self.close(finished=True)

    def close(self, *, finished: bool = False) -> None:
        """Wait until everything is sent, then close the trackers. Safe to call twice."""
        senders, end = self._senders, time.monotonic() + (_MOST_S if finished else _STOPPED_S)
        for sender in senders:
            sender.put(lambda tracker: tracker.close(finished=finished))
            sender.put(None)
        for sender in senders:
            sender.join(max(0.0, end - time.monotonic()))
            if sender.is_alive():
                sender.said.put(f"{sender.tracker_name} did not take everything in time: the run does not wait for it")
        self._tell()
        self._senders = []


def _place(event: Mapping[str, Any]) -> tuple[str, int] | None:
    """Return the curve that an event is a point of, and where on it; None where it is none."""
    kind, step = event.get("event"), event.get(_AT.get(str(event.get("event")), ""), 0)
    if not isinstance(step, int):
        return None
    if kind == "step" and isinstance(event.get("probe"), int):
        return f"probe {event['probe'] + 1}", step
    if kind == "study":
        return f"studies/{event.get('name')}", step
    return (str(kind), step) if kind in ("eigenpairs", "gradient") else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
