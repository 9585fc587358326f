"""The tokenizer, loaded only when the data are text."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from hpc_hess.config import ModelSection
from hpc_hess.errors import DataError
from hpc_hess.intake.findings import Finding, noted, passed, unchecked
from hpc_hess.model.sources.paths import find_path
from hpc_hess.model.sources.source import Source

_PROBE = 2000  # characters that are tokenised twice


class LazyTokenizer:
    """Turns text into ids with ``model.tokenizer``, else the model source's own tokenizer.

    Calling it loads the tokenizer. Raises DataError when there is none or it cannot be read.
    """

    def __init__(self, section: ModelSection, source: Source) -> None:
        self._section, self._source = section, source
        self._used = False
        self.findings: list[Finding] = []

    def __call__(self, text: str) -> list[int]:
        """Return the ids of a document with the special tokens the tokenizer adds by itself."""
        if not self._used:
            self._used = True
            self._check(text[:_PROBE])
        ids: list[int] = self._tokenizer(text, verbose=False)["input_ids"]
        return ids

    def encoded(self, texts: Sequence[str], *, target: bool = False, length: int | None = None) -> dict[str, list[int]]:
        """Return input_ids, and what else the tokenizer gives, of a text or of a pair of texts.

        ``target``: as the text that a sequence-to-sequence model writes. ``length``: cut to so many tokens.
        """
        if not self._used:
            self._used = True
            self._check(texts[0][:_PROBE])
        given = {"text_target": texts[0]} if target else dict(zip(("text", "text_pair"), texts, strict=False))
        cut = {"truncation": True, "max_length": length} if length is not None else {}
        return dict(self._tokenizer(**given, **cut, verbose=False))

    @property
    def mask(self) -> int | None:
        """Id of the token that stands for one to be predicted, None where there is none. Raises DataError: no tokenizer."""
        found: int | None = self._tokenizer.mask_token_id
        return found

    @property
    def special_ids(self) -> list[int]:
        """Ids of the special tokens."""
        return list(self._tokenizer.all_special_ids)

    def with_offsets(self, text: str, *, special: bool, place: str) -> tuple[list[int], np.ndarray]:
        """Return ids (n,), and the characters [n, 2] that each stands for. ``special``: with the tokenizer's own tokens.

        Raises
        ------
        DataError : the tokenizer does not tell them; ``place`` is what the error names.

        """
        if not self._used:
            self._used = True
            self._check(text[:_PROBE])
        if not self._tokenizer.is_fast:
            raise DataError(
                f"{place}: {type(self._tokenizer).__name__} does not tell which characters a token stands for: set "
                "model.tokenizer to a directory with tokenizer.json, or data.loss_on = 'all'"
            )
        found = self._tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
        return found["input_ids"], np.asarray(found["offset_mapping"], np.int64).reshape(-1, 2)

    def chat(self, turns: list[dict[str, Any]], place: str, **options: Any) -> Any:
        """Return what the tokenizer's chat template makes of a conversation. Raises DataError."""
        if not self._template:
            raise DataError(
                f"{place} is a conversation, and the tokenizer has no chat template: set model.tokenizer to a directory "
                "with chat_template.jinja, such as that of the model's chat version"
            )
        try:
            return self._tokenizer.apply_chat_template(turns, **options)
        except Exception as error:  # a template is a program
            reason = [*str(error).strip().splitlines(), ""][0] or type(error).__name__
            raise DataError(
                f"{place}: the chat template fails: {reason}; mend the turns, or set model.tokenizer to a directory with "
                "another chat_template.jinja"
            ) from None

    @property
    def marks_generation(self) -> bool:
        """Whether the chat template marks what the assistant wrote."""
        return bool(re.search(r"\{%-?\s*generation\b", self._template)) and bool(self._tokenizer.is_fast)

    @cached_property
    def special_tokens(self) -> list[str]:
        """The tokens that stand beside the ordinary text, such as those that end a turn."""
        return [*self._tokenizer.all_special_tokens, *self._tokenizer.get_added_vocab()]

    @property
    def _template(self) -> str:
        found = getattr(self._tokenizer, "chat_template", None)
        if isinstance(found, dict):
            found = found.get("default")
        return found or ""

    def text(self, ids: Iterable[int]) -> str:
        """Return the text of token ids; the ids themselves where there is no tokenizer."""
        ids = [int(i) for i in ids]
        try:
            return str(self._tokenizer.decode(ids))
        except DataError:
            return " ".join(map(str, ids))

    def pieces(self, ids: list[int]) -> list[str]:
        """Return the text of each token where it stands; the ids with a blank where there is no tokenizer."""
        try:
            decode = self._tokenizer.decode
        except DataError:
            return [f"{i} " for i in ids]
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        found = [decode(ids[:1], **options)]
        for pair in itertools.pairwise(ids):  # alone, a word loses the blank before it
            found.append(decode(list(pair), **options)[len(decode([pair[0]], **options)) :])
        return found

    @property
    def end(self) -> int | None:
        """Id of the end-of-text token if the tokenizer was used, else None."""
        return self._tokenizer.eos_token_id if self._used else None

    @property
    def padding(self) -> int:
        """Id to pad with: the tokenizer's choice, else the model's, else 0."""
        config = self._source.hf_config
        chosen = [getattr(config, "pad_token_id", None), getattr(config, "eos_token_id", None)]
        if self._used:
            chosen[:0] = [self._tokenizer.pad_token_id, self._tokenizer.eos_token_id]
        return next((i for i in chosen if isinstance(i, int) and i >= 0), 0)

    def _check(self, text: str) -> None:
        """Compare with tokenizer.json itself, whose ids count: a class that transformers builds may read it otherwise."""
        path = self._path()
        file = (path if path.is_dir() else path.parent) / "tokenizer.json"
        if path.suffix == ".gguf" or not file.is_file():
            return
        from tokenizers import Tokenizer
        from transformers import PreTrainedTokenizerFast

        try:
            right = Tokenizer.from_file(str(file)).encode(text, add_special_tokens=False).ids
        except Exception as error:
            self.findings.append(unchecked("data.tokenizer", f"{file.name} cannot be read by itself: {error}"))
            return
        found = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if found == right:
            self.findings.append(passed("data.tokenizer", f"the ids are those of {file.name}"))
            return
        name = type(self._tokenizer).__name__
        self._tokenizer = PreTrainedTokenizerFast.from_pretrained(str(file.parent), local_files_only=True)
        self.findings.append(
            noted(
                "data.tokenizer",
                f"{name} gives {len(found)} ids for the first {len(text)} characters, {file.name} itself {len(right)}: "
                f"those of {file.name} are used",
            )
        )

    @cached_property
    def _tokenizer(self) -> Any:
        path = self._path()
        try:
            return open_tokenizer(path, self._section.trust_remote_code)
        except ImportError as error:
            raise DataError(f"the tokenizer of {path} needs a package that is not installed: {error}") from None
        except Exception as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise DataError(f"cannot read a tokenizer from {path}: {reason[0]}") from None

    def _path(self) -> Path:
        if self._section.tokenizer:
            path = find_path(self._section.tokenizer)
            if path is None:
                raise DataError(f"no such tokenizer: model.tokenizer = '{self._section.tokenizer}' is not on disk")
            return path
        if self._source.tokenizer_path is None:
            raise DataError(
                f"{self._source.path} has no tokenizer for text: set model.tokenizer to a directory that has one, or "
                "give ids with data.source = 'tokens:PATH.npy'"
            )
        return self._source.tokenizer_path


def open_tokenizer(path: Path, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer of a directory, or of one file. Raises what transformers raises."""
    from transformers import AutoTokenizer

    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    if path.suffix == ".gguf":
        options["gguf_file"] = path.name
    return AutoTokenizer.from_pretrained(str(path.parent if path.is_file() else path), **options)
