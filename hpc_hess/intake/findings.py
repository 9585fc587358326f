"""The names of all checks of what comes in, and what one of them found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal

Verdict = Literal["passed", "noted", "not checked"]

# Every check has a name here. What a check refuses is an error (exit 2); everything else it found is a Finding.
CHECKS: dict[str, str] = {
    "weights.files": "which files hold the weights, and in which form",
    "weights.unused": "stored tensors that the model does not take",
    "weights.buffers": "buffers of the model that the files do not hold",
    "model.adapter": "what an adapter changes, and of which base",
    "model.code": "whose Python code computes the model",
    "data.source": "where the tokens come from, and how many there are",
    "data.columns": "columns and fields of the data that are not read",
    "data.mask": "which tokens the data say are predicted",
    "data.encoding": "the text is UTF-8",
    "data.tokenizer": "the tokenizer gives the ids of tokenizer.json",
    "model.kernels": "which attention kernel the model computes with",
    "model.causal": "no logit depends on a later token",
    "model.writes": "a forward pass leaves parameters and buffers as they were",
    "model.padding": "a padded row has the loss of the row alone",
    "model.frozen": "which parameters the matrix spans",
    "given.batches": "how much memory batches take that were drawn from a generator or a loader",
    "given.positions": "positions of left-padded and packed rows of batches",
    "given.ranks": "which ranks' batches the matrix of a user's model is made of",
    "given.precision": "in which precision a user's model is multiplied",
    "model.reached": "parameters that the loss does not depend on",
}


@dataclass(frozen=True)
class Finding:
    """What one check found. ``text`` is one sentence or less, for people.

    ``verdict``: "passed"; "noted" (a user should know it); "not checked" (it could not be made, ``text`` says why).
    """

    check: str
    verdict: Verdict
    text: str

    def __post_init__(self) -> None:
        if self.check not in CHECKS:
            raise ValueError(f"'{self.check}' is not a check of hpc_hess.intake.findings.CHECKS")

    def line(self) -> str:
        """Return what the terminal shows."""
        mark = "" if self.verdict == "passed" else f"{self.verdict.replace('noted', 'note')}: "
        return f"intake: {self.check}: {mark}{self.text}"


def passed(check: str, text: str) -> Finding:
    """Return the finding of a check that found nothing to remark."""
    return Finding(check, "passed", text)


def noted(check: str, text: str) -> Finding:
    """Return a finding that a user should know."""
    return Finding(check, "noted", text)


def unchecked(check: str, why: str) -> Finding:
    """Return the finding of a check that could not be made."""
    return Finding(check, "not checked", why)


class Intake:
    """The findings of one start, in their order; ``say`` shows the line of each. The same on every rank."""

    def __init__(self, say: Callable[[str], object] | None = None) -> None:
        self.findings: list[Finding] = []
        self._say = say

    def add(self, *findings: Finding) -> None:
        """Take findings that every rank agrees on."""
        for finding in findings:
            self.findings.append(finding)
            if self._say is not None:
                self._say(finding.line())

    def to_json(self) -> list[dict[str, str]]:
        """Return what stands in result.json under ``intake``."""
        return [asdict(finding) for finding in self.findings]
