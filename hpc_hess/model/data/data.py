"""Token rows with global ids, and their division into the same number of micro-batches on every rank."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from hpc_hess.config import DataSection, ModelSection
from hpc_hess.errors import DataError
from hpc_hess.intake.findings import Finding, noted, passed
from hpc_hess.intake.masks import IGNORED
from hpc_hess.model.data.documents import Document, Reading, documents, spec_of
from hpc_hess.model.data.tokenizer import LazyTokenizer
from hpc_hess.model.sharded.loss import CausalLMObjective, MicroBatch, shifted_targets
from hpc_hess.model.sharded.skeleton import max_positions, vocabulary_size
from hpc_hess.model.sources.source import Source


@dataclass(frozen=True)
class Samples:
    """The data set: row i is sample i on any number of ranks.

    ``input_ids``, ``labels``, ``attention_mask`` : [n, L] int64 with L the longest row; labels are the ids themselves,
    -100 on padding and where the data say so (shifting is the loss's work, so a row's first token is never a target).
    ``places`` : the line or row of the source that each row comes from; empty where rows are packed.
    ``num_tokens`` : predicted tokens in the whole set. ``fingerprint`` : sha256 of rows and masks.
    ``notes`` : what a user should know (fewer rows than asked for, a padded last row). ``findings`` : of the intake.
    ``alone`` : the model minds padding, so micro-batches have one row each, at its own length. ``commit`` : of the Hub.
    ``truncated`` : rows that are cut after ``sequence_length`` tokens.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    attention_mask: torch.Tensor
    num_tokens: int
    fingerprint: str
    notes: list[str] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    alone: bool = False
    commit: str = ""
    truncated: int = 0

    def __len__(self) -> int:
        return len(self.input_ids)


def load_samples(section: DataSection, model: ModelSection, source: Source) -> Samples:
    """Read, tokenise and cut the data of ``section`` for the model of ``source``. Collective: no.

    ``rows = "pack"`` joins the documents (the tokenizer's own special tokens kept, its end token between documents) and
    cuts rows of ``sequence_length``, the last one shorter if the data end there; ``rows = "pad"`` takes a row per
    document (text: per non-blank line), truncated. Rows shorter than two tokens predict nothing and are skipped.

    Raises
    ------
    DataError : the data cannot be read, are empty, have ids outside the vocabulary, need a tokenizer the source lacks,
        or ``sequence_length`` is beyond the model's positions.

    """
    longest = max_positions(source.hf_config)
    if longest is not None and section.sequence_length > longest:
        raise DataError(
            f"data.sequence_length = {section.sequence_length} is longer than the model's {longest} positions: "
            f"set it to {longest} or less"
        )
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
    return Samples(input_ids, labels, attention_mask, num_tokens, digest.hexdigest(), notes, places, truncated=truncated)


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


def micro_batches(samples: Samples, rank: int, size: int, micro_batch: int) -> list[MicroBatch]:
    """Return rank ``rank``'s micro-batches: sample i belongs to rank i % size. Collective: no.

    Every rank gets the same number of micro-batches with the same number of rows; where it has no sample left, a
    dummy row stands in (id -1, sample 0's tokens, all labels -100, so it weighs nothing). Samples that must stay ``alone``
    come one by one, without padding.
    """
    if samples.alone:
        micro_batch = 1
    per_rank = -(-len(samples) // size)
    ids = [rank + k * size if rank + k * size < len(samples) else -1 for k in range(per_rank)]
    return [_micro_batch(samples, ids[start : start + micro_batch]) for start in range(0, per_rank, micro_batch)]


def _micro_batch(samples: Samples, ids: list[int]) -> MicroBatch:
    rows = torch.tensor([max(i, 0) for i in ids])
    labels = samples.labels[rows].clone()
    labels[torch.tensor([i < 0 for i in ids])] = IGNORED
    length = int(samples.attention_mask[rows].sum(1).max()) if samples.alone else samples.input_ids.shape[1]
    return MicroBatch(ids, samples.input_ids[rows, :length], samples.attention_mask[rows, :length], labels[:, :length])


def objective_of(
    samples: Samples, rows: Sequence[int], rank: int, size: int, micro_batch: int, device: torch.device
) -> CausalLMObjective:
    """Return the mean loss over some samples (a batch); rank ``rank``'s part of them. Collective: no."""
    chosen = list(rows)
    part = replace(
        samples,
        input_ids=samples.input_ids[chosen],
        labels=samples.labels[chosen],
        attention_mask=samples.attention_mask[chosen],
    )
    batches = micro_batches(part, rank, size, micro_batch)
    for batch in batches:  # an error should name the sample of the data set
        batch.sample_ids = [chosen[i] if i >= 0 else -1 for i in batch.sample_ids]
    return CausalLMObjective(batches, int((shifted_targets(part.labels) != IGNORED).sum()), device)


def one_example(samples: Samples, index: int, *, dummy: bool = False) -> MicroBatch:
    """Return one sample without its padding; as a ``dummy`` it predicts nothing. Collective: no."""
    length = int(samples.attention_mask[index].sum())
    batch = _micro_batch(samples, [index])
    labels = torch.full_like(batch.labels, IGNORED) if dummy else batch.labels
    return MicroBatch(
        [-1 if dummy else index], batch.input_ids[:, :length], batch.attention_mask[:, :length], labels[:, :length]
    )


def idle_ranks_note(num_samples: int, size: int) -> str | None:
    """Return a warning if some ranks have no sample, else None; to be shown once."""
    if num_samples >= size:
        return None
    return (
        f"{size} ranks share {num_samples} sequences: {size - num_samples} ranks compute dummies of zero weight; "
        "raise data.sequences or use fewer ranks"
    )
