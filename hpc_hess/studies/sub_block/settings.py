"""[studies.sub_block]."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from hpc_hess.config import Config, StudySettings


class Settings(StudySettings):
    """The exact matrix of chosen entries."""

    name = "sub_block"
    former = {"entries": "sub_block", "columns": "columns"}
    of_parameters = True

    entries: list[str] = []
    """Which entries, such as "model.layers.0.self_attn.q_proj.weight[0, :]". Empty: none."""
    columns: int = Field(default=8, ge=1)
    """Columns of that matrix that are computed at a time."""

    def defining(self, config: Config) -> dict[str, Any]:
        """Not how many columns at a time."""
        return {"sub_block": self.entries}
