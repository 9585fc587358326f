"""Run directories for tests/formats: ``python -m tests.support.run_toys FOLDER`` writes FOLDER/finished and FOLDER/half."""

from __future__ import annotations

import sys
from pathlib import Path
from unittest import mock

from hpc_hess.commands.run.work import run
from hpc_hess.config import Config, load_config
from hpc_hess.parallel.world import World
from hpc_hess.session.stopping import Stopper

TOY = Path(__file__).parents[2] / "launch" / "configs" / "toy.toml"
SETTINGS = [
    "data.sequences=2",
    "operator.method=exact",
    'parameters.include=["*norm.weight"]',
    "lanczos.steps=6",
    "analysis.eigenpairs=1",
    "analysis.tolerance=1e-9",
    "analysis.most_products=60",
    "analysis.trace=hutch++",
    "analysis.diagonal=hutchinson",
    "analysis.samples=9",
    "analysis.columns=1",
    "store.keep_basis=true",
    'analysis.sub_block=["model.norm.weight[:3]"]',
    "run.report=false",
]
_HALF = 60  # products and steps after which the half-finished one was stopped: in the study of the diagonal


def settings(out: Path) -> Config:
    """Return the configuration of both."""
    return load_config(TOY, [*SETTINGS, f"run.out={out}"])


def main(folder: Path) -> None:
    world = World.join("cpu", 60.0, want_mpi=False)
    assert run(settings(folder / "finished"), world) == 0
    asked = [0]

    def agreed(self: Stopper, next_step_s: float) -> str:
        asked[0] += 1
        return "a test asks for it" if asked[0] > _HALF else ""

    with mock.patch.object(Stopper, "agreed", agreed):
        assert run(settings(folder / "half"), world) == 75


if __name__ == "__main__":
    main(Path(sys.argv[1]))
