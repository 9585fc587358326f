"""Where tokens come from: text, JSON lines, arrays of ids, a datasets directory. Each is a stream of documents."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hpc_hess.errors import DataError
from hpc_hess.intake import masks
from hpc_hess.intake.findings import Finding, noted
from hpc_hess.model.sources.paths import find_path
from hpc_hess.registry.sources import DATA, DataSpec
from hpc_hess.registry.table import load

Tokenise = Callable[[str], list[int]]
_FIRST_CHARACTERS = 1 << 16
_CHAT = ("messages", "conversations", "conversation", "dialog", "prompt", "completion", "chosen")


@dataclass(frozen=True)
class Document:
    """Token ids (n,), int64. ``predicted`` (n,): which of them the loss predicts, None for all. ``place``: of what it is."""

    ids: np.ndarray
    predicted: np.ndarray | None = None
    place: str = ""


Say = Callable[[Finding], object]


class Reading(NamedTuple):
    """How documents are read.

    ``text_field`` : what holds the text of a record. ``tokenise`` : is called only if there is text. ``by_line`` : each
    non-blank line of a text file is a document of its own. ``say`` : is told what was found beside the tokens.
    """

    text_field: str
    tokenise: Tokenise
    by_line: bool
    say: Say


def _document(ids: Any, place: str = "") -> Document:
    return Document(np.asarray(ids, dtype=np.int64), place=place)


def documents(source: str, reading: Reading) -> Iterator[Document]:
    """Yield each document of ``data.source`` in order; lazily, so that big files are cheap. Collective: no.

    Raises
    ------
    DataError : unknown kind, no such file, unreadable or wrongly typed content, no such field, an unknown mask.

    """
    spec, text = spec_of(source)
    place = _existing(source, text, spec) if spec.path else text
    found: Iterator[Document] = load(spec.documents)(place, reading)
    return found


def spec_of(source: str) -> tuple[DataSpec, str]:
    """Return what is registered of a data source, and what comes after its name. Raises DataError."""
    name, colon, text = source.partition(":")
    if not colon or name not in DATA:
        raise DataError(
            f"data.source = '{source}' should be {DATA.listed(lambda spec: spec.form)}"
            + (f"; did you mean 'text:{source}'?" if find_path(source) else "")
        )
    return DATA[name], text


def _existing(source: str, text: str, spec: DataSpec) -> Path:
    path = find_path(text) if text else None
    if path is None:
        raise DataError(f"no such data: {text or source}; data.source = '{source}'")
    if path.is_dir() != (spec.path == "a directory"):
        raise DataError(f"data.source = '{source}' should name {spec.path}, as in {spec.said}")
    return path


def plain_text(path: Path, reading: Reading) -> Iterator[Document]:
    """Yield the lines of a text file, or the whole in parts."""
    return _text_lines(path, reading.tokenise) if reading.by_line else _text_stream(path, reading.tokenise, reading.say)


def _text_stream(path: Path, tokenise: Tokenise, say: Say) -> Iterator[Document]:
    """Yield the file as one document, in parts: special tokens are added once, at the start of the first part."""
    with path.open("rb") as file:
        if file.read(3) == b"\xef\xbb\xbf":
            say(noted("data.encoding", f"the byte order mark at the beginning of {path.name} is left out"))
    size, seen = _FIRST_CHARACTERS, 0
    while True:
        text, complete = _read_text(path, size)
        ids = tokenise(text)
        # Cutting a text changes the tokens near the cut: hold back the last ones until more is read.
        stop = len(ids) if complete else max(seen, len(ids) - 64)
        yield _document(ids[seen:stop])
        if complete:
            return
        seen, size = stop, size * 4


def _not_text(path: Path, error: Exception) -> DataError:
    """Explain why a file is not UTF-8 text."""
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError:
        start = b""
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return DataError(f"{path} is UTF-16 text: convert it with `iconv -f UTF-16 -t UTF-8`")
    if start[:2] == b"\x1f\x8b" or start[:4] in (b"PK\x03\x04", b"\x28\xb5\x2f\xfd"):
        return DataError(f"{path} is compressed: unpack it first")
    remedy = "" if isinstance(error, OSError) else "; convert it, such as with `iconv -f LATIN1 -t UTF-8`"
    return DataError(f"cannot read {path} as UTF-8 text: {error}{remedy}")


def _read_text(path: Path, characters: int) -> tuple[str, bool]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(characters)
            return text, not file.read(1)
    except (OSError, UnicodeDecodeError) as error:
        raise _not_text(path, error) from None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
    except (OSError, UnicodeDecodeError) as error:
        raise _not_text(path, error) from None


def _text_lines(path: Path, tokenise: Tokenise) -> Iterator[Document]:
    for number, line in _lines(path):
        yield _document(tokenise(line.rstrip("\n")), f"{path.name}, line {number}")


def json_lines(path: Path, reading: Reading) -> Iterator[Document]:
    """Yield the text of each record of a file of JSON lines."""
    field, said = reading.text_field, False
    for number, line in _lines(path):
        place = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{place} is not JSON: {error}") from None
        except RecursionError:
            raise DataError(f"{place} is nested too deeply") from None
        if not isinstance(record, dict):
            raise DataError(f'{place} is not an object: each line should be {{"{field}": "..."}}')
        text = _text_of(record, field, place)
        for name in masks.suspicious(record):
            if isinstance(record[name], list):
                raise DataError(
                    f"{place}: '{name}' is a list beside a text, whose tokens it cannot be matched with: take it out, or "
                    "save input_ids and labels with the datasets library"
                )
        if (others := record.keys() - {field}) and not said:
            said = True
            reading.say(noted("data.columns", f"{path.name}: only '{field}' is read; left out: {', '.join(sorted(others))}"))
        yield _document(reading.tokenise(text), f"{path.name}, line {number}")


def _text_of(record: dict[str, Any], field: str, place: str) -> str:
    """Return the text of a record, or raise DataError: it has none, or one that is not valid Unicode."""
    value = record.get(field)
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise DataError(f"{place}, field '{field}' is not valid Unicode (a lone surrogate): mend that line") from None
        return value
    if field in record:
        kinds = {type(None): "null", list: "a list", dict: "an object", bool: "true or false"}
        raise DataError(f"{place}, field '{field}' is {kinds.get(type(value), 'a number')}: it should be a text")
    if chat := [name for name in _CHAT if name in record]:
        raise DataError(
            f"{place} holds chat data ({', '.join(chat)}), which are not rendered: write them as text with the tokenizer's "
            f"apply_chat_template(..., tokenize=False) into a field '{field}', or save input_ids and labels with the "
            "datasets library"
        )
    texts = [name for name, each in record.items() if isinstance(each, str)]
    remedy = f"set data.text_field to one of: {', '.join(texts)}" if texts else "each line should hold a text"
    raise DataError(f"{place} has no field '{field}' (it has {', '.join(record) or 'nothing'}): {remedy}")


def token_ids(path: Path, reading: Reading) -> Iterator[Document]:
    """Yield the rows of token ids of a .npy or .npz file, or one stream of them in parts."""
    if path.suffix not in (".npy", ".npz"):
        raise DataError(f"{path} should be a .npy or .npz file of integer token ids")
    beside: dict[str, np.ndarray] = {}
    try:
        loaded = np.load(path, mmap_mode="r" if path.suffix == ".npy" else None, allow_pickle=False)
        array = loaded
        if path.suffix == ".npz":
            array, beside = _only_array(path, loaded)
    except (OSError, ValueError, EOFError, KeyError) as error:
        raise DataError(f"cannot read {path}: {error}") from None
    if not np.issubdtype(array.dtype, np.integer) or array.ndim not in (1, 2):
        raise DataError(f"{path} holds {array.dtype} of shape {array.shape}: it should hold integer ids, 1-D or 2-D")
    for name, other in beside.items():
        if other.shape != array.shape:
            raise DataError(f"{path}: '{name}' has shape {other.shape} and the ids {array.shape}: they should be the same")
    if array.ndim == 2:
        for number, row in enumerate(array):
            place = f"{path.name}, row {number}"
            ids, predicted = masks.applied(np.asarray(row, np.int64), {n: a[number] for n, a in beside.items()}, place)
            yield Document(ids, predicted, place)
    elif beside:
        raise DataError(f"{path} holds {', '.join(beside)} beside one stream of ids: store rows, 2-D arrays")
    elif reading.by_line:
        raise DataError(f"{path} is one stream of ids, not rows: set data.rows = 'pack', or store a 2-D array")
    else:  # a stream: in parts, so that a mapped file is read only as far as needed
        for start in range(0, max(len(array), 1), _FIRST_CHARACTERS):
            yield _document(array[start : start + _FIRST_CHARACTERS])


def _only_array(path: Path, loaded: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the ids of an archive, and what is beside them."""
    names = list(loaded.files)
    chosen = [n for n in ("input_ids", "tokens") if n in names]
    rest = [n for n in names if n not in chosen]
    if not chosen:
        chosen, rest = [n for n in names if n not in masks.suspicious(names)], masks.suspicious(names)
    if len(chosen) != 1:
        raise DataError(f"{path} holds the arrays {names}: name the one to use 'input_ids'")
    return loaded[chosen[0]], {name: loaded[name] for name in masks.suspicious(rest)}


def saved_rows(path: Path, reading: Reading) -> Iterator[Document]:
    """Yield the rows of a directory that Hugging Face datasets saved."""
    field, say = reading.text_field, reading.say
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
    dataset, names = dataset.with_format(None), list(dataset.column_names)
    column = next((name for name in ("input_ids", field) if name in names), None)
    if column is None:
        _text_of(dataset[0] if len(dataset) else {}, field, f"{path}, row 0")
    beside = masks.suspicious(names) if column == "input_ids" else []
    if left_out := [name for name in names if name not in (column, *beside)]:
        say(noted("data.columns", f"only '{column}' is read; left out: {', '.join(left_out)}"))
    if beside:
        say(noted("data.mask", f"tokens that are predicted follow {', '.join(beside)}"))
    for number, row in enumerate(dataset.select_columns([column, *beside])):
        place = f"{path.name}, row {number}"
        value = row[column]
        if column == field and column != "input_ids":
            yield _document(reading.tokenise(_text_of(row, field, place)), place)
        elif isinstance(value, list) and all(isinstance(i, int) for i in value):
            ids, predicted = masks.applied(np.asarray(value, np.int64), {n: row[n] for n in beside}, place)
            yield Document(ids, predicted, place)
        else:
            raise DataError(f"{place}: column '{column}' should be text or a list of token ids")
