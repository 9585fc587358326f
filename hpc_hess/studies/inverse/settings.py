"""[studies.inverse]."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from hpc_hess.config import StudySettings


class Settings(StudySettings):
    """The inverse on the gradient: the solution of (A + damping I) x = gradient."""

    name = "inverse"
    former = {"method": "inverse", "products": "inverse_products", "tolerance": "inverse_tolerance", "damping": "damping"}

    method: Literal["", "minres", "cg"] = ""
    """Solve by this method. Empty: not."""
    products: int = Field(default=50, ge=1)
    """Products of the solution, at most."""
    tolerance: float = Field(default=1e-4, gt=0)
    """Relative residual at which it ends."""
    damping: Literal["auto"] | float = "auto"
    """Damping of the system. auto: so large that the matrix is positive definite, by the spectrum just computed."""
