"""Awkward files of records, read by the program and, byte for byte the same file, by the ``datasets`` library.

Where both take a file the tokens are equal, with the same template. What one refuses the other refuses too; only of a lone
surrogate the library makes something, conversations whose turns are texts, which no template takes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from transformers import AutoTokenizer

from hpc_hess.config import DataSection, ModelSection
from hpc_hess.errors import DataError
from hpc_hess.model.data.data import load_samples
from hpc_hess.model.sources.source import resolve_source
from tests.support.base_model import config_b
from tests.support.chat_models import CHATML, directory

datasets = pytest.importorskip("datasets")


def chat(text: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": text, **more}]}


def lines(*records: Any, end: str = "\n", ascii_only: bool = False) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=ascii_only) + end for record in records).encode()


CHATS = [chat("the cat"), chat("café \U0001f600"), chat("a\u2028b\x85c")]


class File(NamedTuple):
    """``ours``: what we say of a file, "" where it is read; ``refused``: by the library; ``length`` of the rows."""

    data: bytes
    ours: str = ""
    refused: bool = False
    length: int = 400


FILES: dict[str, File] = {
    "byte order mark": File(b"\xef\xbb\xbf" + lines(*CHATS)),
    "CRLF": File(lines(*CHATS, end="\r\n")),
    "CRLF within texts": File(lines(chat("the\r\ncat\r"), chat("\r\n"))),
    "empty lines": File(b"\n" + lines(*CHATS, end="\n\n \n")),
    "lone surrogate": File(lines(chat("a \ud83d b"), ascii_only=True), ours="lone surrogate", refused=True),
    "surrogate pair": File(lines(*CHATS, ascii_only=True)),
    "nested messages": File(
        lines(
            chat('nested {"a": [1]}', thinking=None),
            {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "[{}]"}] * 3},
        )
    ),
    "tabs": File(lines({"text": "\ta\tb\t"}, {"text": "\tx"}) + b'\t{"text"\t:\t"cd"}\t\n'),
    "a very long line": File(lines({"text": "a b c " * 200_000}, {"text": "end"}), length=1_200_100),
    "Windows-1252": File('{"text": "caf\u00e9 \u2019"}\n'.encode("cp1252"), ours="as UTF-8 text", refused=True),
    "no final newline": File(lines(*CHATS)[:-1]),
    "trailing comma": File(b'{"text": "a",}\n', ours="is not JSON", refused=True),
    "commas between lines": File(b'{"text": "a"},\n{"text": "b"},\n', ours="is not JSON", refused=True),
    "NUL": File(lines({"text": "a\x00b"}, {"text": "\x00y"})),
    "a bare NUL": File(b'{"text": "a\x00b"}\n', ours="is not JSON", refused=True),
}


def outcome(function: Callable[[], Any]) -> tuple[Any, str]:
    """Return what a function returns, or all that its error and those behind it say."""
    try:
        return function(), ""
    except Exception as error:
        said, behind = "", error
        while behind is not None:
            said, behind = f"{said} {type(behind).__name__}: {behind}", behind.__cause__ or behind.__context__
        return None, said


@pytest.mark.parametrize("name", list(FILES))
def test_tokens_are_those_of_the_datasets_library(name: str, tmp_path: Path) -> None:
    file, model = FILES[name], directory(tmp_path / "model", CHATML)
    config_b(vocab_size=300, max_position_embeddings=1 << 21).save_pretrained(model)
    tokenizer, section = AutoTokenizer.from_pretrained(model), ModelSection(source=str(model))

    def ours() -> list[list[int]]:
        path = tmp_path / "file.jsonl"
        path.write_bytes(file.data)
        data = DataSection(source=f"jsonl:{path}", rows="pad", sequence_length=file.length, sequences=8)
        samples = load_samples(data, section, resolve_source(section))
        return [row[mask.bool()].tolist() for row, mask in zip(samples.input_ids, samples.attention_mask, strict=True)]

    def theirs() -> list[list[int]]:
        path = tmp_path / "theirs.jsonl"
        path.write_bytes(file.data)
        rows = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
        found = []
        for row in rows:
            if "messages" in row:
                turns = [{k: v for k, v in turn.items() if v is not None} for turn in row["messages"]]
                found.append(tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"])
            else:
                found.append(tokenizer(row["text"])["input_ids"])
        return found

    (mine, refused), (library, minded) = outcome(ours), outcome(theirs)
    print(f"{name}: ours {refused or 'read'}; datasets {minded or 'read'}")
    assert bool(refused) == bool(file.ours), refused
    assert bool(minded) == file.refused, minded
    assert file.ours in refused
    if refused:
        with pytest.raises(DataError):
            ours()
    assert mine == library
