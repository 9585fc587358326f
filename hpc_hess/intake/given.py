"""What the Python interface was given: one sentence for each thing that cannot be computed with, before the first product.

Functions return what is to be used: numbers, patterns, a list of batches, a dictionary of token tensors, a loss, a vector.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from hpc_hess.errors import ConfigError, DataError, ModelError, NumericsError
from hpc_hess.intake.findings import Finding, noted

_HALF = (torch.bfloat16, torch.float16)
_TOKENS = ("input_ids", "attention_mask", "labels")
_OTHER_OUTPUTS = ("use_cache", "return_dict", "output_hidden_states", "output_attentions")  # of the same function
ROUNDED = (
    "finite differences cannot be computed in half precision: the forward pass rounds the step away (measured error over "
    '40 % at every step size); take the model to float32, or use method = "exact", which takes no step'
)

# -- arguments -----------------------------------------------------------------------------------------------------------


def one_of(name: str, value: Any, choices: Iterable[str]) -> str:
    """Return ``value``, which must be one of ``choices``. Raises ConfigError."""
    choices = list(choices)
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(f"{name} = {value!r} is not one of: {', '.join(choices)}")
    return value


def whole(name: str, value: Any, least: int = 1) -> int:
    """Return a whole number of at least ``least``. Raises ConfigError."""
    number: Any = value if isinstance(value, numbers.Real) and not isinstance(value, bool) else math.nan
    if not (number == number // 1 and number >= least):
        raise ConfigError(f"{name} = {value!r} is not a whole number of at least {least}")
    return int(number)


def real(name: str, value: Any, least: float = -math.inf) -> float:
    """Return a finite number of at least ``least``. Raises ConfigError."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value) or value < least:
        above = f" of at least {least:g}" if least > -math.inf else ""
        raise ConfigError(f"{name} = {value!r} is not a finite number{above}")
    return float(value)


def share(name: str, value: Any) -> float:
    """Return a number between 0 and 1, without the ends. Raises ConfigError."""
    if not 0 < real(name, value) < 1:
        raise ConfigError(f"{name} = {value!r} is not between 0 and 1")
    return float(value)


def numbers_of(name: str, value: Any) -> np.ndarray:
    """Return one or several finite numbers, float64 [n]. Raises ConfigError."""
    try:
        found = np.atleast_1d(np.asarray(value, np.float64))
    except (TypeError, ValueError):
        found = np.full(1, np.nan)
    if found.ndim != 1 or not np.isfinite(found).all():
        raise ConfigError(f"{name} = {value!r} is not a list of finite numbers")
    return found


def patterns(name: str, value: Any) -> list[str]:
    """Return globs over parameter names: one, or several. Raises ConfigError."""
    found = [value] if isinstance(value, str) else list(value)
    if not all(isinstance(pattern, str) for pattern in found):
        raise ConfigError(f"{name} = {value!r} is not a list of patterns over parameter names")
    return found


def model(module: Any) -> None:
    """See that there is a model to differentiate. Raises ModelError."""
    if not isinstance(module, nn.Module):
        raise ModelError(f"the model is a {type(module).__name__}, not a torch.nn.Module")
    for name, p in module.named_parameters():
        if isinstance(p, nn.parameter.UninitializedParameter):
            raise ModelError(f"parameter '{name}' has no shape yet: run the model once before")
        if p.is_meta:
            raise ModelError(f"parameter '{name}' is on the meta device and has no values: load the model's weights")
        if p.is_complex():
            raise ModelError(f"parameter '{name}' is complex, and the Hessian is that of a function of real numbers")


def entries(v: Any) -> int:
    """Return how many entries a vector has, -1 where it is none."""
    try:
        return int(v.numel() if isinstance(v, torch.Tensor) else np.size(v))
    except (TypeError, ValueError):
        return -1


def function(f: Any) -> str:
    """Return words that tell a function from another, on all ranks alike: its name, and a digest of its code."""
    code = getattr(f, "__code__", None)
    name = getattr(f, "__qualname__", type(f).__name__)
    if code is None:
        return "None" if f is None else name
    constants = [
        sorted(map(repr, c)) if isinstance(c, frozenset) else c for c in code.co_consts if not hasattr(c, "co_code")
    ]
    text = repr((code.co_code, code.co_names, code.co_varnames, constants))
    return f"{name} ({hashlib.sha256(text.encode()).hexdigest()[:8]})"


def vector(v: Any, size: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.dtype]:
    """Return ``v`` as a flat tensor [size] of ``dtype`` on ``device``, and the type in which a product is to be returned.

    That is the vector's own where it is float32 or float64, else ``dtype``.

    Raises
    ------
    ConfigError : it has another size, it is complex, or it is not made of numbers. NumericsError : it is not finite.

    """
    try:
        tensor = torch.as_tensor(v if isinstance(v, torch.Tensor) else np.ascontiguousarray(v)).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"the operator acts on vectors of numbers, not on a {type(v).__name__}") from error
    if tensor.is_complex():
        raise ConfigError("the operator is real: multiply the real and the imaginary part of a complex vector apart")
    if tensor.numel() != size:
        raise ConfigError(f"the operator acts on {size} entries, the vector has {tensor.numel()}")
    flat = tensor.reshape(-1).to(device, dtype)
    if not bool(torch.isfinite(flat).all()):
        raise NumericsError(f"the vector has entries that are not finite in {str(dtype).removeprefix('torch.')}")
    return flat, tensor.dtype if tensor.dtype in (torch.float32, torch.float64) else dtype


# -- batches -------------------------------------------------------------------------------------------------------------


def named(value: Any) -> str:
    """Return what kind of thing was given, after "is"."""
    return "None" if value is None else f"a {type(value).__name__}"


def takes(module: nn.Module, key: str) -> bool:
    """Whether a model's forward names the argument ``key``, or hands its keywords on to a part that does."""
    parameters = inspect.signature(module.forward).parameters
    if key in parameters:
        return True
    anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return anything and any(takes(child, key) for child in module.children())


def _rows(value: Any, where: str) -> torch.Tensor:
    """Return numbers given in any form as a tensor; one row of them as a matrix."""
    if isinstance(value, list | tuple):
        lengths = {len(row) if hasattr(row, "__len__") else -1 for row in value if getattr(row, "ndim", 1)}
        if len(lengths) > 1:
            raise DataError(f"{where} has rows of different lengths: pad them, with an attention_mask, or give single rows")
        value = torch.stack(list(value)) if value and isinstance(value[0], torch.Tensor) else np.array(value)
    try:
        if not isinstance(value, torch.Tensor):
            value = np.array(value)  # a copy: arrays of files are not writable, and some run backwards
            value = value.astype(value.dtype.newbyteorder("="))
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{where} is no matrix of numbers, rows by tokens") from error
    return tensor[None] if tensor.ndim == 1 else tensor


def token_batch(batch: Any, number: int, module: nn.Module | None) -> tuple[dict[str, Any], list[Finding]]:
    """Return the arguments of a causal LM, and "labels", from one batch; and what is to be noted about it.

    A batch is a dictionary, or the ids alone: [rows, tokens] or one row, as a tensor, an array or a list.

    Raises
    ------
    DataError : what it holds cannot be used; says which key of which batch.

    """
    where, notes = f"batch {number}", list[Finding]()
    if isinstance(batch, tuple) and len(batch) == 1:
        batch = batch[0]
    if isinstance(batch, list) and any(getattr(part, "ndim", 0) > 1 for part in batch):  # as loaders of a TensorDataset
        if len(batch) > 1:
            raise DataError(
                f"{where} is a list of {len(batch)} tensors: say what they are, {{'input_ids': ..., 'labels': ...}}"
            )
        batch = batch[0]
    if isinstance(batch, list) and batch and all(isinstance(part, Mapping) for part in batch):
        raise DataError(
            f"{where} is a list of {len(batch)} dictionaries: give each as a batch, or collate them into one, padded, with "
            "an attention_mask"
        )
    if isinstance(batch, tuple) or not isinstance(batch, Mapping | torch.Tensor | np.ndarray | list):
        raise DataError(
            f"{where} is {named(batch)}: without a loss of your own a batch is a dictionary with input_ids, or the ids"
        )
    given: dict[str, Any] = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
    if given.get("input_ids") is None:
        raise DataError(f"{where} has no input_ids, but {', '.join(map(str, given)) or 'nothing'}: tokens are needed")
    found: dict[str, Any] = {}
    for key, value in given.items():
        if value is None or key in _OTHER_OUTPUTS:
            continue
        if key not in _TOKENS and (key in ("inputs_embeds", "past_key_values") or module is None or not takes(module, key)):
            if key == "token_type_ids" and not np.any(np.asarray(value)):
                continue  # many tokenizers add them; all zero they say nothing
            what = (
                "cannot be used beside input_ids"
                if key in ("inputs_embeds", "past_key_values")
                else (f"is no argument of {type(module).__name__}'s forward")
            )
            raise DataError(f"'{key}' of {where} {what}: remove it, or give a loss of your own that uses it")
        plain = isinstance(value, bool | int | float | str)
        found[key] = value if plain and key not in _TOKENS else _rows(value, f"'{key}' of {where}")
    ids = found["input_ids"]
    if ids.ndim != 2 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise DataError(f"'input_ids' of {where} are {_shown(ids)}: whole numbers, rows by tokens, are needed")
    found["input_ids"] = ids = ids.long()
    for key in ("attention_mask", "labels"):
        if key in found and found[key].shape != ids.shape:
            raise DataError(f"'{key}' of {where} has shape {list(found[key].shape)}, its input_ids {list(ids.shape)}")
    if "labels" in found and (found["labels"].is_floating_point() or found["labels"].is_complex()):
        raise DataError(f"'labels' of {where} are {_shown(found['labels'])}: token numbers are needed, or -100")
    _in_vocabulary(found, where, module)
    if "labels" in found:
        found["labels"] = found["labels"].long()
    if "attention_mask" in found:
        mask = found["attention_mask"]
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise DataError(
                f"'attention_mask' of {where} has values other than 0 and 1: documents that are packed into one row are "
                "told apart by position_ids that begin anew"
            )
        found["attention_mask"] = mask.long()
        if bool((mask[:, 0] == 0).any()) and "position_ids" not in found:
            if module is not None and takes(module, "position_ids"):
                found["position_ids"] = (found["attention_mask"].cumsum(1) - 1).clamp_min(0)
                notes.append(noted("given.positions", "rows are padded on the left: positions are counted from the mask"))
            else:
                notes.append(noted("given.positions", "rows are padded on the left: the model counts positions on its own"))
    return found, notes


def classified(batch: Any, number: int, num_classes: int) -> tuple[Any, torch.Tensor]:
    """Return the inputs of one batch and its class numbers 0..num_classes-1, int64 (n,).

    Raises
    ------
    DataError : it is no pair, or its targets are no class numbers.

    """
    where = f"batch {number}"
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise DataError(f"{where} is {named(batch)}: a pair of inputs and class numbers is needed")
    inputs, targets = batch
    targets = torch.as_tensor(targets)
    if targets.ndim != 1:
        hint = ": give the class numbers of one-hot rows, targets.argmax(1)" if targets.ndim == 2 else ""
        raise DataError(f"the targets of {where} have shape {list(targets.shape)}, not one number an example{hint}")
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise DataError(f"the targets of {where} are {_shown(targets)}: whole class numbers are needed")
    if len(targets) and not (int(targets.min()) >= 0 and int(targets.max()) < num_classes):
        raise DataError(f"{where} has class numbers outside 0 to {num_classes - 1}: count the classes again")
    return inputs, targets.long()


def _shown(t: torch.Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} of shape {list(t.shape)}"


def _in_vocabulary(found: dict[str, Any], where: str, module: nn.Module | None) -> None:
    """Refuse token numbers that an embedding or a loss would read past its end for."""
    try:
        size = module.get_input_embeddings().weight.shape[0]  # type: ignore[union-attr, operator]
    except (AttributeError, NotImplementedError):
        size = None
    for key, least in (("input_ids", 0), ("labels", -100)):
        t = found.get(key)
        if t is None or not t.numel():
            continue
        low, high = int(t.min()), int(t.max())
        wrong = (t < 0) & (t != -100) if key == "labels" else t < 0
        if low < least or bool(wrong.any()):
            raise DataError(f"'{key}' of {where} hold {int(t[wrong].min())}, which is no token")
        if size is not None and high >= size:
            raise DataError(f"'{key}' of {where} hold token {high}, and the model's vocabulary has {size}")


# -- losses --------------------------------------------------------------------------------------------------------------


def loss_value(value: Any, number: int) -> tuple[torch.Tensor, float]:
    """Return the scalar and the weight that loss(model, batch) gave for batch ``number``: a scalar, or (sum, weight).

    Raises
    ------
    DataError : it gave something else.

    """
    where, weight = f"loss(model, batch) of batch {number}", 1.0
    if isinstance(value, tuple):
        if len(value) != 2:
            raise DataError(f"{where} returns {len(value)} things: a scalar is needed, or a pair (sum, weight)")
        value, given = value
        if isinstance(given, torch.Tensor) and given.requires_grad:
            raise DataError(f"{where} returns a weight that depends on the parameters: a weight must be a constant")
        try:
            weight = float(given)
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(f"{where} returns a weight that is not a number, but a {type(given).__name__}") from error
        if not 0 <= weight < math.inf:
            raise DataError(f"{where} returns the weight {weight}: weights are finite and not negative")
    if isinstance(value, Mapping) or hasattr(value, "logits"):
        raise DataError(f"{where} returns a {type(value).__name__}: return its loss, a scalar tensor")
    if not isinstance(value, torch.Tensor):
        raise DataError(f"{where} returns {named(value)}: a scalar tensor is needed")
    if value.numel() != 1:
        shape = list(value.shape)
        raise DataError(f"{where} returns a tensor of shape {shape}: return its mean, or its sum and the number of terms")
    if not value.is_floating_point():
        raise DataError(f"{where} returns a tensor of {str(value.dtype).removeprefix('torch.')}: a real number is needed")
    return value.reshape(()), weight


def walked(loss: torch.Tensor) -> tuple[dict[int, torch.Tensor] | None, bool]:
    """Return the leaves that ``loss`` depends on, by identity, and whether anything on the way is in half precision.

    None for the leaves where a recomputed part (reentrant checkpointing) hides some.
    """
    leaves, half, hidden, seen, todo = dict[int, torch.Tensor](), False, False, set[Any](), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        half |= any(meta.dtype in _HALF for meta in getattr(node, "_input_metadata", []))
        hidden |= "CheckpointFunction" in node.name()
        if hasattr(node, "variable"):
            leaves[id(node.variable)] = node.variable
        todo.extend(after for after, _ in node.next_functions)
    return None if hidden else leaves, half
