"""[studies.class_structure]."""

from __future__ import annotations

from pydantic import Field

from hpc_hess.config import Config, StudySettings
from hpc_hess.errors import ConfigError
from hpc_hess.registry.operators import OPERATORS


class Settings(StudySettings):
    """Whether the outliers of the Gauss-Newton matrix are its classes."""

    name = "class_structure"
    former = {"groups": "class_groups", "steps": "class_steps"}
    of_parameters = True

    groups: int = Field(default=0, ge=0)
    """Take the most frequent target tokens, or labels, as so many classes, and their means out of the matrix. 0: none. Needs
    `operator.kind` = gauss_newton."""
    steps: int = Field(default=20, ge=2)
    """Lanczos steps on what is left without them."""

    def check(self, config: Config) -> None:
        """Refuse another matrix than Gauss-Newton's. Raises ConfigError."""
        if not OPERATORS[config.operator.kind].has_class_means:
            kinds = " or ".join(f'"{spec.name}"' for spec in OPERATORS.values() if spec.has_class_means)
            raise ConfigError(
                f"studies.class_structure.groups = {self.groups} takes the Gauss-Newton matrix apart: set "
                f'operator.kind = {kinds} and operator.method = "exact"'
            )
