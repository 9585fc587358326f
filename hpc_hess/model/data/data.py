"""Token rows with global ids, and their division into the same number of micro-batches on every rank."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from hpc_hess.config import DataSection, ModelSection
from hpc_hess.errors import DataError
from hpc_hess.intake.findings import Finding, noted, passed
from hpc_hess.intake.masks import IGNORED
from hpc_hess.model.data.documents import Document, Reading, documents, spec_of
from hpc_hess.model.data.tokenizer import LazyTokenizer
from hpc_hess.model.sharded.loss import CausalLMObjective, LabelObjective, Loss, TokenObjective
from hpc_hess.model.sharded.micro_batch import Batch, LabelledBatch, MicroBatch, shifted_targets
from hpc_hess.model.sharded.skeleton import max_positions, vocabulary_size
from hpc_hess.model.sources.source import Source
from hpc_hess.registry.table import load
from hpc_hess.registry.tasks import TASKS


@dataclass(frozen=True)
class Samples:
    """The data set: row i is sample i on any number of ranks.

    ``inputs`` : what the model's forward takes of each row, by name: ``input_ids`` and ``attention_mask`` [n, L] int64 with
    L the longest row, or ``pixel_values`` [n, channels, height, width].
    ``labels`` : of a causal LM the ids themselves [n, L], -100 on padding and where the data say so (shifting is the loss's
    work, so a row's first token is never a target); of other tasks as model.sharded.micro_batch.LabelledBatch has them.
    ``task`` : of the registry. ``loss`` : of the labels. ``num_classes`` : values that a label may have.
    ``places`` : the line or row of the source that each row comes from; empty where rows are packed.
    ``num_tokens`` : predicted tokens, or labels, in the whole set. ``fingerprint`` : sha256 of rows and masks.
    ``notes`` : what a user should know (fewer rows than asked for, a padded last row). ``findings`` : of the intake.
    ``alone`` : the model minds padding, so micro-batches have one row each, at its own length. ``commit`` : of the Hub.
    ``truncated`` : rows that are cut after ``sequence_length`` tokens.
    """

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor
    num_tokens: int
    fingerprint: str
    notes: list[str] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    alone: bool = False
    commit: str = ""
    truncated: int = 0
    task: str = "causal-lm"
    loss: Loss = "cross_entropy"
    num_classes: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def input_ids(self) -> torch.Tensor:
        """The tokens [n, L]."""
        return self.inputs["input_ids"]

    @property
    def attention_mask(self) -> torch.Tensor:
        """1 for tokens, 0 for padding [n, L]."""
        return self.inputs["attention_mask"]

    @property
    def targets(self) -> torch.Tensor:
        """What logits are to predict, -100 (of numbers: nan) for nothing."""
        return shifted_targets(self.labels) if TASKS[self.task].next_token else self.labels

    def rows(self, chosen: Sequence[int]) -> Samples:
        """Return some of the samples; counts and fingerprint stay those of all."""
        inputs = {name: value[list(chosen)] for name, value in self.inputs.items()}
        return replace(self, inputs=inputs, labels=self.labels[list(chosen)])

    def objective(self, batches: Sequence[Batch], num_tokens: int, device: torch.device) -> LabelObjective:
        """Return the mean loss over micro-batches."""
        spec = TASKS[self.task]
        if spec.by_token:
            kind = CausalLMObjective if spec.next_token else TokenObjective
            return kind(batches, num_tokens, device)
        return LabelObjective(batches, num_tokens, device, self.loss)


def load_samples(section: DataSection, model: ModelSection, source: Source) -> Samples:
    """Read the data of ``section`` for the task and the model of ``source``. Collective: no.

    Raises
    ------
    DataError : the data cannot be read, are empty, or do not suit the task or the model. ModelError : the task.

    """
    samples: Samples = load(TASKS[model.task].samples)(section, model, source)
    return samples


def next_tokens(section: DataSection, model: ModelSection, source: Source) -> Samples:
    """Read, tokenise and cut the data of ``section`` for the causal LM of ``source``. Collective: no.

    ``rows = "pack"`` joins the documents (the tokenizer's own special tokens kept, its end token between documents) and
    cuts rows of ``sequence_length``, the last one shorter if the data end there; ``rows = "pad"`` takes a row per
    document (text: per non-blank line), truncated. Rows shorter than two tokens predict nothing and are skipped.

    Raises
    ------
    DataError : the data cannot be read, are empty, have ids outside the vocabulary, need a tokenizer the source lacks,
        or ``sequence_length`` is beyond the model's positions.

    """
    require_positions(section, source)
    tokenizer, findings = LazyTokenizer(model, source), list[Finding]()
    by_line = section.rows == "pad"
    commits: list[str] = []
    stream = documents(section.source, Reading(section, tokenizer, by_line, findings.append, commits.append))
    spec, _ = spec_of(section.source)
    if section.rows == "pack" and spec.has_masks:
        first = list(itertools.islice(stream, section.sequences))
        by_line = any(document.predicted is not None for document in first)
        stream = itertools.chain(first, stream)
        if by_line:
            findings.append(noted("data.mask", "the data have masks: each of their rows stays a row of its own, not packed"))
    if by_line:
        rows = list(_pad(stream, section.sequence_length, section.sequences))
    else:
        packed = _pack(_joined(stream, tokenizer, spec.separate), section.sequence_length, section.sequences)
        rows = [Document(row) for row in packed]
    samples = make_samples(rows, section, vocabulary_size(source.hf_config), tokenizer.padding)
    found = passed("data.source", f"{len(samples)} rows, {samples.num_tokens} predicted tokens")
    return replace(samples, findings=[found, *findings, *tokenizer.findings], commit="".join(commits[:1]))


def require_positions(section: DataSection, source: Source) -> None:
    """Raise DataError where rows may be longer than the model's positions. Collective: no."""
    longest = max_positions(source.hf_config)
    if longest is not None and section.sequence_length > longest:
        raise DataError(
            f"data.sequence_length = {section.sequence_length} is longer than the model's {longest} positions: "
            f"set it to {longest} or less"
        )


def text_samples(text: str, section: DataSection, model: ModelSection, source: Source) -> Samples:
    """Return all of a text as rows of at most ``sequence_length`` tokens. Collective: no. Raises as :func:`load_samples`."""
    tokenizer = LazyTokenizer(model, source)
    ids = np.asarray(tokenizer(text), dtype=np.int64)
    rows = [Document(row) for row in _pack([ids], section.sequence_length, len(ids))]
    named = section.model_copy(update={"source": "--text", "sequences": len(rows), "rows": "pad"})
    samples = make_samples(rows, named, vocabulary_size(source.hf_config), tokenizer.padding)
    return replace(samples, findings=tokenizer.findings)


def make_samples(rows: list[Document], section: DataSection, vocabulary: int, padding: int = 0) -> Samples:
    """Build Samples from rows, each of 2 to ``sequence_length`` tokens. Collective: no.

    Raises
    ------
    DataError : no rows, no token that is predicted, or a token id outside 0..vocabulary-1.

    """
    if not rows:
        raise DataError(f"data.source = '{section.source}' is empty: it has no row of at least two tokens")
    low, high = min(int(row.ids.min()) for row in rows), max(int(row.ids.max()) for row in rows)
    if low < 0 or high >= vocabulary:
        bad = low if low < 0 else high
        raise DataError(
            f"token id {bad} of data.source = '{section.source}' is outside the model's vocabulary of {vocabulary} "
            "tokens: the data, or model.tokenizer, belong to another model"
        )
    length = max(len(row.ids) for row in rows)
    padding = padding if 0 <= padding < vocabulary else 0
    input_ids = torch.full((len(rows), length), padding, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    predicted = torch.zeros_like(input_ids, dtype=torch.bool)
    for i, row in enumerate(rows):
        input_ids[i, : len(row.ids)] = torch.from_numpy(row.ids.copy())  # a mapped file is read-only
        attention_mask[i, : len(row.ids)] = 1
        predicted[i, : len(row.ids)] = True if row.predicted is None else torch.from_numpy(row.predicted.copy())
    labels = input_ids.masked_fill(~predicted, IGNORED)
    num_tokens = int((shifted_targets(labels) != IGNORED).sum())
    if not num_tokens:
        raise DataError(f"data.source = '{section.source}': the masks leave no token that is predicted")
    digest = hashlib.sha256(repr(tuple(labels.shape)).encode() + labels.numpy().tobytes())
    if any(row.predicted is not None for row in rows):
        digest.update(input_ids.masked_fill(attention_mask == 0, -1).numpy().tobytes())
    places = [row.place for row in rows] if all(row.place for row in rows) else []
    notes = _notes(rows, (shifted_targets(labels) != IGNORED).sum(1).tolist(), section)
    truncated = sum(row.cut > 0 for row in rows)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    return Samples(
        inputs, labels, num_tokens, digest.hexdigest(), notes, places, truncated=truncated, num_classes=vocabulary
    )


def _notes(rows: list[Document], predicted: list[int], section: DataSection) -> list[str]:
    notes = []
    if cut := [row.cut for row in rows if row.cut]:
        notes.append(
            f"{len(cut)} of {len(rows)} sequences are cut after data.sequence_length = {section.sequence_length} tokens, "
            f"by up to {max(cut)}"
        )
    if idle := predicted.count(0):
        notes.append(f"{idle} of {len(rows)} sequences have no token that is predicted: see them with hpc-hess data")
    if len(rows) < section.sequences:
        notes.append(f"the data give {len(rows)} sequences of the {section.sequences} asked for; all of them are used")
    if section.rows == "pack" and not any(row.place for row in rows) and len(rows[-1].ids) < section.sequence_length:
        notes.append(f"the data end within sequence {len(rows) - 1}, which has {len(rows[-1].ids)} tokens")
    return notes


def _joined(stream: Iterable[Document], tokenizer: LazyTokenizer, separate: bool) -> Iterator[np.ndarray]:
    """Yield the documents, with the tokenizer's end token between those that do not have one."""
    last = None
    for each in stream:
        if each.predicted is not None:
            raise DataError(f"{each.place} has a mask, which the first records have not: set data.rows = 'pad'")
        document = each.ids
        end = tokenizer.end if separate else None
        if end is not None and last not in (None, end):
            yield np.array([end], dtype=np.int64)
        yield document
        last = int(document[-1]) if len(document) else last


def _pack(stream: Iterable[np.ndarray], length: int, count: int) -> Iterator[np.ndarray]:
    """Cut a stream of ids into at most ``count`` rows of ``length``, the last one possibly shorter (at least two)."""
    held = np.empty(0, dtype=np.int64)
    given = 0
    for part in stream:
        held = np.concatenate([held, part])
        while len(held) >= length:
            yield held[:length]
            held = held[length:]
            given += 1
            if given == count:
                return
    if len(held) >= 2:
        yield held


def _pad(stream: Iterable[Document], length: int, count: int) -> Iterator[Document]:
    """Yield the first ``count`` documents of at least two tokens, truncated."""
    given = 0
    for document in stream:
        if len(document.ids) >= 2:
            predicted = None if document.predicted is None else document.predicted[:length]
            yield Document(document.ids[:length], predicted, document.place, max(0, len(document.ids) - length))
            given += 1
            if given == count:
                return


def micro_batches(samples: Samples, rank: int, size: int, micro_batch: int) -> list[Batch]:
    """Return rank ``rank``'s micro-batches: sample i belongs to rank i % size. Collective: no.

    Every rank gets the same number of micro-batches with the same number of rows; where it has no sample left, a
    dummy row stands in (id -1, sample 0's inputs, no label, so it weighs nothing). Samples that must stay ``alone``
    come one by one, without padding.
    """
    if samples.alone:
        micro_batch = 1
    per_rank = -(-len(samples) // size)
    ids = [rank + k * size if rank + k * size < len(samples) else -1 for k in range(per_rank)]
    return [batch_of(samples, ids[start : start + micro_batch]) for start in range(0, per_rank, micro_batch)]


def batch_of(samples: Samples, ids: list[int], *, cut: bool | None = None) -> Batch:
    """Return some samples as a micro-batch, -1 for a dummy; ``cut``: without common padding. Collective: no."""
    rows = torch.tensor([max(i, 0) for i in ids])
    labels = samples.labels[rows].clone()
    labels[torch.tensor([i < 0 for i in ids])] = math.nan if labels.is_floating_point() else IGNORED
    inputs = {name: value[rows] for name, value in samples.inputs.items()}
    if (samples.alone if cut is None else cut) and "attention_mask" in inputs:
        length, whole = int(inputs["attention_mask"].sum(1).max()), samples.attention_mask.shape[1]
        inputs = {name: value[:, :length] if value.shape[1:] == (whole,) else value for name, value in inputs.items()}
        if labels.ndim == 2 and not labels.is_floating_point():
            labels = labels[:, : length if TASKS[samples.task].by_token else max(1, int((labels != IGNORED).sum(1).max()))]
    return as_batch(samples.task, ids, inputs, labels)


def as_batch(task: str, ids: list[int], inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> Batch:
    """Return tensors of rows as a task's micro-batch; ``inputs`` is used up. Collective: no."""
    spec = TASKS[task]
    if spec.by_token:
        tokens, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
        return MicroBatch(ids, tokens, mask, labels, inputs, next_token=spec.next_token)
    if task == "seq2seq-lm":
        inputs["labels"] = labels  # which the model shifts, for its decoder
    return LabelledBatch(ids, inputs, labels)


def without_numbers(
    section: DataSection, model: ModelSection, hf_config: Any, rows: int, device: torch.device
) -> LabelObjective:
    """Return a micro-batch of ``rows`` samples whose shapes alone are right, as the objective. Collective: no."""
    spec, count = TASKS[model.task], section.sequences
    ids = torch.ones(rows, section.sequence_length, dtype=torch.int64)
    inputs, labels = {"input_ids": ids, "attention_mask": ids.clone()}, ids.clone()
    if spec.predicts == "token":
        count *= section.sequence_length - 1
    else:
        labels = torch.zeros(rows, dtype=torch.int64)
    if model.task == "image-classification":
        size = getattr(hf_config, "image_size", 224)
        sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
        inputs = {"pixel_values": torch.zeros(rows, getattr(hf_config, "num_channels", 3), *sides)}
    samples = Samples(inputs, labels, count, "", task=model.task)
    return samples.objective([as_batch(model.task, [*range(rows)], dict(inputs), labels)], count, device)


def objective_of(
    samples: Samples, rows: Sequence[int], rank: int, size: int, micro_batch: int, device: torch.device
) -> LabelObjective:
    """Return the mean loss over some samples (a batch); rank ``rank``'s part of them. Collective: no."""
    chosen = list(rows)
    part = samples.rows(chosen)
    batches = micro_batches(part, rank, size, micro_batch)
    for batch in batches:  # an error should name the sample of the data set
        batch.sample_ids = [chosen[i] if i >= 0 else -1 for i in batch.sample_ids]
    return samples.objective(batches, batch_of(part, [*range(len(part))]).num_tokens, device)


def one_example(samples: Samples, index: int, *, dummy: bool = False) -> MicroBatch:
    """Return one sample of tokens without its padding; as a ``dummy`` it predicts nothing. Collective: no."""
    batch = batch_of(samples, [index], cut=True)
    assert isinstance(batch, MicroBatch), "other tasks have no rows of tokens alone"
    if dummy:
        batch.sample_ids, batch.labels = [-1], torch.full_like(batch.labels, IGNORED)
    return batch


def idle_ranks_note(num_samples: int, size: int) -> str | None:
    """Return a warning if some ranks have no sample, else None; to be shown once."""
    if num_samples >= size:
        return None
    return (
        f"{size} ranks share {num_samples} sequences: {size - num_samples} ranks compute dummies of zero weight; "
        "raise data.sequences or use fewer ranks"
    )
