"""hpc-hess data: the first sequences as tokens, those marked that the loss is over. No weights are read. One process."""

from __future__ import annotations

import os
import sys
from typing import IO

from hpc_hess.config import Config
from hpc_hess.console.words import number, plural, printable
from hpc_hess.errors import ConfigError
from hpc_hess.model.data.data import Samples, load_samples
from hpc_hess.model.data.tokenizer import LazyTokenizer
from hpc_hess.model.sources.hub import reaching
from hpc_hess.model.sources.source import resolve_source
from hpc_hess.registry.tasks import TASKS

_MOST = 1024  # tokens of a sequence that are shown
_MARKED, _PLAIN = "\033[1;32m", "\033[0m"


def show_data(config: Config, count: int, stream: IO[str] | None = None) -> int:
    """Print what was found about the data, counts, and the first ``count`` sequences. Returns 0.

    Raises
    ------
    ConfigError : a negative count.
    ModelError, DataError : as for a run.

    """
    out = stream or sys.stdout
    if count < 0:
        raise ConfigError(f"--samples {count}: give at least 0")
    with reaching("small"):
        source = resolve_source(config.model)
        samples = load_samples(config.data, config.model, source)
    coloured = out.isatty() and not os.environ.get("NO_COLOR")
    marks = (_MARKED, _PLAIN) if coloured else ("[", "]")
    lines = [*(finding.line() for finding in samples.findings), *samples.notes, counts(samples)]
    if count and TASKS[samples.task].by_token:
        lines.append(f"the loss is over the tokens in {'bold green' if coloured else 'brackets'}")
    tokenizer = LazyTokenizer(config.model, source)
    show = shown if TASKS[samples.task].by_token else labelled
    for row in range(min(count, len(samples))):
        place = f" ({samples.places[row]})" if samples.places else ""
        lines += ["", f"-- sequence {row}{place}", show(samples, row, tokenizer, marks)]
    print(printable("\n".join(lines), out), file=out)
    return 0


def counts(samples: Samples) -> str:
    """Return how many sequences, tokens and predicted tokens there are, and how many sequences are cut."""
    if not TASKS[samples.task].by_token:
        what = f"{plural(len(samples), 'sample')}, {samples.num_tokens:,} {TASKS[samples.task].predicts}s that are predicted"
        return f"{what}; {plural(samples.truncated, 'sample')} cut" if "input_ids" in samples.inputs else what
    tokens = int(samples.attention_mask.sum())
    share = number(100 * samples.num_tokens / tokens, 3)
    return (
        f"{plural(len(samples), 'sequence')}, {plural(tokens, 'token')}, of which {samples.num_tokens:,} are predicted "
        f"({share} %); {plural(samples.truncated, 'sequence')} cut"
    )


def shown(samples: Samples, row: int, tokenizer: LazyTokenizer, marks: tuple[str, str]) -> str:
    """Return a sequence as text, predicted tokens between ``marks``; a line break is shown, and made."""
    ids = samples.input_ids[row][samples.attention_mask[row] == 1].tolist()
    predicted = (samples.labels[row, : len(ids)] >= 0).tolist()
    if TASKS[samples.task].next_token:
        predicted[0] = False  # which has nothing before it
    text = ""
    for piece, marked in zip(tokenizer.pieces(ids[:_MOST]), predicted, strict=False):
        safe = "".join(letter if letter.isprintable() else _escaped(letter) for letter in piece)
        text += (safe.join(marks) if marked else safe) + "\n" * ("\n" in piece)
    more = len(ids) - _MOST
    return text + (f"\n... and {more:,} tokens more, of which {sum(predicted[_MOST:]):,} are predicted" if more > 0 else "")


def labelled(samples: Samples, row: int, tokenizer: LazyTokenizer, marks: tuple[str, str]) -> str:
    """Return a sample and its label, the latter between ``marks``."""
    label = samples.labels[row]
    said = tokenizer.text(label[label >= 0].tolist()) if samples.task == "seq2seq-lm" else str(label.tolist())
    if "input_ids" in samples.inputs:
        text = tokenizer.text(samples.input_ids[row][samples.attention_mask[row] == 1][:_MOST].tolist())
    else:
        image = samples.inputs["pixel_values"][row]
        text = f"image {list(image.shape)}, from {number(float(image.min()), 3)} to {number(float(image.max()), 3)}"
    return "".join(letter if letter.isprintable() else _escaped(letter) for letter in text) + " -> " + said.join(marks)


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode()
