"""Where a path of the configuration lies: the working directory first, then the clone that holds the package."""

from __future__ import annotations

import hashlib
from pathlib import Path

_CLONE = Path(__file__).resolve().parents[3]


def find_path(text: str) -> Path | None:
    """Return the existing path that ``text`` names, or None.

    A relative path counts from the working directory, else from the repository root (the parent of the installed
    package), so that the demo configuration works from anywhere inside or outside a clone. Collective: no.
    """
    path = Path(text).expanduser()
    candidates = [path] if path.is_absolute() else [path, _CLONE / path]
    return next((p for p in candidates if p.exists()), None)


def hash_file(path: Path, digest: hashlib._Hash, sample: int | None = None) -> None:
    """Feed a file into ``digest``: all of it, or its size and its first and last ``sample`` bytes."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if sample is None or size <= 2 * sample:
            while block := file.read(1 << 20):
                digest.update(block)
            return
        digest.update(str(size).encode())
        digest.update(file.read(sample))
        file.seek(-sample, 2)
        digest.update(file.read(sample))
