"""[studies.trace]."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from hpc_hess.config import StudySettings


class Settings(StudySettings):
    """The trace, and with Hutchinson's samples the Frobenius norm."""

    name = "trace"
    former = {"method": "trace", "samples": "samples"}

    method: Literal["", "hutchinson", "hutch++", "xtrace"] = ""
    """Estimate the trace by this method. Empty: not."""
    samples: int = Field(default=30, ge=6)
    """Products that it takes."""
