"""Columns beside token ids: those that say which tokens count are honoured, others that look as if they did are refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from hpc_hess.errors import DataError

IGNORED = -100
_SELECTING = ("assistant_masks", "assistant_mask", "completion_mask")  # 1 where a token is to be predicted
_TRIVIAL: dict[str, Callable[[np.ndarray], bool]] = {  # known columns, where they say nothing
    "position_ids": lambda row: bool((row == np.arange(len(row))).all()),
    "token_type_ids": lambda row: not row.any(),
}
HARMLESS = ("special_tokens_mask", "length", "overflow_to_sample_mapping", "offset_mapping")
_LOOKS_LIKE_ONE = re.compile(r"mask|weight|label|target|position|segment|seq_?len|cu_?seq|token_type|document_id")


def suspicious(names: Any) -> list[str]:
    """Return the names that look as if they said which tokens count, known ones included."""
    return [n for n in names if _LOOKS_LIKE_ONE.search(n.lower()) and n not in HARMLESS]


def _row(name: str, value: Any, length: int, place: str) -> np.ndarray:
    array = np.asarray(value)
    if array.ndim != 1 or not (np.issubdtype(array.dtype, np.integer) or array.dtype == bool):
        shown = "one number a row, as a classifier has" if array.ndim == 0 else f"{array.dtype} of shape {array.shape}"
        raise DataError(f"{place}: '{name}' is {shown}: it should hold an integer for each token; take the column out")
    if len(array) != length:
        raise DataError(f"{place}: '{name}' has {len(array)} entries for {length} tokens: it should have one for each")
    return array.astype(np.int64)


def _says_nothing(name: str, value: Any, length: int, place: str) -> bool:
    """Whether a column is a classifier's label, or a known one that says what is so anyway."""
    known = _TRIVIAL.get(name)
    return (name == "label" and np.ndim(value) == 0) or (known is not None and known(_row(name, value, length, place)))


def applied(ids: np.ndarray, beside: Mapping[str, Any], place: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the ids without padding, and which of them are predicted (None: all), both (n,).

    Parameters
    ----------
    beside : other columns of the row by name, those of :func:`suspicious` at least.
    place : what an error names: file and row.

    Raises
    ------
    DataError : a column does not fit the ids, or looks like a mask and is not known.

    """
    predicted, kept = np.ones(len(ids), bool), np.ones(len(ids), bool)
    for name, value in beside.items():
        if value is None:
            continue
        if name == "labels":
            labels = _row(name, value, len(ids), place)
            predicted &= labels != IGNORED
            if ((labels != ids) & (labels != IGNORED)).any():
                raise DataError(
                    f"{place}: 'labels' hold other ids than input_ids: the loss of a causal LM predicts the tokens "
                    f"themselves; labels should be the same ids, or {IGNORED} where nothing is predicted"
                )
        elif name == "attention_mask":
            kept = _row(name, value, len(ids), place) != 0
        elif name in _SELECTING:
            predicted &= _row(name, value, len(ids), place) != 0
        elif name in suspicious([name]) and not _says_nothing(name, value, len(ids), place):
            raise DataError(
                f"{place}: column '{name}' looks as if it said which tokens count, and is not known: take it out, or turn "
                f"it into 'labels' that are {IGNORED} where nothing is predicted"
            )
    found = np.flatnonzero(kept)
    if not len(found):
        return ids[:0], predicted[:0]
    inside = slice(found[0], found[-1] + 1)
    if not kept[inside].all():
        raise DataError(f"{place}: 'attention_mask' has zeros between tokens: only padding at either end can be left out")
    whole = predicted.all() and kept.all()
    return ids[inside], None if whole else predicted[inside]
