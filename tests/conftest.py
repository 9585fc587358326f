"""What every test has, and fixtures that several files share."""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from hpc_hess.parallel.world import World
from tests.support.toys import toy_directory

HAS_MPI = shutil.which("mpirun") is not None and importlib.util.find_spec("mpi4py") is not None
HAS_SLURM = os.geteuid() == 0 and all(map(shutil.which, ("slurmctld", "slurmd", "munged", "unshare")))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what this machine cannot run."""
    if item.get_closest_marker("mpi") and not HAS_MPI:
        pytest.skip("needs Open MPI and mpi4py: launch/setup.sh --mpi")
    if item.get_closest_marker("slurm") and not HAS_SLURM:
        pytest.skip("needs Slurm, munge and root: apt-get install slurm-wlm munge")


@pytest.fixture(autouse=True, scope="module")
def _imports_are_not_collected() -> None:
    """Keep what earlier modules have imported out of the garbage collector: each collection takes 0.2 s else."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """The world of a run in this process."""
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


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 24 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)
