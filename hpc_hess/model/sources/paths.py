"""Where a path of the configuration lies: in the working directory, else in the package."""

from __future__ import annotations

import hashlib
from pathlib import Path

from hpc_hess.config import PACKAGE


def find_path(text: str) -> Path | None:
    """Return the existing path that ``text`` names, or None.

    A relative path counts from the working directory, else from the package, which holds ``launch/configs`` and
    ``launch/data``: the demo works from anywhere, with and without a clone. Collective: no.
    """
    path = Path(text).expanduser()
    candidates = [path] if path.is_absolute() else [path, PACKAGE / path]
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
