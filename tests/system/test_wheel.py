"""The wheel alone: built from the package, installed into a new environment, run where there is no clone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.support.spawn import clean_environment

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


def called(*words: str | Path, cwd: Path) -> str:
    """Run a program outside of the clone and return what it printed."""
    env = {k: v for k, v in clean_environment().items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, words)), cwd=cwd, env=env, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("source")  # a copy: a build leaves files beside the source, and takes up older ones
    shutil.copytree(ROOT / "hpc_hess", place / "hpc_hess", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, place)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    called(*pip, "-w", place / "dist", place, cwd=place)
    (found,) = (place / "dist").glob("hpc_hess-*.whl")
    return found


@pytest.fixture(scope="module")
def bin_(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a new environment that has the wheel, and borrows torch and the rest from this one."""
    place = tmp_path_factory.mktemp("environment")
    venv.create(place, symlinks=True)
    python = place / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
    called(*pip, wheel, cwd=place)
    (own,) = place.glob("lib/python*/site-packages")
    (own / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    where = called(python, "-c", "import hpc_hess; print(hpc_hess.__file__)", cwd=place)
    assert Path(where.strip()).is_relative_to(own)
    return python.parent


def test_the_wheel_holds_every_file_that_git_has_of_the_package(wheel: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "hpc_hess"], cwd=ROOT, text=True, capture_output=True, check=True
    ).stdout.split()
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in listed if (ROOT / name).exists()} - names == set()


def test_it_runs_the_toy_where_there_is_no_clone(bin_: Path, tmp_path: Path) -> None:
    options = [word for key in ("lanczos.steps=3", "lanczos.probes=1") for word in ("--set", key)]
    shown = called(bin_ / "hpc-hess", "run", "--toy", *options, cwd=tmp_path)
    assert "runs/toy" in shown
    assert len(json.loads((tmp_path / "runs/toy/result.json").read_text())["probes"][0]["alpha"]) == 3
    assert (tmp_path / "runs/toy/report.html").stat().st_size > 10_000
    assert os.listdir(tmp_path) == ["runs"]


def test_it_says_its_version(bin_: Path, wheel: Path, tmp_path: Path) -> None:
    assert called(bin_ / "hpc-hess", "--version", cwd=tmp_path) == f"hpc-hess {wheel.name.split('-')[1]}\n"


def test_a_strict_type_checker_knows_the_interface(bin_: Path, tmp_path: Path) -> None:
    shutil.copy(ROOT / "tests" / "support" / "typed_program.py", tmp_path / "program.py")
    said = called(bin_ / "python", "-m", "mypy", "--strict", "program.py", cwd=tmp_path)
    assert said == "Success: no issues found in 1 source file\n"
