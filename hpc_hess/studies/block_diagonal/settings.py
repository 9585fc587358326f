"""[studies.block_diagonal]."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from hpc_hess.config import Config, StudySettings


class Settings(StudySettings):
    """How far block-diagonal approximations are from the whole matrix."""

    name = "block_diagonal"
    former = {
        "blocks": "block_diagonal",
        "samples": "block_samples",
        "spectrum": "block_spectrum",
        "steps": "block_steps",
        "columns": "columns",
    }
    of_parameters = True

    blocks: list[Literal["layer", "tensor", "head", "row"]] = []
    """Compare products of these approximations with those of the whole matrix. Empty: none."""
    samples: int = Field(default=8, ge=2)
    """Products, with random signs for each block, that those of the blocks are estimated from."""
    spectrum: Literal["", "layer", "tensor"] = ""
    """Spectra of all blocks of this kind, and each as a stand-in for the whole."""
    steps: int = Field(default=30, ge=2)
    """Lanczos steps of the spectrum of each block."""
    columns: int = Field(default=8, ge=1)
    """Vectors that are multiplied at a time."""

    @property
    def wanted(self) -> bool:
        """Either of its two parts."""
        return bool(self.blocks or self.spectrum)

    def defining(self, config: Config) -> dict[str, Any]:
        """Not how many vectors at a time."""
        return {key: value for key, value in super().defining(config).items() if key != "columns"}
