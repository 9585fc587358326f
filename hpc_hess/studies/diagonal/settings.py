"""[studies.diagonal]."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from hpc_hess.config import StudySettings


class Settings(StudySettings):
    """The diagonal, entry by entry."""

    name = "diagonal"
    former = {"method": "diagonal", "samples": "samples"}
    of_parameters = True

    method: Literal["", "hutchinson", "xdiag"] = ""
    """Estimate the diagonal by this method. Empty: not."""
    samples: int = Field(default=30, ge=6)
    """Products that it takes."""
