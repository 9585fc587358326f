"""[studies.deflated]."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from hpc_hess.config import Config, StudySettings
from hpc_hess.errors import ConfigError


class Settings(StudySettings):
    """The density without the eigenpairs that were found, which then count exactly."""

    name = "deflated"
    former = {"steps": "deflated_steps"}

    steps: int = Field(default=0, ge=0)
    """Lanczos steps on what is left without those eigenpairs. 0: none."""

    def check(self, config: Config) -> None:
        """Refuse it without a search for eigenpairs. Raises ConfigError."""
        if not config.studies["eigenpairs"].wanted:
            raise ConfigError(
                f"studies.deflated.steps = {self.steps} takes out eigenpairs that were found: set studies.eigenpairs.count"
            )

    def defining(self, config: Config) -> dict[str, Any]:
        """Also what is taken out."""
        search = config.studies["eigenpairs"].model_dump()
        return super().defining(config) | {"eigenpairs": search["count"], "which": search["which"]}
