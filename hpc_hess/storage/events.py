"""events.jsonl: one JSON object a line, appended by rank 0 as things happen."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc_hess.storage.agree import attempt

if TYPE_CHECKING:
    from hpc_hess.parallel.world import World  # imports torch, which inspecting a run does not need

EVENTS_NAME = "events.jsonl"


class EventLog:
    """Appends the events of a run. Every rank has one, rank 0 writes."""

    def __init__(self, run_dir: Path, world: World) -> None:
        self._path, self._world = run_dir / EVENTS_NAME, world
        self._follower: Callable[[list[dict[str, Any]]], None] | None = None

    def follow(self, follower: Callable[[list[dict[str, Any]]], None]) -> None:
        """Hand what is written from here on to ``follower``, too. Collective: no."""
        self._follower = follower

    def write(self, *events: dict[str, Any]) -> None:
        """Append events, a dictionary with the key "event" each, with the wall-clock time. Collective: yes.

        Raises
        ------
        StoreError : the disk is full; what the file held before is whole.

        """
        now = round(time.time(), 3)
        written = [{"event": e["event"], "time": now, **e} for e in events]
        with attempt(self._world, self._path, "write an event"):
            if self._world.rank == 0:
                append_lines(self._path, [json.dumps(event) for event in written])
        if self._follower is not None:
            self._follower(written)


def append_lines(path: Path, lines: list[str]) -> None:
    """Append lines to a text file, all or, where the disk is full (OSError), none. Local.

    A line that a kill cut short is ended first, so that it spoils no other one.
    """
    with path.open("a+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        torn = size > 0 and os.pread(file.fileno(), 1, size - 1) != b"\n"
        data = "".join(["\n" * torn, *(line + "\n" for line in lines)]).encode()
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:
            file.truncate(size)
            raise


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """Return the events of a run, skipping lines that a kill cut short."""
    path = run_dir / EVENTS_NAME
    events = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(event, dict):
            events.append(event)
    return events
