"""The seal of a file: any changed bit of what HDF5 keeps is found before HDF5 reads it; raw data may change."""

from __future__ import annotations

import random
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpc_hess.errors import StoreError
from hpc_hess.storage.schema import new_file, open_file
from hpc_hess.storage.seal import check_seal


def create(path: Path) -> list[tuple[int, int]]:
    """Create a small file; return where its data lie."""
    with new_file(path, 4) as file:
        file.attrs["name"], file.attrs["count"] = "ä toy", 3
        sets = [
            file.create_group(f"group-{k}").create_dataset("values", data=np.arange(10.0 + k), dtype=np.float64)
            for k in range(4)
        ]
        return [(d.id.get_offset(), d.nbytes) for d in sets]


def test_data_may_change_whoever_has_the_file_open(tmp_path: Path) -> None:
    path = tmp_path / "file.h5"
    create(path)
    with open_file(path, "r+") as file:
        file["group-1/values"][3] = -1.0
        file.flush()
        with open_file(path, "r") as other:
            assert other["group-1/values"][3] == -1.0
    check_seal(path)
    with h5py.File(path) as plain:  # any HDF5 program can read it
        assert plain["group-3/values"][12] == 12.0


def test_every_byte_that_is_not_data_is_under_the_seal(tmp_path: Path) -> None:
    path = tmp_path / "file.h5"
    data = create(path)
    whole = path.read_bytes()
    room = 4096
    outside = [at for at in range(room, len(whole)) if not any(start <= at < start + n for start, n in data)]
    rng = random.Random(0)
    for at in [*rng.sample(outside, 200), outside[0], outside[-1]]:
        if room + 20 <= at < room + 24:  # who has it open
            continue
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :])
        with pytest.raises(StoreError, match=r"cannot be used \(what HDF5 keeps"):
            open_file(path, "r")
    for size in (len(whole) - 1, room + 100):
        path.write_bytes(whole[:size])
        with pytest.raises(StoreError, match=r"cannot be used \(truncated: \d+ of \d+ bytes"):
            open_file(path, "r")


def test_a_damaged_seal_is_damage_and_no_seal_is_a_file_of_an_earlier_version(tmp_path: Path) -> None:
    path = tmp_path / "file.h5"
    create(path)
    whole = path.read_bytes()
    for at in range(14, whole.index(b"\n")):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(StoreError, match="cannot be used"):
            open_file(path, "r")
    with h5py.File(tmp_path / "older.h5", "w") as file:
        file["x"] = 1.0
    with open_file(tmp_path / "older.h5", "r") as file:
        assert file["x"][()] == 1.0
