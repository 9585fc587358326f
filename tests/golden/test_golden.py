"""Toy runs find what they found when golden.json was written: the same bits on the same machine, close on another.

For changes that must not change a number, and too slow for every day: ``HPC_HESS_GOLDEN=1 python -m pytest tests/golden``.
"""

from __future__ import annotations

import json
import math
import os
from typing import Any

import pytest

from tests.golden.record import GOLDEN, RANKS, found, machine

KEPT: dict[str, Any] = json.loads(GOLDEN.read_text())
# On another machine, relative and absolute: exact products, and finite differences, whose step follows from rounding noise
EXACT, DIFFERENCES = 1e-6, 1e-3
_OF_ROUNDING = ("vectors", "errors", "ritz_errors")


def differences(old: Any, new: Any, close: float = 0.0, where: str = "") -> list[str]:
    """Return one line for each number or text that differs; the last bit counts unless ``close`` is given."""
    if isinstance(old, dict) and isinstance(new, dict):
        if old.keys() != new.keys():
            return [f"{where}: {sorted(old.keys() ^ new.keys())}"]
        keys = [key for key in old if not (close and key in _OF_ROUNDING)]
        return [line for key in keys for line in differences(old[key], new[key], close, f"{where}/{key}")]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [line for k, (a, b) in pairs for line in differences(a, b, close, f"{where}/{k}")]
    equal = repr(old) == repr(new)  # to the last bit; what is not a number stays so
    if close and isinstance(old, float) and isinstance(new, float):
        equal = equal or math.isclose(old, new, rel_tol=close, abs_tol=close)
    return [] if equal else [f"{where}: {old!r} before, {new!r}"]


@pytest.mark.skipif("HPC_HESS_GOLDEN" not in os.environ, reason="set HPC_HESS_GOLDEN=1: some minutes, for changes of layout")
@pytest.mark.parametrize("ranks", RANKS)
def test_the_numbers_are_what_they_were(ranks: int) -> None:
    kept, new = KEPT[f"{ranks} ranks"], found(ranks)
    assert kept.keys() == new.keys()
    for case, old in kept.items():
        close = DIFFERENCES if old["operator"]["method"] == "finite_difference" else EXACT
        assert differences(old, new[case], 0.0 if KEPT["machine"] == machine() else close, case) == []


def test_a_changed_number_is_seen() -> None:
    nearly = math.nextafter(1.0, 2.0)
    assert differences({"a": [1.0]}, {"a": [nearly]}) == [f"/a/0: 1.0 before, {nearly}"]
    assert differences({"a": [1.0]}, {"a": [nearly]}, EXACT) == []
    assert differences({"a": [1.0]}, {"a": [1.1]}, DIFFERENCES)
    assert differences({"a": 1}, {"a": 1.0}, EXACT)
    assert differences({"a": 1}, {"b": 1}) == [": ['a', 'b']"]
    assert differences({"a": math.nan}, {"a": math.nan}) == []
