"""events.jsonl: one JSON object a line, appended by rank 0 as things happen."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

EVENTS_NAME = "events.jsonl"


class EventLog:
    """Appends events; does nothing where ``run_dir`` is None (every rank but 0)."""

    def __init__(self, run_dir: Path | None) -> None:
        self._path = run_dir / EVENTS_NAME if run_dir else None

    def write(self, event: str, **values: Any) -> None:
        """Append one event with the wall-clock time. A kill can at most cut the last line short."""
        if self._path is None:
            return
        line = json.dumps({"event": event, "time": round(time.time(), 3), **values})
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """Return the events of a run, skipping a line that a kill cut short."""
    path = run_dir / EVENTS_NAME
    if not path.exists():
        return []
    events = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return events
