"""[studies.eigenpairs]."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from hpc_hess.config import Config, StudySettings
from hpc_hess.errors import ConfigError


class Settings(StudySettings):
    """Extreme eigenvalues with their eigenvectors, which go to RUN/eigenpairs."""

    name = "eigenpairs"
    former = {
        "count": "eigenpairs",
        "which": "which",
        "basis_size": "basis_size",
        "tolerance": "tolerance",
        "most_products": "most_products",
    }

    count: int = Field(default=0, ge=0)
    """Number of eigenpairs of each end. 0: none."""
    which: Literal["both", "largest", "smallest", "magnitude"] = "both"
    """Which end of the spectrum `studies.eigenpairs.count` counts."""
    basis_size: Literal["auto"] | int = "auto"
    """Basis vectors of the search. auto: twice the pairs, and eight."""
    tolerance: float = Field(default=1e-3, gt=0)
    """Residual at which a pair is found, relative to the largest eigenvalue in magnitude."""
    most_products: int = Field(default=300, ge=1)
    """Products after which the search ends."""

    @property
    def pairs(self) -> int:
        """Eigenpairs, of both ends together."""
        return self.count * (2 if self.which == "both" else 1)

    @property
    def vectors(self) -> int:
        """Basis vectors of the search: twice as many as pairs are wanted, and eight."""
        return 2 * self.pairs + 8 if self.basis_size == "auto" else self.basis_size

    def check(self, config: Config) -> None:
        """Refuse a basis that is too small. Raises ConfigError."""
        if isinstance(self.basis_size, int) and self.basis_size < self.pairs + 3:
            raise ConfigError(
                f"studies.eigenpairs.basis_size = {self.basis_size} is not valid: {self.pairs} pairs need at least "
                f"{self.pairs + 3} vectors"
            )

    def defining(self, config: Config) -> dict[str, Any]:
        """What is searched; how long and how finely may change."""
        return {"which": self.which, "eigenpairs": self.count, "vectors": self.vectors}
