"""The sketches of examples, one row each, in one HDF5 file that grows and that a kill leaves whole.

``sketches.h5``: /sketch (n, D) float32; /loss, /tokens_predicted (n,); /tokens (n, L) int32, -1 beyond an example's end;
/digest (n,) what the tokens hash to; /done (n,) uint8, 1 once a row is on disk. Example ids are row numbers. All of it is
allocated aside and renamed into place, so that a row changes raw data only: rows are synced before their flags are set.
One process writes (rank 0).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from hpc_hess.errors import StoreError
from hpc_hess.storage.disk import explaining, rename_durably, reserve
from hpc_hess.storage.identity import must_match
from hpc_hess.storage.schema import new_file, open_file

NAME = "sketches.h5"
FORMAT = 1


class Examples:
    """An open file of example sketches. Local, no communication."""

    def __init__(self, path: Path, *, write: bool = False) -> None:
        with explaining(path, "open the sketches"), contextlib.ExitStack() as held:
            self._file = held.enter_context(open_file(path, "r+" if write else "r"))
            found = int(self._file.attrs.get("format", 0))
            if found != FORMAT:
                raise StoreError(f"{path} has format {found}; this version reads {FORMAT}: use the version that wrote it")
            self.path = path
            self.attributes: dict[str, Any] = json.loads(str(self._file.attrs["attributes"]))
            self._sets = {name: self._file[name] for name in ("sketch", "loss", "tokens", "digest", "done")}
            held.pop_all()

    def _read(self, name: str, rows: Any = ...) -> NDArray[Any]:
        with explaining(self.path, "read the sketches"):
            return self._sets[name][rows]

    def __len__(self) -> int:
        return int(self._sets["done"].shape[0])

    @property
    def done(self) -> NDArray[np.bool_]:
        """Which rows are on disk, (n,)."""
        return self._read("done").astype(bool)

    @property
    def sketches(self) -> NDArray[np.float32]:
        """The sketches of the examples that are done, (n, D)."""
        return self._read("sketch")[self.done]

    @property
    def losses(self) -> NDArray[np.float64]:
        """Mean token losses, (n,)."""
        return self._read("loss")

    def tokens(self, row: int) -> NDArray[np.int32]:
        """Return an example's token ids."""
        ids = self._read("tokens", row)
        return ids[ids >= 0]

    def write(self, rows: Sequence[int], sketches: NDArray, losses: Sequence[float]) -> None:
        """Put the sketches of some examples on disk. Raises StoreError: the disk is full."""
        with explaining(self.path, "write sketches"):
            for row, sketch, loss in zip(rows, sketches, losses, strict=True):
                self._sets["sketch"][row], self._sets["loss"][row] = sketch, loss
            self._sync()
            for row in rows:
                self._sets["done"][row] = 1
            self._sync()

    def _sync(self) -> None:
        self._file.flush()
        handle = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Examples:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def prepare(folder: Path, tokens: NDArray[np.int64], dimension: int, attributes: dict[str, Any]) -> Examples:
    """Open FOLDER/sketches.h5 for these examples, or create it, or make it longer; what is done stays. Local.

    ``tokens`` (n, L), -1 beyond an example's end.

    Raises
    ------
    StoreError : the file is of another model, sketch or data (say which), or of more examples.

    """
    path = folder / NAME
    if not path.exists():
        _create(path, tokens, dimension, attributes)
        return Examples(path, write=True)
    with Examples(path) as old:
        must_match(old.attributes, attributes, f"{path} holds sketches", "choose another run.out, or go back to that")
        there = old._read("digest")
        common = min(len(there), len(tokens))
        if not np.array_equal(there[:common], digests(tokens[:common])):
            raise StoreError(f"{path} holds sketches of other examples: choose another run.out, or go back to that data")
        if len(tokens) > len(there):
            _create(path, tokens, dimension, attributes, old)
    return Examples(path, write=True)


def digests(tokens: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return what each row of token ids hashes to; padding does not count."""
    rows = (row[row >= 0].astype("<i8").tobytes() for row in tokens)
    return np.array([int.from_bytes(hashlib.sha256(row).digest()[:8], "little") for row in rows], np.uint64)


def _create(
    path: Path, tokens: NDArray[np.int64], dimension: int, attributes: dict[str, Any], old: Examples | None = None
) -> None:
    aside = path.with_name(path.name + ".new")
    count = len(tokens)
    shapes: dict[str, tuple[tuple[int, ...], str]] = {
        "sketch": ((count, dimension), "f4"),
        "loss": ((count,), "f8"),
        "tokens": (tokens.shape, "i4"),
        "digest": ((count,), "u8"),
        "done": ((count,), "u1"),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    aside.unlink(missing_ok=True)
    with explaining(path, "create the sketches"), contextlib.ExitStack() as held:
        held.callback(aside.unlink, missing_ok=True)
        with new_file(aside, len(shapes)) as file:
            file.attrs["format"], file.attrs["attributes"] = FORMAT, json.dumps(attributes)
            for name, (shape, dtype) in shapes.items():
                properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
                properties.set_layout(h5py.h5d.CONTIGUOUS)
                properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
                space = h5py.h5s.create_simple(shape)
                h5py.h5d.create(file.id, name.encode(), h5py.h5t.py_create(np.dtype(dtype)), space, properties)
            file["tokens"][...], file["digest"][...] = tokens, digests(tokens)
            if old is not None:
                for row in np.flatnonzero(old.done):
                    file["sketch"][row], file["loss"][row] = old._read("sketch", row), old._read("loss", row)
                    file["done"][row] = 1
        reserve(aside)
        rename_durably(aside, path)
