"""What the tests of whole runs in this process share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from hpc_hess.parallel.world import World
from tests.toys import toy_directory


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = World.join("cpu", 60.0)
    yield world
    world.leave()


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama on disk and a file of token ids."""
    folder = tmp_path_factory.mktemp("toy")
    toy_directory("llama", folder / "model")
    np.save(folder / "tokens.npy", np.random.default_rng(0).integers(3, 96, size=300))
    return folder
