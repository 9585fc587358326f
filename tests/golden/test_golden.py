"""Toy runs find what they found when golden.json was written: the same bits on the same machine, close on another."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from tests.golden.record import GOLDEN, RANKS, found, machine

KEPT: dict[str, Any] = json.loads(GOLDEN.read_text())
CLOSE = 1e-10  # relative; numbers that cancel lose more than that of their own size
_CANCELLED = 1e-5  # of finite differences, residuals and what is zero but for rounding


def differences(old: Any, new: Any, same_bits: bool, where: str = "") -> list[str]:
    """Return one line for each number or text that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        if old.keys() != new.keys():
            return [f"{where}: {sorted(old.keys() ^ new.keys())}"]
        return [line for key in old for line in differences(old[key], new[key], same_bits, f"{where}/{key}")]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [line for k, (a, b) in pairs for line in differences(a, b, same_bits, f"{where}/{k}")]
    if isinstance(old, float) and isinstance(new, float) and not same_bits:
        equal = math.isclose(old, new, rel_tol=CLOSE, abs_tol=_CANCELLED) or repr(old) == repr(new)
    else:
        equal = repr(old) == repr(new)  # to the last bit; not a number is what it was, too
    return [] if equal else [f"{where}: {old!r} before, {new!r}"]


@pytest.mark.parametrize("ranks", RANKS)
def test_the_numbers_are_what_they_were(ranks: int) -> None:
    kept, new = KEPT[f"{ranks} ranks"], found(ranks)
    same_bits = KEPT["machine"] == machine()
    if not same_bits:
        for case in (*kept.values(), *new.values()):
            del case["vectors"]
    assert differences(kept, new, same_bits) == []


def test_a_changed_number_is_seen() -> None:
    assert differences({"a": [1.0]}, {"a": [math.nextafter(1.0, 2.0)]}, same_bits=True)
    assert not differences({"a": [1.0]}, {"a": [math.nextafter(1.0, 2.0)]}, same_bits=False)
    assert differences({"a": [1.0]}, {"a": [1.1]}, same_bits=False)
    assert differences({"a": 1}, {"a": 1.0}, same_bits=False)
    assert differences({"a": 1}, {"b": 1}, same_bits=True) == [": ['a', 'b']"]
