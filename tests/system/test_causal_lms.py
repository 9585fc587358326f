"""Rows of the benchmark of all causal LMs: they agree, go on where they were stopped, and say why where there is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import causal_lms

RIGHT: dict[str, Any] = {"runs": "yes", "exact": 1e-15, "rounds inside": "", "differences": 1e-8, "2 ranks": 1e-16}


@pytest.mark.slow
def test_three_rows_agree_and_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["gpt_oss", "bert", "gemma4_assistant", "--write-to", str(tmp_path)]
    causal_lms.main(words)
    written = tmp_path / "causal_lms.json"
    rows = {row["type"]: row for row in json.loads(written.read_text())["rows"]}
    assert {kind: row["agrees"] for kind, row in rows.items()} == {"bert": "yes", "gemma4_assistant": "", "gpt_oss": "yes"}
    assert {kind: row["attention"] for kind, row in rows.items() if row["attention"]} == {"bert": "sdpa", "gpt_oss": "eager"}
    assert rows["gemma4_assistant"]["why"]
    monkeypatch.setattr(causal_lms, "names", lambda: {kind: row["class"] for kind, row in rows.items()})
    monkeypatch.setattr(causal_lms, "measured", lambda kind: pytest.fail("measured again"))
    causal_lms.main(words[3:])
    assert {row["type"]: row for row in json.loads(written.read_text())["rows"]} == rows


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"exact": 2e-9}, False),
        ({"exact": 2e-9, "rounds inside": "yes"}, True),
        ({"exact": "fails"}, False),
        ({"2 ranks": 2e-12}, False),
        ({"2 ranks": None}, False),
        ({"differences": 1e-2}, False),
    ],
)
def test_what_agrees(changes: dict[str, Any], expected: bool) -> None:
    assert causal_lms.agrees({**RIGHT, **changes}) is expected
