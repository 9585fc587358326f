"""Damaged run directories: bytes flipped, cut, zeroed, parts of HDF5 files and whole files removed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import h5py

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
