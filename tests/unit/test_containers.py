"""The container recipes: what they name exists, both do the same, and what they copy is enough."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from hpc_hess.config import load_config

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "launch" / "container"
DOCKER, APPTAINER = (FOLDER / "Dockerfile").read_text(), (FOLDER / "hpc_hess.def").read_text()


def section(name: str) -> list[str]:
    """The lines of a section of the definition, without remarks."""
    text = re.split(r"^%", APPTAINER.partition(f"\n%{name}\n")[2], maxsplit=1, flags=re.M)[0]
    return [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]


def copied() -> list[str]:
    """What the Dockerfile copies."""
    return [name for line in re.findall(r"^COPY (.*) \S+$", DOCKER, re.M) for name in line.split()]


def test_both_copy_the_same_files_which_exist() -> None:
    assert [line.split()[0] for line in section("files")] == copied()
    assert all((ROOT / name).exists() for name in copied())


def test_both_run_the_same_commands() -> None:
    (run,) = re.findall(r"^RUN ((?:.*\\\n)*.*)$", DOCKER, re.M)
    words = re.sub(r"\s*(&&|\\\n)\s*", " ", run).split()
    assert words == re.sub(r"\s*&&\s*", " ", " ".join(section("post")[1:])).split()
    assert subprocess.run(["bash", "-n", "-c", run], check=False).returncode == 0


def test_what_the_launch_lines_name_exists() -> None:
    """Every path under /opt/hpc_hess and under launch/; the keys that are set."""
    page = (ROOT / "docs" / "clusters.md").read_text()
    for path in set(re.findall(r"(?:/opt/hpc_hess/)?(launch/[\w./]+\w)", DOCKER + APPTAINER + page)):
        assert path.endswith("X.sh") or (ROOT / path).exists(), path
    asked = re.findall(r"hpc-hess run CONFIG.toml((?: --set \S+)*)", APPTAINER + page)
    assert asked
    for overrides in asked:
        load_config("launch/configs/toy.toml", shlex.split(overrides)[1::2])


def test_what_is_copied_is_enough(tmp_path: Path) -> None:
    """A toy run by the launch script of a directory that holds nothing else, from another working directory."""
    for name in copied():
        place = tmp_path / "opt" / name
        place.parent.mkdir(exist_ok=True)
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy2)(ROOT / name, place)
    (tmp_path / "work").mkdir()
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [tmp_path / "opt" / "launch" / "torchrun.sh", "-n", "1", "launch/configs/toy.toml", "--set", "run.report=false"],
        cwd=tmp_path / "work",
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "work" / "runs" / "toy" / "result.json").exists()
