"""The page of the checks is the list that the program has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hpc_hess.intake.findings import CHECKS, Intake, noted, passed, unchecked

PAGE = Path(__file__).parents[2] / "docs" / "intake.md"


def test_the_page_lists_every_check() -> None:
    rows = dict(re.findall(r"^\| `([\w.]+)` \| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    assert rows == CHECKS


def test_findings_are_shown_and_kept() -> None:
    shown: list[str] = []
    intake = Intake(shown.append)
    intake.add(passed("data.source", "3 rows"), noted("model.frozen", "2 left"), unchecked("model.causal", "no pass"))
    assert shown == [
        "intake: data.source: 3 rows",
        "intake: model.frozen: note: 2 left",
        "intake: model.causal: not checked: no pass",
    ]
    assert [finding["verdict"] for finding in intake.to_json()] == ["passed", "noted", "not checked"]


def test_a_check_without_a_name_is_an_error() -> None:
    with pytest.raises(ValueError, match="is not a check"):
        passed("nothing", "")
