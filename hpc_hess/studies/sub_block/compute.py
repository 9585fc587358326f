"""The exact matrix of chosen entries, by products with unit vectors (Ilin 2025 does it for a row of one weight).

How much of it lies on the diagonal, and how well a stochastic estimate finds that diagonal, is measured, not assumed: on
published matrices of OPT and Llama rows the diagonal has 8 to 31 % of the squared Frobenius norm.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from hpc_hess.config import Config
from hpc_hess.errors import ConfigError
from hpc_hess.linalg.keeping import Keep, KeepNothing
from hpc_hess.linalg.operator import LinearOperator, products
from hpc_hess.parallel.layout import Layout
from hpc_hess.parallel.memory import gigabytes, host_bytes_free
from hpc_hess.parallel.vector import Vector, VectorSpace
from hpc_hess.session.problem import Problem
from hpc_hess.session.session import Session
from hpc_hess.storage.disk import free_bytes
from hpc_hess.storage.schema import FILE
from hpc_hess.studies.base import FOUND, PIECES, Bench, Recipe
from hpc_hess.studies.sub_block.settings import Settings

Float = NDArray[np.float64]
_SAMPLES = (1, 3, 10, 30, 100, 300, 1000)
_CELLS = 128  # of a heat map, at most, along each side
_MATRICES_IN_MEMORY, _MATRICES_ON_DISK = 6, 2  # at a time, as it is described; the columns, and the array that is kept
_KEY = "studies.sub_block.entries"
_SELECTION = re.compile(r"([^\[\]]+)(?:\[([^\[\]]*)\])?")


class Selection(NamedTuple):
    """Entries of a layout by file index, ascending within each parameter, and how many each parameter has."""

    entries: NDArray[np.int64]
    parameters: list[str]
    counts: list[int]


def select(layout: Layout, texts: Sequence[str], room: Room | None = None) -> Selection:
    """Read selections: a name or a glob over names, and indices as Python writes them.

    ``name[0, :]`` is row 0, ``name[0:4, 0:32]`` a corner; one index into several dimensions counts the flattened entries,
    row by row: ``name[:25]``. Parameters keep the order of the layout; an entry that is selected twice counts once.
    ``room``: for how many entries there is room; entries are counted before they are listed.

    Raises
    ------
    ConfigError : no such parameter (with the nearest name), indices that do not fit its shape, nothing selected, too many.

    """
    chosen: dict[str, list[_Picked]] = {}
    by_name = {parameter.name: parameter for parameter in layout.parameters}
    for text in texts:
        match = _SELECTION.fullmatch(text.strip())
        if not match:
            raise ConfigError(f"{_KEY}: '{text}' is not a parameter's name with indices, as \"name[0, :]\"")
        pattern, index = match[1].strip(), match[2]
        names = [name for name in by_name if fnmatchcase(name, pattern)]
        if not names:
            near = difflib.get_close_matches(pattern, by_name, n=1, cutoff=0.0)[0]
            raise ConfigError(f"{_KEY}: no parameter among those included is called '{pattern}': '{near}'?")
        picks = [_picked(text, index, by_name[name].shape) for name in names]
        _check_room(sum(math.prod(map(len, pick.axes)) for pick in picks), room)
        for name, pick in zip(names, picks, strict=True):
            chosen.setdefault(name, []).append(pick)
    flat = {name: np.unique(np.concatenate([pick.flat() for pick in picks])) for name, picks in chosen.items()}
    order = [parameter for parameter in layout.parameters if len(flat.get(parameter.name, ()))]
    if not order:
        raise ConfigError(f"{_KEY} = {list(texts)} selects no entry")
    parts = [flat[p.name] + p.file_offset for p in order]
    _check_room(sum(map(len, parts)), room)
    return Selection(np.concatenate(parts), [p.name for p in order], [len(part) for part in parts])


class Room(NamedTuple):
    """What there is for the matrix of a sub-block: bytes of memory of each rank, of disk (None: it has its place)."""

    memory: int
    disk: int | None

    @property
    def entries(self) -> int:
        """How many entries there is room for."""
        in_memory = math.isqrt(self.memory // (8 * _MATRICES_IN_MEMORY))
        return in_memory if self.disk is None else min(in_memory, math.isqrt(self.disk // (8 * _MATRICES_ON_DISK)))


def _check_room(count: int, room: Room | None) -> None:
    if room is not None and count > room.entries:
        raise ConfigError(
            f"{_KEY} selects {count:,} entries, whose matrix would take {gigabytes(8.0 * count**2)}, and there "
            f'is room for {room.entries:,} at most: select fewer, as "name[0, :]"'
        )


class _Picked(NamedTuple):
    """Entries of one parameter: indices along each axis of ``sizes``."""

    axes: tuple[range, ...]
    sizes: tuple[int, ...]

    def flat(self) -> NDArray[np.int64]:
        """Return the flattened entries."""
        return np.ravel_multi_index(np.ix_(*(np.array(axis, np.int64) for axis in self.axes)), self.sizes).ravel()


def _picked(text: str, index: str | None, shape: tuple[int, ...]) -> _Picked:
    """Return the entries that an index selects."""
    if index is None:
        return _Picked((range(math.prod(shape)),), (math.prod(shape),))
    parts = [part.strip() for part in index.split(",")]
    sizes: tuple[int, ...] = shape if len(parts) > 1 else (math.prod(shape),)
    if len(parts) > len(sizes):
        raise ConfigError(f"{_KEY}: '{text}' has {len(parts)} indices, the parameter's shape is {list(shape)}")
    picked = []
    for part, size in zip([*parts, *[":"] * (len(sizes) - len(parts))], sizes, strict=True):
        match = re.fullmatch(r"(-?\d+)|(-?\d+)?:(-?\d+)?(?::(-?\d+)?)?", part)
        if not match:
            raise ConfigError(f"{_KEY}: '{part}' in '{text}' is neither an index nor a range as 0:32 or ::4")
        if match[1] is not None:
            if not -size <= int(match[1]) < size:
                raise ConfigError(f"{_KEY}: '{text}' goes beyond the parameter's shape {list(shape)}")
            picked.append(range(size)[int(match[1]) % size :][:1])
        else:
            start, stop, step = (None if part is None else int(part) for part in match.groups()[1:])
            if step == 0:
                raise ConfigError(f"{_KEY}: the step of '{text}' is 0")
            picked.append(range(size)[start:stop:step])
    return _Picked(tuple(picked), sizes)


class _Local(NamedTuple):
    """The selected entries of this rank: their places in the local vector and in the selection."""

    places: torch.Tensor
    numbers: torch.Tensor


def _local(space: VectorSpace, entries: NDArray[np.int64]) -> _Local:
    starts, lengths = space.shard.file_intervals
    if not len(starts):
        nothing = torch.empty(0, dtype=torch.int64, device=space.device)
        return _Local(nothing, nothing)
    before = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    interval = np.clip(np.searchsorted(starts, entries, side="right") - 1, 0, None)
    inside = (entries >= starts[interval]) & (entries < starts[interval] + lengths[interval])
    places = (before[interval] + entries - starts[interval])[inside]
    return _Local(*(torch.from_numpy(x).to(space.device) for x in (places, np.flatnonzero(inside))))


def sub_block(operator: LinearOperator, selection: Selection, *, columns: int = 8, keep: Keep | None = None) -> Float:
    """Return the matrix of the selected entries (t, t), float64, as its products give it: not made symmetric.

    One product for each entry, ``columns`` of them at a time, and one all-reduce of t numbers each. Collective: yes.
    ``keep`` : of vectors of :func:`column_space`.
    """
    space, entries, keep = operator.space, selection.entries, keep or KeepNothing()
    local, count = _local(space, entries), len(entries)
    of_columns = column_space(space, count)
    starts, lengths = of_columns.shard.file_intervals
    mine = slice(int(starts[0]), int(starts[0] + lengths[0])) if len(starts) else slice(0, 0)

    def unit(number: int) -> Vector:
        v = space.zeros()
        v.data[local.places[local.numbers == number]] = 1.0
        return v

    def some(first: int) -> list[Vector]:
        images = products(operator, [unit(k) for k in range(first, min(first + columns, count))])
        picked = torch.zeros(len(images), count, dtype=torch.float64, device=space.device)
        for row, image in zip(picked, images, strict=True):
            row[local.numbers] = image.data[local.places].double()
        summed = space.sum(picked.flatten(), "columns of a sub-block").view(len(images), count)
        return [of_columns.wrap(row[mine].clone()) for row in summed]

    matrix = np.empty((count, count))
    for first in range(0, count, columns):
        parts = keep.vectors(partial(some, first))
        whole = torch.zeros(len(parts), count, dtype=torch.float64, device=space.device)
        for row, part in zip(whole, parts, strict=True):
            row[mine] = part.data
        whole = of_columns.sum(whole.flatten(), "columns of a sub-block").view(len(parts), count)
        matrix[:, first : first + len(parts)] = whole.cpu().numpy().T
    return matrix


def column_space(space: VectorSpace, count: int) -> VectorSpace:
    """Return R^count, float64, over the ranks of ``space``: where columns of a matrix of ``count`` entries lie."""
    return VectorSpace(space.world, Layout({"entries": (count,)}, space.layout.num_shards), torch.float64)


def sub_block_study(bench: Bench) -> dict[str, Any]:
    """Assemble the matrix of studies.sub_block.entries, keep it as an array, and describe it. Collective: yes."""
    settings = Settings.of(bench.config)
    selection = select(bench.operator.space.layout, settings.entries)
    matrix = sub_block(bench.operator, selection, columns=settings.columns, keep=bench.keep)
    asymmetry = float(np.linalg.norm(matrix - matrix.T) / (np.linalg.norm(matrix) or 1.0))
    matrix = 0.5 * (matrix + matrix.T)
    bench.save("sub_block", matrix)
    shares = _shares(matrix, selection.counts)
    return {
        "selected": settings.entries,
        "entries": len(matrix),
        "parameters": selection.parameters,
        "counts": selection.counts,
        "asymmetry": asymmetry,
        "shares": shares.tolist(),
        "heat": heat_map(matrix).tolist(),
        "file": "studies/sub_block/sub_block.npy",
        **describe(matrix, bench.seed),
    }


def describe(matrix: Float, seed: int) -> dict[str, Any]:
    """Return norm, diagonal share, extreme eigenvalues, and how Hutchinson's diagonal converges; local.

    The estimate with independent signs has, per entry and sample, the variance of the other entries of its row: its relative
    error in the 2-norm is |off-diagonal part| / |diagonal| / sqrt(samples). ``diagonal_errors``: measured; one estimate for
    each number of samples.
    """
    diagonal = np.diag(matrix)
    off = matrix - np.diag(diagonal)
    norm, of_diagonal = float(np.linalg.norm(matrix)), float(np.linalg.norm(diagonal))
    values = np.linalg.eigvalsh(matrix)
    others = np.abs(off[~np.eye(len(off), dtype=bool)])
    median = float(np.median(np.abs(diagonal)))
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(_SAMPLES[-1], len(matrix)))
    samples = signs * (signs @ matrix)
    errors = [float(np.linalg.norm(samples[:k].mean(0) - diagonal)) / (of_diagonal or 1.0) for k in _SAMPLES]
    return {
        "frobenius": norm,
        "diagonal_share": (of_diagonal / norm) ** 2 if norm else 0.0,
        "median_ratio": float(np.median(others)) / median if others.size and median else 0.0,
        "lambda_min": float(values[0]),
        "lambda_max": float(values[-1]),
        "samples": list(_SAMPLES),
        "diagonal_errors": errors,
        "diagonal_error_of_one": float(np.linalg.norm(off)) / (of_diagonal or 1.0),
    }


def _shares(matrix: Float, counts: Sequence[int]) -> Float:
    """Return each pair of parameters' part of the squared Frobenius norm."""
    edges = np.concatenate([[0], np.cumsum(counts)[:-1]])
    squares = np.add.reduceat(np.add.reduceat(matrix**2, edges, 0), edges, 1)
    return squares / (squares.sum() or 1.0)


def heat_map(matrix: Float, cells: int = _CELLS) -> Float:
    """Return the matrix on at most ``cells`` x ``cells``: the root mean square of each cell, with the sign of its sum."""
    edges = np.unique(np.linspace(0, len(matrix), min(cells, len(matrix)) + 1).astype(int))[:-1]

    def summed(values: Float) -> Float:
        return np.add.reduceat(np.add.reduceat(values, edges, 0), edges, 1)

    return np.where(summed(matrix) < 0, -1.0, 1.0) * np.sqrt(summed(matrix**2) / summed(np.ones_like(matrix)))


def _check(session: Session, problem: Problem, folder: Path) -> None:
    """Refuse more entries than there is room for. Collective: yes. Raises ConfigError."""
    world = session.world
    ended, begun = world.broadcast(((folder / FOUND).exists(), (folder / PIECES / FILE).exists()), "look for a sub-block")
    memory = int(-world.max_over_ranks(-(host_bytes_free() // world.launch.local_size), "free memory"))
    disk = None if begun else world.broadcast(free_bytes(session.out), "free disk")
    select(problem.model.layout, Settings.of(session.config).entries, None if ended else Room(memory, disk))


def _space(config: Config, space: VectorSpace) -> VectorSpace:
    return column_space(space, len(select(space.layout, Settings.of(config).entries).entries))


RECIPE = Recipe(sub_block_study, lambda config: 0, "entries", space=_space, check=_check)
