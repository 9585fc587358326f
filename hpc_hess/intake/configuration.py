"""A configuration that transformers cannot build or run, in one sentence with the keys and values in question."""

from __future__ import annotations

import contextlib
import re
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from hpc_hess.errors import HpcHessError, ModelError
from hpc_hess.parallel.devices import is_of_collectives

_WORDS = re.compile(r"[A-Za-z_][A-Za-z_0-9]{3,}")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_WIDTHS = ("hidden_size", "n_embd", "d_model", "dim")
_SIZES = ("vocab_size", "num_key_value_heads", "head_dim", "intermediate_size", *_LAYERS, *_HEADS, *_WIDTHS)
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")


def refuse_negative(values: Mapping[str, Any], path: Path) -> None:
    """Raise ModelError for a size below zero: a negative number of layers would build a model without any."""
    for key in _SIZES:
        value = values.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value < 0:
            raise ModelError(f"{path} has {key} = {value}, which should not be negative: correct it")


def why(error: BaseException, values: Mapping[str, Any]) -> str:
    """Return one line: what transformers says, and the keys and values that it is about, as far as they can be told."""
    text = " ".join(" ".join(str(error).split()).split(" ", 60)[:60]) or type(error).__name__
    if isinstance(error, KeyError | AttributeError | ZeroDivisionError | AssertionError | IndexError) and ":" not in text:
        text = f"{type(error).__name__}: {text}"
    keys = [] if isinstance(error, OSError) or "transformers_modules" in text else suspects(text, values)
    return text.rstrip(".") + (f" (config.json has {', '.join(f'{k} = {values[k]!r}' for k in keys)})" if keys else "")


def suspects(text: str, values: Mapping[str, Any], most: int = 6) -> list[str]:
    """Return the keys of a configuration that an error is most likely about: named in it, or plainly wrong, or sizes."""
    named = [word for word in dict.fromkeys(_WORDS.findall(text)) if word in values]
    quoted = {word for words in re.findall(r"'([^']+)'|\"([^\"]+)\"|`([^`]+)`", text) for word in words if word}
    named += [key for key, value in values.items() if any(f"'{word}'" in repr(value) for word in quoted)]
    found = list(dict.fromkeys([*named, *_wrong(values)]))
    if not found and "model_type" in text:
        return []
    return (found or [key for key in _SIZES if key in values])[:most]


def _wrong(values: Mapping[str, Any]) -> list[str]:
    """Return keys whose values do not go together."""

    def first(keys: tuple[str, ...]) -> tuple[str, int] | None:
        return next(((k, values[k]) for k in keys if isinstance(values.get(k), int)), None)

    found: list[str] = []
    vocabulary, heads, width = values.get("vocab_size"), first(_HEADS), first(_WIDTHS)
    if isinstance(vocabulary, int):
        beyond = [k for k in _TOKENS if isinstance(values.get(k), int) and values[k] >= vocabulary]
        found += [*beyond, "vocab_size"] if beyond else []
    found += [k for k in _SIZES if isinstance(values.get(k), int) and values[k] <= 0 and values[k] is not False]
    groups = values.get("num_key_value_heads")
    if heads and isinstance(groups, int) and (groups <= 0 or heads[1] % groups):
        found += [heads[0], "num_key_value_heads"]
    if heads and width and heads[1] > 0 and width[1] % heads[1] and not isinstance(values.get("head_dim"), int):
        found += [width[0], heads[0]]
    if isinstance(values.get("head_dim"), int) and values["head_dim"] % 2:
        found.append("head_dim")
    known = _activations()
    found += [k for k in _ACTIVATIONS if known and isinstance(values.get(k), str) and values[k] not in known]
    rope = values.get("rope_parameters") or values.get("rope_scaling")
    if isinstance(rope, dict) and not isinstance(rope.get("rope_type", rope.get("type", "default")), str):
        found.append("rope_parameters" if "rope_parameters" in values else "rope_scaling")
    return found


def _activations() -> Mapping[str, Any]:
    try:
        from transformers.activations import ACT2FN

        return ACT2FN
    except ImportError:
        return {}


def code_at_fault(error: BaseException) -> Path | None:
    """Return the file of a model's own code in which an error arose, or that could not be imported, else None."""
    frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    return next((Path(name) for name in reversed(frames) if "transformers_modules" in Path(name).parts), None)


def refuse_code(error: BaseException, path: Path) -> None:
    """Raise ModelError where an error comes from a model's own code, or from a package that is not installed."""
    own = code_at_fault(error)
    text = " ".join(str(error).split()[:60])
    remedy = "where transformers has a class of its own, model.trust_remote_code = false takes that"
    if isinstance(error, ImportError):
        if (error.name or "").split(".")[0] == "transformers":
            of = f" ({own.name})" if own else ""
            raise ModelError(
                f"the code of {path}{of} was written for another version of transformers ({text}): {remedy}"
            ) from None
        raise ModelError(f"{path} needs a package that is not installed: {text}") from None
    if own is not None:
        raise ModelError(
            f"the code of {path} ({own.name}) failed, perhaps written for another version of transformers "
            f"({type(error).__name__}: {text}): {remedy}"
        ) from None


@contextlib.contextmanager
def running(path: Path, values: Mapping[str, Any]) -> Iterator[None]:
    """Turn an error of a model's forward pass into a sentence about its configuration. Local.

    Errors of this program, of memory and of collectives pass unchanged.

    Raises
    ------
    ModelError : with the keys and values in question.

    """
    try:
        yield
    except (HpcHessError, torch.OutOfMemoryError, MemoryError, torch.distributed.DistError):
        raise
    except Exception as error:
        if is_of_collectives(str(error)) or "allocate" in str(error):
            raise
        own = code_at_fault(error)
        where = f" (in its own code, {own.name})" if own else ""
        raise ModelError(f"the model of {path} cannot compute a forward pass{where}: {why(error, values)}") from error
