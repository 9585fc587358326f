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
    if count:
        lines.append(f"the loss is over the tokens in {'bold green' if coloured else 'brackets'}")
    tokenizer = LazyTokenizer(config.model, source)
    for row in range(min(count, len(samples))):
        place = f" ({samples.places[row]})" if samples.places else ""
        lines += ["", f"-- sequence {row}{place}", shown(samples, row, tokenizer, marks)]
    print(printable("\n".join(lines), out), file=out)
    return 0


def counts(samples: Samples) -> str:
    """Return how many sequences, tokens and predicted tokens there are, and how many sequences are cut."""
    tokens = int(samples.attention_mask.sum())
    share = number(100 * samples.num_tokens / tokens, 3)
    return (
        f"{plural(len(samples), 'sequence')}, {plural(tokens, 'token')}, of which {samples.num_tokens:,} are predicted "
        f"({share} %); {plural(samples.truncated, 'sequence')} cut"
    )


def shown(samples: Samples, row: int, tokenizer: LazyTokenizer, marks: tuple[str, str]) -> str:
    """Return a sequence as text, predicted tokens between ``marks``; a line break is shown, and made."""
    ids = samples.input_ids[row][samples.attention_mask[row] == 1].tolist()
    predicted = [False, *(samples.labels[row, 1 : len(ids)] >= 0).tolist()]  # a first token has nothing before it
    text = ""
    for piece, marked in zip(tokenizer.pieces(ids[:_MOST]), predicted, strict=False):
        safe = "".join(letter if letter.isprintable() else _escaped(letter) for letter in piece)
        text += (safe.join(marks) if marked else safe) + "\n" * ("\n" in piece)
    more = len(ids) - _MOST
    return text + (f"\n... and {more:,} tokens more, of which {sum(predicted[_MOST:]):,} are predicted" if more > 0 else "")


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode()
