"""All studies, a line each, in the order in which a run makes them and a report shows them.

A study is a folder with the modules ``settings`` (its table of the configuration), ``compute`` (RECIPE) and ``view``. The
settings are imported with the configuration, the rest by what needs it. The quadrature comes before all studies: its
settings are [lanczos].
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

from hpc_hess.config import Config, StudySettings

FOLDER, FOUND, PIECES = "studies", "found.json", "pieces"  # RUN/studies/NAME: what was found; until then its pieces


class Study(NamedTuple):
    """A study. ``compute`` returns its base.Recipe, ``view`` its views.View; both may be slow to import."""

    name: str
    settings: Callable[[], type[StudySettings]]
    compute: Callable[[], Any]
    view: Callable[[], Any]


def _in_folder(name: str) -> Study:
    def part(module: str) -> Any:
        return importlib.import_module(f"hpc_hess.studies.{name}.{module}")

    return Study(name, lambda: part("settings").Settings, lambda: part("compute").RECIPE, lambda: part("view"))


STUDIES: dict[str, Study] = {
    name: _in_folder(name)
    for name in (
        "eigenpairs",
        "deflated",
        "trace",
        "diagonal",
        "inverse",
        "block_diagonal",
        "class_structure",
        "sub_block",
    )
}


def settings() -> dict[str, type[StudySettings]]:
    """Return the settings of all studies."""
    return {name: study.settings() for name, study in STUDIES.items()}


def asked_for(config: Config) -> list[str]:
    """Return the names of the studies that a configuration asks for."""
    return [name for name in STUDIES if config.studies[name].wanted]
