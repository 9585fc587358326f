"""Which tokens a masked language model predicts: chosen by a seed, or given by the data as labels."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from hpc_hess.config import DataSection, ModelSection
from hpc_hess.errors import DataError, ModelError
from hpc_hess.intake.findings import noted, passed
from hpc_hess.intake.masks import IGNORED
from hpc_hess.model.data.data import Samples, next_tokens, require_positions
from hpc_hess.model.data.documents import spec_of
from hpc_hess.model.data.examples import Example, Record, Rows
from hpc_hess.model.data.tokenizer import LazyTokenizer
from hpc_hess.model.sharded.skeleton import vocabulary_size
from hpc_hess.model.sources.source import Source

_MASKED, _RANDOM = 0.8, 0.1  # of the predicted tokens, as BERT was trained; the rest stay as they are


def masked_tokens(section: DataSection, model: ModelSection, source: Source) -> Samples:
    """Read rows of tokens and choose those that are predicted; records with input_ids and labels say so themselves.

    Rows are made as for a causal LM. A choice depends on `data.mask_seed`, the row's number and the place in it. Collective:
    no.

    Raises
    ------
    DataError : no tokenizer with a mask token, nothing is predicted; as a causal LM's data. ModelError : a decoder.

    """
    if getattr(source.hf_config, "is_decoder", False):
        raise ModelError(
            f'{source.path} is a causal language model ("is_decoder" in config.json): set model.task = "causal-lm", or '
            '"is_decoder": false'
        )
    if given := _given(section, model, source):
        return given
    samples = next_tokens(section, model, source)
    tokenizer = LazyTokenizer(model, source)
    if tokenizer.mask is None:
        raise DataError(
            f'model.task = "masked-lm" needs a mask token, which the tokenizer of {source.path} has not: set '
            "model.tokenizer to one that has, or give records with input_ids and labels"
        )
    labels = _chosen(samples, section, torch.tensor(sorted(tokenizer.special_ids)))
    if not bool((labels != IGNORED).any()):
        raise DataError(f"data.masked = {section.masked} leaves no token that is predicted: raise it, or data.sequences")
    ids = _replaced(samples, labels, section, tokenizer.mask, vocabulary_size(source.hf_config))
    count = int((labels != IGNORED).sum())
    note = noted(
        "data.mask",
        f"{count} tokens are predicted, chosen by data.mask_seed = {section.mask_seed}: 80 % of them are masked, 10 % are "
        "random tokens",
    )
    return replace(
        samples,
        inputs={**samples.inputs, "input_ids": ids},
        labels=labels,
        num_tokens=count,
        task=model.task,
        fingerprint=hashlib.sha256(ids.numpy().tobytes() + labels.numpy().tobytes()).hexdigest(),
        findings=[passed("data.source", f"{len(samples)} rows"), *samples.findings[1:], note],
    )


def _numbers(samples: Samples, section: DataSection, purpose: int) -> Iterator[np.ndarray]:
    """Yield a uniform random number for each token of each row."""
    for row in range(len(samples)):
        yield np.random.default_rng([section.mask_seed, purpose, row]).random(samples.input_ids.shape[1])


def _chosen(samples: Samples, section: DataSection, special: torch.Tensor) -> torch.Tensor:
    """Return the ids of the tokens that are predicted, -100 elsewhere."""
    drawn = torch.from_numpy(np.stack(list(_numbers(samples, section, 0))))
    may = (samples.attention_mask == 1) & (samples.labels != IGNORED) & ~torch.isin(samples.input_ids, special)
    return samples.input_ids.masked_fill(~(may & (drawn < section.masked)), IGNORED)


def _replaced(samples: Samples, labels: torch.Tensor, section: DataSection, mask: int, vocabulary: int) -> torch.Tensor:
    """Return what the model sees in the place of the ids."""
    drawn = torch.from_numpy(np.stack(list(_numbers(samples, section, 1))))
    other = torch.from_numpy((np.stack(list(_numbers(samples, section, 2))) * vocabulary).astype(np.int64))
    chosen = labels != IGNORED
    ids = samples.input_ids.masked_fill(chosen & (drawn < _MASKED), mask)
    return torch.where(chosen & (drawn >= _MASKED) & (drawn < _MASKED + _RANDOM), other, ids)


def _given(section: DataSection, model: ModelSection, source: Source) -> Samples | None:
    """Return the samples of records with input_ids and labels, None where the first record has not both."""
    if not spec_of(section.source)[0].has_columns:
        return None
    rows = Rows(section, model, source)
    records = iter(rows)
    first = next(records, None)
    if first is None or not {"input_ids", "labels"} <= first[0].keys():
        return None
    require_positions(section, source)
    vocabulary = vocabulary_size(source.hf_config)
    found = rows.samples(_example(record, section, vocabulary) for record in itertools.chain([first], records))
    return replace(found, num_classes=vocabulary)


def _example(record: Record, section: DataSection, vocabulary: int) -> Example:
    columns, place = record
    names = ["input_ids", "labels", *(["attention_mask"] if "attention_mask" in columns else [])]
    try:
        ids, labels, *mask = (np.asarray(columns[name], np.int64) for name in names)
    except (TypeError, ValueError, KeyError):
        raise DataError(f"{place}: {', '.join(names)} should be lists of whole numbers, in every record") from None
    if ids.ndim != 1 or any(other.shape != ids.shape for other in (labels, *mask)):
        raise DataError(f"{place}: {', '.join(names)} should be lists of one length")
    outside = [int(i) for i in [*ids, *labels[labels != IGNORED]] if not 0 <= i < vocabulary]
    if outside:
        raise DataError(f"{place} holds the id {outside[0]}, outside the model's vocabulary of {vocabulary} tokens")
    length = section.sequence_length
    attention = mask[0] if mask else np.ones_like(ids)
    inputs = {"input_ids": ids[:length], "attention_mask": attention[:length]}
    return Example(inputs, np.where(attention == 1, labels, IGNORED)[:length], place, max(0, len(ids) - length))
