"""Records from files: JSON lines, JSON arrays, Parquet, what datasets saves. Each becomes a document as it is read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hpc_hess.errors import DataError
from hpc_hess.model.data.documents import Document, Reading, lines_of, read_whole
from hpc_hess.model.data.rendering import Renderer

_EXTRA = "needs a package that is not installed: pip install 'hpc-hess[datasets]'"
_ROWS = 256  # of a Parquet file that are held at a time


def json_lines(files: list[Path], reading: Reading) -> Iterator[Document]:
    """Yield what each record of files of JSON lines, or of a JSON array, holds."""
    for path in files:
        render = (reading.render or Renderer)(reading, path.name)
        for record, place in _array_of(path) if _begins_with(path, "[") else _lines_of(path):
            yield render(record, place)


def _begins_with(path: Path, letter: str) -> bool:
    return next((line.lstrip()[0] for _, line in lines_of(path)), "") == letter and path.suffix != ".jsonl"


def _lines_of(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    for number, line in lines_of(path):
        place = f"{path}, line {number}"
        yield _record(_parsed(line, place), place, "line"), f"{path.name}, line {number}"


def _array_of(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    for number, record in enumerate(_parsed(read_whole(path), str(path))):
        place = f"{path}, record {number}"
        yield _record(record, place, "record"), f"{path.name}, record {number}"


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{place} is not JSON: {error}") from None
    except RecursionError:
        raise DataError(f"{place} is nested too deeply") from None


def _record(record: Any, place: str, each: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise DataError(f'{place} is not an object: each {each} should be {{"text": "..."}} or {{"messages": [...]}}')
    return record


def parquet_rows(files: list[Path], reading: Reading) -> Iterator[Document]:
    """Yield what each row of Parquet files holds."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise DataError(f"data.source = parquet:... {_EXTRA}") from None
    for path in files:
        render, number = (reading.render or Renderer)(reading, path.name), 0
        try:
            with ParquetFile(path) as file:
                for batch in file.iter_batches(_ROWS):
                    for record in batch.to_pylist():
                        yield render(record, f"{path.name}, row {number}")
                        number += 1
        except (ArrowException, OSError) as error:
            raise DataError(f"cannot read {path} as Parquet: {str(error).splitlines()[0]}") from None


def saved_rows(path: Path, reading: Reading) -> Iterator[Document]:
    """Yield the rows of a directory that Hugging Face datasets saved."""
    datasets = import_datasets("datasets:...")
    try:
        dataset = datasets.load_from_disk(str(path))
    except Exception as error:
        raise DataError(f"{path} is not a directory written by datasets.save_to_disk: {error}") from None
    if isinstance(dataset, datasets.DatasetDict):
        splits = list(dataset)
        raise DataError(f"{path} holds the splits {splits}: set data.source = 'datasets:{path / splits[0]}'")
    return rows_of(dataset.with_format(None), path.name, reading)


def import_datasets(source: str) -> Any:
    """Return the package. Raises DataError: it is not installed."""
    try:
        import datasets
    except ImportError:
        raise DataError(f"data.source = {source} {_EXTRA}") from None
    return datasets


def rows_of(rows: Iterable[Mapping[str, Any]], where: str, reading: Reading) -> Iterator[Document]:
    """Yield what each row of a data set holds."""
    render = (reading.render or Renderer)(reading, where)
    for number, row in enumerate(rows):
        yield render(row, f"{where}, row {number}")
