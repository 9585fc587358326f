"""A run directory's text files: result.json, config.toml, events.jsonl."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpc_hess.errors import ConfigError
from hpc_hess.storage.disk import rename_durably
from hpc_hess.storage.events import read_events

WRITE_ANEW = "start the same run again, which writes it anew from what the store holds"


@dataclass(frozen=True)
class RunFiles:
    """One run directory, read: ``result`` is empty while the run is unfinished, ``events`` in the order written."""

    path: Path
    result: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    events: list[dict[str, Any]] = field(default_factory=list)


def write_aside(path: Path, text: str) -> None:
    """Write a file aside and rename it into place: a reader sees the old one or the new one. Local.

    On return it is on disk, after a power cut too: what it replaces or makes needless may be removed.
    """
    partial = path.with_name(path.name + ".part")
    partial.write_text(text, encoding="utf-8")
    rename_durably(partial, path)


def read_run(run_dir: str | Path, need_result: bool = True) -> RunFiles:
    """Read a run directory. Local, no communication.

    Raises
    ------
    ConfigError : no such directory, no result yet (where one is needed), result.json damaged.

    """
    path = Path(run_dir)
    if not path.is_dir():
        raise ConfigError(f"no such run directory: {path}")
    return RunFiles(path, _result(path, need_result), _text(path / "config.toml"), read_events(path))


def _result(path: Path, needed: bool) -> dict[str, Any]:
    file = path / "result.json"
    if not file.exists():
        if needed:
            raise ConfigError(
                f"{path} has no result.json yet: `python -m hpc_hess run {path / 'config.toml'}` goes on with it, "
                f"`python -m hpc_hess inspect {path}` shows its state"
            )
        return {}
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"cannot read {file}: {error}; {WRITE_ANEW}") from None
    if not isinstance(result, dict):
        raise ConfigError(f"cannot read {file}: it should hold one JSON object; {WRITE_ANEW}")
    return result


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""


def step_events(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one "step" event for each (probe, step), the latest: a resumed run repeats the step it was killed in."""
    latest: dict[tuple[int, int], dict[str, Any]] = {}
    for event in events:
        probe, step = event.get("probe", 0), event.get("step")
        if event.get("event") == "step" and isinstance(probe, int) and isinstance(step, int):
            latest[probe, step] = event
    return [latest[key] for key in sorted(latest)]
