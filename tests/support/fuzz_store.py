"""Damaged run directories: bytes flipped, cut, zeroed, parts of HDF5 files and whole files removed."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import h5py
import numpy as np

from hpc_hess.commands.run.screen import inspect_run
from hpc_hess.commands.run.work import run
from hpc_hess.config import Config, make_config
from hpc_hess.parallel.world import World
from hpc_hess.session.stopping import Stopper
from hpc_hess.studies.run_page import rewrite_report
from tests.support.toys import toy_directory
from tests.support.trying import Ended, try_apart

_HEAD = 1 << 14  # where HDF5 files keep what they say about themselves


def _names(path: Path) -> tuple[list[str], list[str]]:
    """Return the groups and data sets of a file, and its attributes."""
    names: list[str] = []
    with h5py.File(path, "r") as file:
        file.visit(names.append)
        return names, list(file.attrs)


def _place(rng: random.Random, size: int) -> int:
    return rng.randrange(min(size, _HEAD) if rng.random() < 0.5 else size)


def _flip(rng: random.Random, path: Path) -> str:
    data = bytearray(path.read_bytes())
    count = rng.choice([1, 1, 1, 8, 64])
    for _ in range(count):
        data[_place(rng, len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return f"{count} bits flipped"


def _cut(rng: random.Random, path: Path) -> str:
    size = _place(rng, path.stat().st_size)
    with path.open("r+b") as file:
        file.truncate(size)
    return f"cut to {size} bytes"


def _zero(rng: random.Random, path: Path) -> str:
    start, length = _place(rng, path.stat().st_size), rng.choice([1, 8, 512, 4096, 65536])
    with path.open("r+b") as file:
        file.seek(start)
        file.write(bytes(min(length, path.stat().st_size - start)))
    return f"{length} bytes zeroed at {start}"


def _noise(rng: random.Random, path: Path) -> str:
    start, length = _place(rng, path.stat().st_size), rng.choice([8, 512, 4096])
    with path.open("r+b") as file:
        file.seek(start)
        file.write(rng.randbytes(min(length, path.stat().st_size - start)))
    return f"{length} random bytes at {start}"


def _remove_part(rng: random.Random, path: Path) -> str:
    names, attributes = _names(path)
    with h5py.File(path, "r+") as file:
        if rng.random() < 0.7:
            name = rng.choice(names)
            del file[name]
            return f"{name} removed"
        name = rng.choice(attributes)
        del file.attrs[name]
        return f"attribute {name} removed"


def _remove(rng: random.Random, path: Path) -> str:
    path.unlink()
    return "removed"


def damage(rng: random.Random, run_dir: Path) -> str:
    """Damage one file of a run directory; return what was done to it."""
    files = sorted(p for p in run_dir.rglob("*") if p.is_file() and p.name != "run.lock" and p.stat().st_size)
    stores = [p for p in files if p.suffix == ".h5"]
    texts = [p for p in files if p.suffix in (".json", ".jsonl", ".toml")]
    path = rng.choice([run_dir / "krylov.h5", rng.choice(stores), rng.choice(stores), rng.choice(texts)])
    kinds = [_flip, _flip, _flip, _cut, _zero, _noise, *([_remove_part] * 3 if path in stores else []), _remove]
    return f"{path.relative_to(run_dir)}: {rng.choice(kinds)(rng, path)}"


def damages(seed: int, count: int) -> Iterator[random.Random]:
    """Yield one source of chance for each damaged directory, the same ones for the same seed."""
    for number in range(count):
        yield random.Random(f"{seed} {number}")


# -- what is damaged, and what a user then does ------------------------------------------------------------------------


class Base(NamedTuple):
    """A run directory, the configuration that goes on with it, and what its result says in the end."""

    run_dir: Path
    config: Config
    result: dict[str, Any]


def compared(run_dir: Path) -> dict[str, Any]:
    """Return what of a result must not depend on damage: all numbers that are not times."""
    result = json.loads((run_dir / "result.json").read_text())
    return {key: result.get(key) for key in ("probes", "eigenpairs", "studies", "lambda_max", "lambda_min", "trace", "loss")}


def bases(folder: Path, world: World) -> list[Base]:
    """Make run directories of a toy in ``folder``: finished; stopped in the second probe, one file; stopped in a study."""
    toy_directory("llama", folder / "model")
    np.save(folder / "tokens.npy", np.random.default_rng(0).integers(3, 96, size=300))
    found = []
    for name, steps, driver in (("finished", 1000, "files"), ("probe", 6, "mpio"), ("study", 16, "files")):
        config = make_config(
            {
                "model": {"source": str(folder / "model"), "master_dtype": "float64", "compute_dtype": "float64"},
                "parameters": {"include": ["model.norm.weight", "model.layers.1.self_attn.k_proj.weight"]},
                "operator": {"step": 1e-3, "check": False},
                "lanczos": {"steps": 4, "probes": 2},
                "data": {
                    "source": f"tokens:{folder / 'tokens.npy'}",
                    "sequence_length": 12,
                    "sequences": 4,
                    "micro_batch": 4,
                },
                "analysis": {"eigenpairs": 1, "tolerance": 1e-2, "most_products": 5, "trace": "hutchinson", "samples": 6},
                "store": {"keep_basis": name == "probe"},
                "run": {"out": str(folder / name), "report": False},
            }
        )
        # one process can write one file without MPI, but creates rank files unless told
        with mock.patch("hpc_hess.storage.store.choose_driver", lambda *_, driver=driver: driver):
            code = stopped_after(config, world, steps)
        assert (code == 0) == (name == "finished")
        whole = folder / f"{name}-whole"
        shutil.copytree(folder / name, whole)
        assert run(moved(config, whole), world) == 0
        found.append(Base(folder / name, config, compared(whole)))
    rewrite_report(whole)  # matplotlib and its fonts are loaded here, not once for each damaged directory
    assert list((folder / "study" / "studies").glob("*/pieces"))
    return found


def moved(config: Config, out: Path) -> Config:
    """Return the configuration with another run directory."""
    return config.model_copy(update={"run": config.run.model_copy(update={"out": str(out)})})


def stopped_after(config: Config, world: World, steps: int) -> int:
    """Run, but stop when so many steps and products have been begun."""
    asked = [0]

    def agreed(self: Stopper, next_step_s: float) -> str:
        asked[0] += 1
        return "a test asks for it" if asked[0] > steps else ""

    limits = mock.patch("hpc_hess.commands.run.work._limits", return_value=[1e9, 1e9])
    with mock.patch.object(Stopper, "agreed", agreed), limits:
        return run(config, world)


def tried(base: Base, rng: random.Random, out: Path, world: World) -> tuple[str, dict[str, Ended]]:
    """Damage a copy of a run directory; return what was done, and how inspect, report and a resume ended.

    ``report`` opens text files alone: it is tried where one of them was damaged.
    """
    shutil.copytree(base.run_dir, out)
    what = f"{base.run_dir.name}/{damage(rng, out)}"

    def resume() -> str:
        with mock.patch("hpc_hess.commands.run.work._limits", return_value=[1e9, 1e9]):
            code = run(moved(base.config, out), world)
        if compared(out) != base.result:
            raise AssertionError("a resume gave another result, and said nothing")
        return str(code)

    commands: dict[str, Callable[[], object]] = {"inspect --verify": lambda: inspect_run(out, verify=True), "run": resume}
    if ".h5:" not in what:
        commands = {"report": lambda: rewrite_report(out), **commands}
    ends = {name: try_apart(call) for name, call in commands.items()}
    shutil.rmtree(out)
    return what, ends
