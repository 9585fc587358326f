"""What every test has."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(autouse=True, scope="module")
def _imports_are_not_collected() -> None:
    """Keep what earlier modules have imported out of the garbage collector: each collection takes 0.2 s else."""
    gc.collect()
    gc.freeze()
