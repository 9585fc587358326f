"""Samples with labels of their own: texts and pairs of texts with a class, texts with a target text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from hpc_hess.config import DataSection, ModelSection
from hpc_hess.errors import DataError
from hpc_hess.intake.findings import Finding, noted, passed
from hpc_hess.intake.masks import IGNORED
from hpc_hess.model.data.data import Samples, require_positions
from hpc_hess.model.data.documents import Reading, documents, spec_of
from hpc_hess.model.data.labels import Labels
from hpc_hess.model.data.rendering import text_of
from hpc_hess.model.data.tokenizer import LazyTokenizer
from hpc_hess.model.sharded.skeleton import vocabulary_size
from hpc_hess.model.sources.source import Source
from hpc_hess.registry.sources import DATA

Record = tuple[Mapping[str, Any], str]  # columns, and the place that an error names


@dataclass(frozen=True)
class Example:
    """A sample: ``inputs`` by name, int64 (n,) where they are padded; ``label``: a number, or an array (m,)."""

    inputs: dict[str, np.ndarray]
    label: Any
    place: str
    cut: int = 0


@dataclass
class Rows:
    """The records of a source as they are, and what is found while they are read."""

    section: DataSection
    model: ModelSection
    source: Source
    findings: list[Finding] = field(default_factory=list)
    commits: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tokenizer = LazyTokenizer(self.model, self.source)

    def __iter__(self) -> Iterator[Record]:
        """Yield columns and place of each record. Raises DataError: the source has no columns."""
        spec, _ = spec_of(self.section.source)
        if not spec.has_columns:
            forms = ", ".join(each.form for each in DATA.values() if each.has_columns)
            raise DataError(
                f"model.task = \"{self.model.task}\" needs data with columns, which data.source = '{self.section.source}' "
                f"has not: set data.source to one of {forms}"
            )
        reading = Reading(
            self.section,
            self.tokenizer,
            True,
            self.findings.append,
            self.commits.append,
            lambda _reading, _where: lambda record, place: (record, place),
        )
        yield from documents(self.section.source, reading)  # type: ignore[misc]  # which render makes of them

    def samples(self, examples: Iterator[Example]) -> Samples:
        """Return the first ``data.sequences`` examples, padded. Raises DataError: there are none."""
        found = []
        for example in examples:
            found.append(example)
            if len(found) == self.section.sequences:
                break
        if not found:
            raise DataError(f"data.source = '{self.section.source}' is empty: it has no record with a label")
        padding = {"input_ids": self.tokenizer.padding, "attention_mask": 0, "token_type_ids": 0}
        samples = gathered(found, self.section, padding)
        what = f"{len(samples)} samples, {samples.num_tokens} {'labels' if samples.labels.ndim == 1 else 'targets'}"
        findings = [passed("data.source", what), *self.findings, *self.tokenizer.findings]
        return replace(samples, task=self.model.task, findings=findings, commit="".join(self.commits[:1]))


def column(record: Mapping[str, Any], name: str, key: str, place: str) -> Any:
    """Return what a column holds. Raises DataError: there is no such column, or nothing in it."""
    if record.get(name) is None:
        has = "is empty" if name in record else f"is not there (there is {', '.join(record) or 'nothing'})"
        raise DataError(f"{place}: column '{name}' {has}: set {key} to the column that holds it")
    return record[name]


def gathered(examples: Sequence[Example], section: DataSection, padding: Mapping[str, int]) -> Samples:
    """Pad examples to Samples; inputs that ``padding`` names are padded with its values, labels with -100.

    Raises
    ------
    DataError : other inputs have different shapes.

    """
    inputs = {}
    for name in examples[0].inputs:
        rows = [example.inputs[name] for example in examples]
        if name in padding:
            inputs[name] = _padded(rows, padding[name])
            continue
        if odd := next((e for e in examples if e.inputs[name].shape != rows[0].shape), None):
            raise DataError(
                f"{odd.place} has '{name}' of shape {list(odd.inputs[name].shape)}, {examples[0].place} of shape "
                f"{list(rows[0].shape)}: bring all of them to one shape"
            )
        inputs[name] = torch.from_numpy(np.stack(rows))
    first = np.asarray(examples[0].label)
    if first.ndim and np.issubdtype(first.dtype, np.integer):
        labels = _padded([np.asarray(example.label) for example in examples], IGNORED)
    else:
        labels = torch.from_numpy(np.stack([np.asarray(example.label) for example in examples]))
    count = len(labels) if labels.is_floating_point() else int((labels != IGNORED).sum())
    if not count:
        raise DataError(f"data.source = '{section.source}': no label counts")
    digest = hashlib.sha256()
    for name, tensor in {**inputs, "labels": labels}.items():
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode() + tensor.numpy().tobytes())
    cut = [example.cut for example in examples if example.cut]
    notes = []
    if cut:
        notes.append(
            f"{len(cut)} of {len(examples)} samples are cut after data.sequence_length = {section.sequence_length} tokens, "
            f"by up to {max(cut)}"
        )
    if len(examples) < section.sequences:
        notes.append(f"the data give {len(examples)} samples of the {section.sequences} asked for; all of them are used")
    places = [example.place for example in examples]
    return Samples(inputs, labels, count, digest.hexdigest(), notes, places, truncated=len(cut))


def _padded(rows: Sequence[np.ndarray], value: int) -> torch.Tensor:
    out = torch.full((len(rows), max(len(row) for row in rows)), value, dtype=torch.int64)
    for number, row in enumerate(rows):
        out[number, : len(row)] = torch.from_numpy(row.astype(np.int64))
    return out


def encoded(rows: Rows, texts: Sequence[str], *, target: bool = False) -> tuple[dict[str, np.ndarray], int]:
    """Return the inputs that a text or a pair of texts makes, and by how many tokens they are cut.

    Raises
    ------
    DataError : a token id outside the model's vocabulary, no token.

    """
    length, config = rows.section.sequence_length, rows.source.hf_config
    found = rows.tokenizer.encoded(texts, target=target)
    cut = max(0, len(found["input_ids"]) - length)
    if cut:
        found = rows.tokenizer.encoded(texts, target=target, length=length)
    ids = np.asarray(found["input_ids"], np.int64)
    vocabulary = vocabulary_size(config)
    if len(ids) and (ids.min() < 0 or ids.max() >= vocabulary):
        raise DataError(
            f"token id {ids.max()} of data.source = '{rows.section.source}' is outside the model's vocabulary of "
            f"{vocabulary} tokens: model.tokenizer belongs to another model"
        )
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    if "token_type_ids" in found and getattr(config, "type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = np.asarray(found["token_type_ids"], np.int64)
    return inputs, cut


def _texts(rows: Rows, record: Mapping[str, Any], place: str) -> list[str]:
    names = rows.section.text_columns or [rows.section.text_field]
    for name in names:
        column(record, name, "data.text_columns", place)
    return [text_of(record, name, place) for name in names]


def labelled_texts(section: DataSection, model: ModelSection, source: Source) -> Samples:
    """Read texts, or pairs of texts, and their labels. Collective: no. Raises DataError."""
    require_positions(section, source)
    rows, labels = Rows(section, model, source), Labels(source.hf_config)
    name = section.label_column or "label"

    def examples() -> Iterator[Example]:
        for record, place in rows:
            label = labels(column(record, name, "data.label_column", place), f"{place}, column '{name}'")
            if label is not None:
                inputs, cut = encoded(rows, _texts(rows, record, place))
                if len(inputs["input_ids"]):
                    yield Example(inputs, label, place, cut)

    return finished(rows, labels, examples())


def finished(rows: Rows, labels: Labels, examples: Iterator[Example]) -> Samples:
    """Return the samples of classifiers. Raises DataError."""
    samples = rows.samples(examples)
    findings = list(samples.findings)
    if labels.left_out:
        findings.append(noted("data.mask", f"{labels.left_out} samples without a label (-1) are left out"))
    return replace(samples, loss=labels.loss, num_classes=labels.count, findings=findings)


def text_to_text(section: DataSection, model: ModelSection, source: Source) -> Samples:
    """Read texts and the texts that they are to become. Collective: no. Raises DataError."""
    require_positions(section, source)
    rows = Rows(section, model, source)
    name = section.label_column or "target"

    def examples() -> Iterator[Example]:
        for record, place in rows:
            column(record, name, "data.label_column", place)
            target, more = encoded(rows, [text_of(record, name, place)], target=True)
            inputs, cut = encoded(rows, _texts(rows, record, place))
            if len(inputs["input_ids"]) and len(target["input_ids"]):
                yield Example(inputs, target["input_ids"], place, cut + more)

    return replace(rows.samples(examples()), num_classes=vocabulary_size(source.hf_config))
