"""Batches as they come: lists, generators, data loaders. They are drawn once and kept, so that there is one data set."""

from __future__ import annotations

import copy
import sys
from collections import UserDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import length_hint
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import Subset, TensorDataset

from hpc_hess.errors import DataError
from hpc_hess.intake.findings import Finding, noted
from hpc_hess.intake.given import named
from hpc_hess.parallel.memory import gigabytes, host_bytes_free

_MOST_BATCHES = 100_000  # of what does not say how many it has


def drawn(batches: Any, none: str = "there are no batches", *, least: int = 1) -> list[Any]:
    """Return the batches of any iterable, drawn once: a data loader that shuffles, or a generator, gives one data set.

    Raises
    ------
    DataError : none, or what was given is one batch, or single examples.

    """
    dataset = batches
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    if isinstance(dataset, TensorDataset):
        raise DataError("batches is a TensorDataset of single examples: put it into a DataLoader with a batch_size")
    if isinstance(batches, Mapping):
        raise DataError("batches is one dictionary: put it into a list, [batch]")
    if type(batches).__name__ in ("DataFrame", "LazyFrame", "Series"):
        raise DataError(f"batches is a {type(batches).__name__}: make batches of its values, such as [(inputs, targets)]")
    iterable = isinstance(batches, Iterable) or hasattr(batches, "__getitem__")
    if isinstance(batches, str | bytes) or not iterable or getattr(batches, "ndim", 1) == 0:
        raise DataError(f"batches is {named(batches)}: give a list of batches")
    if isinstance(batches, list | tuple) and all(isinstance(b, torch.Tensor | np.ndarray) for b in batches):
        kinds = {(str(b.dtype).removeprefix("torch."), b.ndim) for b in batches}
        if len(kinds) > 1 and len({b.shape[:1] for b in batches}) == 1:
            raise DataError("batches is one batch of several tensors: put it into a list, [(inputs, targets)]")
    found = list(batches) if _indexed(batches) else _read(batches)
    if len(found) < least:
        again = ": a generator gives its batches once only, make it anew" if isinstance(batches, Iterator) else ""
        raise DataError(none + again)
    for number, batch in enumerate(found):
        if batch is None:
            raise DataError(f"batch {number} is None")
    return found


def kept(batches: Any, found: Sequence[Any]) -> list[Finding]:
    """Return a note of how much memory the batches ``found`` take, where they were copied out of an iterable."""
    if _indexed(batches):
        return []
    size = gigabytes(sum(map(_bytes, found)))
    return [noted("given.batches", f"batches were drawn once and are kept: {len(found):,}, of {size}")]


def _indexed(batches: Any) -> bool:
    return isinstance(batches, Sequence | torch.Tensor | np.ndarray)


def _read(batches: Any) -> list[Any]:
    """Draw an iterable, which may fill the same tensors again and again. Raises DataError where it is too long to keep."""
    if not isinstance(batches, Iterable) and hasattr(batches, "__len__"):
        batches = map(batches.__getitem__, range(len(batches)))  # as data sets of torch
    found, held, room, sized = list[Any](), 0, host_bytes_free() // 2, length_hint(batches, -1) >= 0
    for batch in batches:
        found.append(_copied(batch))
        held += _bytes(batch)
        if held > room or (len(found) > _MOST_BATCHES and not sized):
            raise DataError(
                f"batches has given {len(found):,} batches of {gigabytes(held)} together and goes on: give as many as are "
                "to be kept in memory, such as itertools.islice(batches, 100)"
            )
    return found


def _copied(batch: Any) -> Any:
    def copied(leaf: Any) -> Any:
        if isinstance(leaf, UserDict):  # as BatchEncoding
            leaf = copy.copy(leaf)
            leaf.data = _copied(leaf.data)
            return leaf
        return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf.copy() if isinstance(leaf, np.ndarray) else leaf

    return tree_map(copied, batch)


def _bytes(batch: Any) -> int:
    leaves = tree_leaves(batch.data if isinstance(batch, UserDict) else batch)
    return sum(leaf.nbytes if isinstance(leaf, torch.Tensor | np.ndarray) else sys.getsizeof(leaf) for leaf in leaves)
