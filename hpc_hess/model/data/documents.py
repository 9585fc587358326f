"""Where tokens come from: text, arrays of ids, and what records.py and hub_rows.py read. Each is a stream of documents."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hpc_hess.config import DataSection
from hpc_hess.errors import DataError
from hpc_hess.intake import masks
from hpc_hess.intake.findings import Finding, noted
from hpc_hess.model.data.tokenizer import LazyTokenizer
from hpc_hess.model.sources.paths import find_path
from hpc_hess.registry.sources import DATA, DataSpec
from hpc_hess.registry.table import load

Tokenise = Callable[[str], list[int]]
_FIRST_CHARACTERS = 1 << 16


@dataclass(frozen=True)
class Document:
    """Token ids (n,), int64. ``predicted`` (n,): which of them the loss predicts, None for all. ``place``: of what it is.

    ``cut``: tokens at its end that are left out, as it is longer than a row.
    """

    ids: np.ndarray
    predicted: np.ndarray | None = None
    place: str = ""
    cut: int = 0


Say = Callable[[Finding], object]


class Reading(NamedTuple):
    """How documents are read.

    ``section`` : what the configuration says of the data. ``tokenizer`` : is loaded only if it is used. ``by_line`` : each
    non-blank line of a text file is a document of its own. ``say`` : is told what was found beside the tokens.
    ``commit`` : is told the commit of a data set of the Hub. ``render`` : render(reading, where)(record, place) is what each
    record is turned into; None: a document.
    """

    section: DataSection
    tokenizer: LazyTokenizer
    by_line: bool
    say: Say
    commit: Callable[[str], object] = str
    render: Callable[[Reading, str], Callable[[Mapping[str, Any], str], Any]] | None = None

    @property
    def text_field(self) -> str:
        """What holds the text of a record."""
        return self.section.text_field

    def tokenise(self, text: str) -> list[int]:
        """Return the ids of a document, with the tokenizer's own special tokens. Raises DataError."""
        return self.tokenizer(text)


def _document(ids: Any, place: str = "") -> Document:
    return Document(np.asarray(ids, dtype=np.int64), place=place)


def documents(source: str, reading: Reading) -> Iterator[Document]:
    """Yield each document of ``data.source`` in order; lazily, so that big files are cheap. Collective: no.

    Raises
    ------
    DataError : unknown kind, no such file, unreadable or wrongly typed content, no such field, an unknown mask.

    """
    spec, text = spec_of(source)
    place = {"": lambda: text, "files": lambda: _files(source, text, spec)}.get(
        spec.path, lambda: _existing(source, text, spec)
    )()
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


def _files(source: str, text: str, spec: DataSpec) -> list[Path]:
    """Return the files that a path, a directory of shards or a pattern names, in the order of their names."""
    path = find_path(text) if text else None
    if path is not None and path.is_file():
        return [path]
    if path is not None:
        found = sorted(each for each in path.rglob("*") if each.suffix in spec.suffixes and each.is_file())
        if not found:
            raise DataError(f"{path} holds no {' or '.join(spec.suffixes)} file: data.source = '{source}'")
        return found
    found = sorted(Path(each) for each in glob.glob(str(Path(text).expanduser()), recursive=True) if Path(each).is_file())
    if not found:
        raise DataError(f"no such data: {text or source}; data.source = '{source}'")
    return found


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


def read_whole(path: Path) -> str:
    """Return the text of a file. Raises DataError: it is not UTF-8."""
    return "".join(line for _, line in lines_of(path))


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines that are not blank, with their numbers. Raises DataError: the file is not UTF-8."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
    except (OSError, UnicodeDecodeError) as error:
        raise _not_text(path, error) from None


def _text_lines(path: Path, tokenise: Tokenise) -> Iterator[Document]:
    for number, line in lines_of(path):
        yield _document(tokenise(line.rstrip("\n")), f"{path.name}, line {number}")


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
