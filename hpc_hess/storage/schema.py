"""What krylov.h5 looks like: names, types, how its data sets are created, how its header is read.

::

    /                           attributes: format_version, the fields of Schema, and a digest of all but /probes,
                                /commit and /extra, which stores of earlier versions lack
    /attributes                 the caller's attributes (config, fingerprints, ...): one JSON text
    /layout/name                parameter names, in file order
    /layout/offset              first file index of each parameter           int64
    /layout/global_offset       first global index of each parameter         int64
    /layout/shape               full shape, padded with -1                   int64 matrix
    /layout/shard_dim           sharded dimension of the rank files          int64
    /probes/K/alpha, beta       recurrence coefficients, NaN where not reached   float64, `steps` long
    /probes/K/checksum          one per basis row, 0 where never committed   uint64, `rows` long
    /probes/K/basis             rows x num_params in the file index; shared by groups unless keep_basis; of bfloat16
                                the bits, as uint16; no rows once the basis of finished probes was given up
    /commit                     two commit slots                             bytes
    /extra                      two areas of small resume state              bytes

The file is created whole and never changes shape: a step writes raw data only, never HDF5 metadata. With rank files the
basis is a virtual data set over krylov.ranks/GENERATION/rank-RRRRR.h5, each holding /basis/K, rows x local size.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from h5py import h5d, h5f, h5p, h5s, h5t

from hpc_hess.errors import StoreError
from hpc_hess.parallel.layout import Layout, Parameter
from hpc_hess.storage.blocks import Block, regular_blocks
from hpc_hess.storage.commit import Ledger, Slots
from hpc_hess.storage.disk import FILE, RANKS, explaining, remedy
from hpc_hess.storage.seal import check_seal, raw_data, seal, user_block_bytes

# the newest; a store has the oldest that can say what it holds: 2 where rows are bfloat16, 3 where there are none
FORMAT_VERSION = 3
TEMPORARY = FILE + ".tmp"
# HDF5 2.x writes a newer format by default; these bounds let 1.10 and 2.x open each other's files.
_LIBVER = (h5f.LIBVER_EARLIEST, h5f.LIBVER_V110)


@dataclass(frozen=True)
class Schema:
    """The fixed sizes of one store. ``driver`` is "mpio" (one file) or "files" (rank files of ``num_shards`` ranks)."""

    run_id: str
    driver: str
    generation: str  # the directory of the rank files; empty for one file
    num_shards: int
    num_params: int
    fingerprint: str
    dtype: str  # "float32", "float64" or "bfloat16"
    probes: int
    width: int  # of the widest group of probes that there is room for
    steps: int
    rows: int
    keep_basis: bool
    extra_bytes: int

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The type of the basis data sets: of bfloat16, which HDF5 and NumPy lack, the 16 bits."""
        return np.dtype(np.uint16 if self.dtype == "bfloat16" else self.dtype)

    @property
    def slots(self) -> Slots:
        """The geometry of /commit and /extra."""
        return Slots(self.probes, self.width, self.rows, self.extra_bytes)

    @property
    def bases(self) -> int:
        """Number of basis data sets: one for each probe, or as many as a group needs, which the next group reuses."""
        return self.probes if self.keep_basis else self.width

    @property
    def basis_bytes(self) -> int:
        """Bytes of the whole basis, over all ranks."""
        return self.bases * self.rows * self.num_params * self.numpy_dtype.itemsize

    def basis_index(self, probe: int) -> int:
        """Return which basis data set ``probe`` writes to: those of a group differ, wherever it begins."""
        return probe % self.bases

    def rank_file(self, run_dir: Path, shard: int) -> Path:
        """Return the path of one rank file."""
        return run_dir / RANKS / self.generation / f"rank-{shard:05d}.h5"


@dataclass(frozen=True)
class Header:
    """Everything in krylov.h5 but the basis, read at once."""

    schema: Schema
    attributes: dict[str, Any]
    table: dict[str, Any]  # name: list[str]; offset, global_offset, shape, shard_dim: int64 arrays
    ledger: Ledger

    def stored_layout(self) -> Layout:
        """Return the selected parameters over the ranks that wrote the rank files. Offsets are file indices."""
        shapes = {
            n: tuple(int(k) for k in s if k >= 0) for n, s in zip(self.table["name"], self.table["shape"], strict=True)
        }
        dims = dict(zip(self.table["name"], self.table["shard_dim"].tolist(), strict=True))
        return Layout(shapes, self.schema.num_shards, dims)


def open_file(path: Path, mode: str, comm: Any = None) -> h5py.File:
    """Open an HDF5 file whose seal holds; ``mode`` is "r" or "r+".

    Without HDF5's own locks: run.lock keeps a second writer out (also with MPI, where HDF5 has none), and a run that is
    going on can be read. Without its sieve buffer: a small write on a full disk then fails at once, instead of in the
    flush, after which HDF5 can neither write nor close the file and crashes.
    """
    access = _access()
    if comm is not None:  # rank 0 has looked at the seal when it read the header
        access.set_fapl_mpio(comm, _mpi_info())
    else:
        check_seal(path)
    return h5py.File(h5f.open(os.fsencode(path), {"r": h5f.ACC_RDONLY, "r+": h5f.ACC_RDWR}[mode], fapl=access))


@contextlib.contextmanager
def new_file(path: Path, num_datasets: int) -> Iterator[h5py.File]:
    """Create an HDF5 file, which must not exist, for the block to fill: all space allocated. It is sealed in the end."""
    access, creation = _access(), h5p.create(h5p.FILE_CREATE)
    access.set_alignment(1 << 20, 4096)
    room = user_block_bytes(num_datasets)
    creation.set_userblock(room)
    with h5py.File(h5f.create(os.fsencode(path), h5f.ACC_EXCL, creation, access)) as file:
        yield file
        data = raw_data(file)
    seal(path, room, data)


def _access() -> Any:
    access = h5p.create(h5p.FILE_ACCESS)
    access.set_fclose_degree(h5f.CLOSE_STRONG)
    access.set_libver_bounds(*_LIBVER)
    access.set_sieve_buf_size(0)
    if hasattr(access, "set_file_locking"):
        access.set_file_locking(False, True)
    return access


def _mpi_info() -> Any:
    from mpi4py import MPI

    return MPI.Info()


def _new(group: Any, name: str, dtype: Any, shape: tuple[int, ...], fill: Any = None, data: Any = None) -> None:
    """Create a contiguous data set, allocated at once: filled if small, left as the disk has it if it is a basis."""
    plist = h5p.create(h5p.DATASET_CREATE)
    plist.set_layout(h5d.CONTIGUOUS)
    plist.set_alloc_time(h5d.ALLOC_TIME_EARLY)
    plist.set_fill_time(h5d.FILL_TIME_NEVER if fill is None else h5d.FILL_TIME_ALLOC)
    if fill is not None:
        plist.set_fill_value(np.array(fill, dtype))
    identity = h5d.create(
        group.id, name.encode(), h5t.py_create(np.dtype(dtype), logical=True), h5s.create_simple(shape), plist
    )
    if data is not None:
        h5py.Dataset(identity)[...] = data


def create_master(
    path: Path, schema: Schema, parameters: list[Parameter], attributes: dict[str, Any], ledger: Ledger, layout: Layout
) -> None:
    """Write a complete krylov.h5 at ``path``, which must not exist. Called by one rank, with the serial driver."""
    with new_file(path, 7 + 4 * schema.probes) as file:
        file.attrs["format_version"] = 3 if not schema.rows else 2 if schema.dtype == "bfloat16" else 1
        for key, value in asdict(schema).items():
            file.attrs[key] = value
        text = np.bytes_(json.dumps(attributes, indent=1, sort_keys=True).encode())
        file.create_dataset("attributes", data=text)
        _write_table(file.create_group("layout"), parameters)
        slots = schema.slots
        _new(file, "commit", np.uint8, (2, slots.commit_stride), 0, ledger.commit)
        _new(file, "extra", np.uint8, (2, slots.extra_stride), 0, ledger.extra)
        groups = [file.create_group(f"probes/{k}") for k in range(schema.probes)]
        for k, group in enumerate(groups):
            _new(group, "alpha", np.float64, (schema.steps,), np.nan, ledger.alpha[k])
            _new(group, "beta", np.float64, (schema.steps,), np.nan, ledger.beta[k])
            _new(group, "checksum", np.uint64, (schema.rows,), 0, ledger.checksum[k])
        for k, group in enumerate(groups):  # last: the small things lie together at the beginning
            if schema.basis_index(k) != k:
                group["basis"] = groups[schema.basis_index(k)]["basis"]  # a hard link
            elif schema.driver == "mpio" or not schema.rows:
                _new(group, "basis", schema.numpy_dtype, (schema.rows, schema.num_params))
            else:
                _virtual(group, k, schema, layout)
        file.attrs["header_digest"] = _digest(file, schema)


def _write_table(group: Any, parameters: list[Parameter]) -> None:
    width = max(len(p.shape) for p in parameters)
    shapes = [[*p.shape, *[-1] * (width - len(p.shape))] for p in parameters]
    group.create_dataset("name", data=np.array([p.name.encode() for p in parameters]))
    group.create_dataset("offset", data=np.array([p.file_offset for p in parameters], np.int64))
    group.create_dataset("global_offset", data=np.array([p.global_offset for p in parameters], np.int64))
    group.create_dataset("shape", data=np.array(shapes, np.int64).reshape(len(parameters), width))
    group.create_dataset("shard_dim", data=np.array([p.shard_dim for p in parameters], np.int64))


def _virtual(group: Any, basis: int, schema: Schema, layout: Layout) -> None:
    """Create basis ``basis`` as a virtual data set: one mapping for each regular block of each rank.

    A union of blocks for each rank would be fewer mappings, but HDF5 cannot store one beyond 2**32 entries.
    """
    shape, rows = (schema.rows, schema.num_params), schema.rows
    plist = h5p.create(h5p.DATASET_CREATE)
    # not a number in either type
    plist.set_fill_value(np.array(0xFFFF if schema.dtype == "bfloat16" else np.nan, schema.numpy_dtype))
    for rank in range(schema.num_shards):
        shard = layout.shard(rank)
        name = f"{RANKS}/{schema.generation}/rank-{rank:05d}.h5".encode()
        for b in regular_blocks(*shard.file_intervals):
            virtual, source = h5s.create_simple(shape), h5s.create_simple((rows, shard.size))
            virtual.select_hyperslab((0, b.start), (1, b.count), (1, b.stride), (rows, b.length))
            source.select_hyperslab((0, b.local), (1, 1), (1, 1), (rows, b.size))
            plist.set_virtual(virtual, name, f"basis/{basis}".encode(), source)
    kind = h5t.py_create(schema.numpy_dtype)
    h5d.create(group.id, b"basis", kind, h5s.create_simple(shape), plist)


def create_rank_file(path: Path, schema: Schema, shard: int, size: int) -> None:
    """Write an empty rank file of ``size`` entries a row; no data sets if the rank owns nothing, or there are no rows."""
    with new_file(path, schema.bases) as file:
        for key, value in (("run_id", schema.run_id), ("generation", schema.generation), ("shard", shard), ("size", size)):
            file.attrs[key] = value
        group = file.create_group("basis")
        for k in range(schema.bases if size and schema.rows else 0):
            _new(group, str(k), schema.numpy_dtype, (schema.rows, size))


def open_rank_file(run_dir: Path, schema: Schema, shard: int, size: int, mode: str) -> h5py.File:
    """Open a rank file and check that it is the right one: a virtual data set would hide a wrong one as fill values.

    Raises
    ------
    StoreError : it is missing, truncated, or belongs to another run.

    """
    path = schema.rank_file(run_dir, shard)
    if not path.exists():
        raise StoreError(f"the rank file {path} is missing: {remedy(path)}")
    with explaining(path, "open a rank file"), contextlib.ExitStack() as held:
        file = held.enter_context(open_file(path, mode))
        wanted = {"run_id": schema.run_id, "generation": schema.generation, "shard": shard, "size": size}
        length = path.stat().st_size
        good = {key: file.attrs.get(key) for key in wanted} == wanted
        for k in range(schema.bases if good and size and schema.rows else 0):
            dataset = file.get(f"basis/{k}")
            good &= isinstance(dataset, h5py.Dataset) and dataset.shape == (schema.rows, size)
            good = good and dataset.dtype == schema.numpy_dtype
            # contiguous, and all of it there
            good = good and (dataset.id.get_offset() or length) + dataset.nbytes <= length
        if not good:
            raise StoreError(f"the rank file {path} belongs to another run or is damaged: {remedy(path)}")
        held.pop_all()
        return file


def read_header(path: Path) -> Header:
    """Read and check krylov.h5 with the serial driver. Local, no communication.

    Raises
    ------
    StoreError : no such file, not a store, a newer format, damaged.

    """
    if not path.exists():
        raise StoreError(f'there is no run in {path.parent}: start one with run.resume = "auto" or "never"')
    with explaining(path, "open the store"), open_file(path, "r") as file:
        return header_of(file, path)


def header_of(file: h5py.File, path: Path) -> Header:
    """Read and check the header of an open krylov.h5. Raises StoreError."""
    version = file.attrs.get("format_version")
    if version is None:
        raise StoreError(f"{path} is an HDF5 file but not a store of hpc_hess")
    if version > FORMAT_VERSION:
        raise StoreError(
            f"{path} has format version {version} and this hpc_hess reads up to {FORMAT_VERSION}: install a newer one"
        )
    kinds: dict[str, Any] = {"int": int, "str": str, "bool": bool}
    schema = Schema(**{f.name: kinds[str(f.type)](file.attrs[f.name]) for f in fields(Schema)})
    if file.attrs.get("header_digest", _digest(file, schema)) != _digest(file, schema):
        raise StoreError(f"{path} is damaged: its header does not match the header's checksum: {remedy(path)}")
    table = {key: file[f"layout/{key}"][...] for key in ("offset", "global_offset", "shape", "shard_dim")}
    table["name"] = [name.decode() for name in file["layout/name"][...]]
    probes = [file[f"probes/{k}"] for k in range(schema.probes)]
    ledger = Ledger(
        alpha=np.stack([g["alpha"][...] for g in probes]),
        beta=np.stack([g["beta"][...] for g in probes]),
        checksum=np.stack([g["checksum"][...] for g in probes]),
        commit=file["commit"][...],
        extra=file["extra"][...],
    )
    slots = schema.slots
    shapes = {
        "alpha": (schema.probes, schema.steps),
        "checksum": (schema.probes, schema.rows),
        "commit": (2, slots.commit_stride),
        "extra": (2, slots.extra_stride),
    }
    for name, shape in shapes.items():
        if getattr(ledger, name).shape != shape:
            raise StoreError(f"{path} is damaged: {name} is not {shape}: {remedy(path)}")
    return Header(schema, json.loads(file["attributes"][()]), table, ledger)


def _digest(file: h5py.File, schema: Schema) -> str:
    """Return what tells that nothing of a header was changed since its store was created."""
    h = hashlib.blake2b(json.dumps(asdict(schema), sort_keys=True).encode(), digest_size=16)
    for name in ("attributes", "layout/name", "layout/offset", "layout/global_offset", "layout/shape", "layout/shard_dim"):
        h.update(b"|" + np.asarray(file[name][()]).tobytes())
    return h.hexdigest()


def blocks_of_file(schema: Schema, intervals: tuple[Any, Any], size: int) -> list[Block]:
    """Return where a rank's local vector lies in the data set it opens: its intervals, or all of its rank file."""
    if schema.driver == "mpio":
        return regular_blocks(*intervals)
    return [Block(0, 0, size, 1, size)] if size else []


def dtype_name(dtype: Any) -> str:
    """Return "float32", "float64" or "bfloat16" from a name, a NumPy or a torch dtype."""
    text = str(dtype).removeprefix("torch.")
    return text if text == "bfloat16" else np.dtype(text if str(dtype).startswith("torch.") else dtype).name
