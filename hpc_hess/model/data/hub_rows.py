"""Rows of a data set of the Hugging Face Hub: file by file, each downloaded when its first row is asked for."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hpc_hess.errors import DataError
from hpc_hess.model.data.documents import Document, Reading
from hpc_hess.model.data.records import import_datasets, rows_of
from hpc_hess.model.sources.hub import Name, bring, cached, files_of, lacking, may_ask, named, repository
from hpc_hess.model.sources.paths import find_path

_CARD = "README.md"  # says which files are which split


def hub_rows(text: str, reading: Reading) -> Iterator[Document]:
    """Yield the rows of the split that the configuration names, of a repository of the Hub or of a directory like one."""
    datasets = import_datasets("hub:...")
    name, here = named(text, reading.section.revision, "dataset"), find_path(text)
    if name is None and (here is None or not here.is_dir()):
        raise DataError(f"data.source = 'hub:{text}' should be hub:ORG/NAME, as its page on the Hub shows it")
    root = _listed(name) if name is not None else here
    assert root is not None
    if name is not None:
        reading.commit(root.name)
        files = list(files_of(name, root.name) or {})
    else:
        files = [str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()]
    with tempfile.TemporaryDirectory(prefix="hpc-hess-") as folder:
        kind, options, chosen = _files_of(datasets, Path(folder), root, files, text, reading)
        for number, file in enumerate(chosen):
            path = bring(name, root.name, [file]) / file if name is not None else root / file
            rows = _rows(datasets, kind, path, options, f"{text}, {file}")
            yield from rows_of(rows, file if number or len(chosen) > 1 else text, reading)


def _listed(name: Name) -> Path:
    """Return where the cache has a commit whose files it knows; asks the Hub where it has none. Raises DataError."""
    path = cached(name)
    if path is not None and files_of(name, path.name) is not None:
        return path
    if not may_ask():
        raise lacking(name)
    return repository(name, _CARD)[0]


def _files_of(
    datasets: Any, mirror: Path, root: Path, files: list[str], text: str, reading: Reading
) -> tuple[str, dict[str, Any], list[str]]:
    """Return which reader of datasets takes the files of the split, its options, and the files.

    datasets itself decides that, of empty files that are called like those of the repository.
    """
    section = reading.section
    tree = mirror / "tree"
    for file in files:
        (tree / file).parent.mkdir(parents=True, exist_ok=True)
        (tree / file).touch()
    if _CARD in files:
        shutil.copy(root / _CARD, tree / _CARD)
    asked = f"data.source = 'hub:{text}'"
    try:
        builder = datasets.load_dataset_builder(str(tree), name=section.config or None, cache_dir=str(mirror / "cache"))
    except Exception as error:  # datasets has many kinds
        reason = " ".join(line.strip() for line in str(error).splitlines()[:2] if "load_dataset" not in line)
        if "onfig" in reason and "vailable" in reason:
            listed = reason[reason.find("[") : reason.rfind("]") + 1]
            raise DataError(f"{asked} has no configuration '{section.config}': set data.config to one of {listed}") from None
        if any(file.endswith(".py") and "/" not in file for file in files):
            raise DataError(
                f"{asked} is made by Python code of its own, which is not run: set data.revision = 'refs/convert/parquet'"
            ) from None
        raise DataError(f"{asked} holds no data that datasets reads: {reason.replace(str(tree), text)}") from None
    splits = builder.config.data_files or {}
    if section.split not in splits:
        listed = ", ".join(f"'{name}'" for name in splits) or "none"
        raise DataError(f"{asked} has no split '{section.split}': set data.split to one of {listed}")
    basic = {field.name for field in dataclasses.fields(datasets.BuilderConfig)}
    options = {
        field.name: value
        for field in dataclasses.fields(builder.config)
        if field.name not in basic
        and (value := getattr(builder.config, field.name)) != field.default
        and field.default is not dataclasses.MISSING
    }
    kind = type(builder).__module__.split(".")[-2]
    return kind, options, [str(Path(file).relative_to(tree)) for file in splits[section.split]]


def _rows(datasets: Any, kind: str, path: Path, options: dict[str, Any], place: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of one file, as they are read. Raises DataError."""
    try:
        yield from datasets.load_dataset(kind, data_files=[str(path)], split="train", streaming=True, **options)
    except (DataError, GeneratorExit):
        raise
    except Exception as error:  # of readers of many formats
        raise DataError(f"cannot read {place}: {(str(error).splitlines() or [''])[0]}") from None
