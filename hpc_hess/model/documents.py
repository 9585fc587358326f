"""Where tokens come from: text, JSON lines, arrays of ids, a datasets directory. Each is a stream of documents."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hpc_hess.errors import DataError
from hpc_hess.model.paths import find_path

Tokenise = Callable[[str], list[int]]
_KINDS = ("text", "jsonl", "tokens", "datasets")
_FIRST_CHARACTERS = 1 << 16


def documents(source: str, text_field: str, tokenise: Tokenise, by_line: bool) -> Iterator[np.ndarray]:
    """Yield the token ids of each document of ``data.source``, int64, in order; lazily, so that big files are cheap.

    ``by_line`` makes each non-blank line of a text file a document of its own. ``tokenise`` is called only if the
    source is text. Collective: no.

    Raises
    ------
    DataError : unknown kind, no such file, unreadable or wrongly typed content, no such field.

    """
    kind, path = _locate(source)
    if kind == "text":
        return _text_lines(path, tokenise) if by_line else _text_stream(path, tokenise)
    if kind == "jsonl":
        return _jsonl(path, text_field, tokenise)
    if kind == "tokens":
        return _tokens(path, by_line)
    return _datasets(path, text_field, tokenise)


def _locate(source: str) -> tuple[str, Path]:
    kind, colon, text = source.partition(":")
    if not colon or kind not in _KINDS:
        raise DataError(
            f"data.source = '{source}' should be text:PATH, jsonl:PATH, tokens:PATH or datasets:DIR"
            + (f"; did you mean 'text:{source}'?" if find_path(source) else "")
        )
    path = find_path(text) if text else None
    if path is None:
        raise DataError(f"no such data: {text or source}; data.source = '{source}'")
    if path.is_dir() != (kind == "datasets"):
        expected = "a directory written by datasets.save_to_disk" if kind == "datasets" else "a file"
        raise DataError(f"data.source = '{source}' should name {expected}")
    return kind, path


def _text_stream(path: Path, tokenise: Tokenise) -> Iterator[np.ndarray]:
    """Yield the file as one document, in parts: special tokens are added once, at the start of the first part."""
    size, seen = _FIRST_CHARACTERS, 0
    while True:
        text, complete = _read_text(path, size)
        ids = tokenise(text)
        # Cutting a text changes the tokens near the cut: hold back the last ones until more is read.
        stop = len(ids) if complete else max(seen, len(ids) - 64)
        yield np.asarray(ids[seen:stop], dtype=np.int64)
        if complete:
            return
        seen, size = stop, size * 4


def _read_text(path: Path, characters: int) -> tuple[str, bool]:
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(characters)
            return text, not file.read(1)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path} as UTF-8 text: {error}") from None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path} as UTF-8 text: {error}") from None


def _text_lines(path: Path, tokenise: Tokenise) -> Iterator[np.ndarray]:
    for _, line in _lines(path):
        yield np.asarray(tokenise(line.rstrip("\n")), dtype=np.int64)


def _jsonl(path: Path, field: str, tokenise: Tokenise) -> Iterator[np.ndarray]:
    for number, line in _lines(path):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number} is not JSON: {error}") from None
        if not isinstance(record, dict) or not isinstance(record.get(field), str):
            found = f"has {sorted(record)}" if isinstance(record, dict) else "is not an object"
            raise DataError(f"{path}, line {number} has no text in field '{field}' ({found}): set data.text_field")
        yield np.asarray(tokenise(record[field]), dtype=np.int64)


def _tokens(path: Path, by_line: bool) -> Iterator[np.ndarray]:
    if path.suffix not in (".npy", ".npz"):
        raise DataError(f"{path} should be a .npy or .npz file of integer token ids")
    try:
        loaded = np.load(path, mmap_mode="r" if path.suffix == ".npy" else None, allow_pickle=False)
        array = _only_array(path, loaded) if path.suffix == ".npz" else loaded
    except (OSError, ValueError, EOFError, KeyError) as error:
        raise DataError(f"cannot read {path}: {error}") from None
    if not np.issubdtype(array.dtype, np.integer) or array.ndim not in (1, 2):
        raise DataError(f"{path} holds {array.dtype} of shape {array.shape}: it should hold integer ids, 1-D or 2-D")
    if array.ndim == 2:
        for row in array:
            yield np.asarray(row, dtype=np.int64)
    elif by_line:
        raise DataError(f"{path} is one stream of ids, not rows: set data.rows = 'pack', or store a 2-D array")
    else:  # a stream: in parts, so that a mapped file is read only as far as needed
        for start in range(0, max(len(array), 1), _FIRST_CHARACTERS):
            yield np.asarray(array[start : start + _FIRST_CHARACTERS], dtype=np.int64)


def _only_array(path: Path, loaded: Any) -> np.ndarray:
    names = list(loaded.files)
    chosen = [n for n in ("input_ids", "tokens") if n in names] or names
    if len(chosen) != 1 and names == chosen:
        raise DataError(f"{path} holds the arrays {names}: name the one to use 'input_ids'")
    array: np.ndarray = loaded[chosen[0]]
    return array


def _datasets(path: Path, field: str, tokenise: Tokenise) -> Iterator[np.ndarray]:
    try:
        import datasets
    except ImportError:
        raise DataError("data.source = datasets:... needs the package: pip install 'hpc-hess[datasets]'") from None
    try:
        dataset = datasets.load_from_disk(str(path))
    except Exception as error:
        raise DataError(f"{path} is not a directory written by datasets.save_to_disk: {error}") from None
    if isinstance(dataset, datasets.DatasetDict):
        splits = list(dataset)
        raise DataError(f"{path} holds the splits {splits}: set data.source = 'datasets:{path / splits[0]}'")
    column = next((name for name in ("input_ids", field) if name in dataset.column_names), None)
    if column is None:
        raise DataError(f"{path} has neither 'input_ids' nor '{field}' ({dataset.column_names}): set data.text_field")
    for number, row in enumerate(dataset.select_columns([column])):
        value = row[column]
        if isinstance(value, str):
            yield np.asarray(tokenise(value), dtype=np.int64)
        elif isinstance(value, list) and all(isinstance(i, int) for i in value):
            yield np.asarray(value, dtype=np.int64)
        else:
            raise DataError(f"{path}, row {number}: column '{column}' should be text or a list of token ids")
