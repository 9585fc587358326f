"""What ranks tell each other: values as JSON and raw arrays. Unlike a pickle, a message cannot run code where it is read.

A message is the length of its JSON text (8 bytes), the text, and the bytes of its arrays. Numbers, strings and lists stand
in the text as they are; everything else is {"kind": ...}.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpc_hess.errors import HpcHessError

MOST_BYTES = 1 << 30  # of a message: whoever can send one to a rank cannot make it take all of its memory
_PLAIN = (type(None), bool, int, float, str)
_COLLECTIONS = {"tuple": tuple, "set": set, "frozenset": frozenset}


@dataclasses.dataclass(frozen=True)
class Unsaid:
    """What a rank says instead of a value that no message holds: the others wait for an answer."""

    why: str


def pack(value: Any) -> bytes:
    """Return ``value`` as a message.

    It may hold plain values and collections, bytes, paths, arrays and tensors of numbers, dataclasses, named tuples, and
    classes of this package's errors.

    Raises TypeError for anything else, ValueError for more than MOST_BYTES.
    """
    arrays: list[bytes] = []
    text = json.dumps(_encode(value, arrays)).encode()
    message = b"".join([len(text).to_bytes(8, "little"), text, *arrays])
    if len(message) > MOST_BYTES:
        raise ValueError(f"a message of {len(message)} bytes is larger than {MOST_BYTES}")
    return message


def unpack(message: bytes) -> Any:
    """Return the value of a message. Raises ValueError: it is not one."""
    end = 8 + int.from_bytes(message[:8], "little")
    try:
        return _decode(json.loads(message[8:end]), _Arrays(message, end))
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not a message of a rank ({error})") from None


def packed(value: Any) -> bytes:
    """Return a message; where that is not possible, one that says so to the ranks that wait for it."""
    try:
        return pack(value)
    except (TypeError, ValueError) as error:
        return pack(Unsaid(str(error)))


def unpacked(buffer: torch.Tensor, size: int) -> Any:
    """Return the value of a message. Raises TypeError on every rank where one of them could not say it."""
    value = unpack(buffer[:size].numpy().tobytes())
    if isinstance(value, Unsaid):
        raise TypeError(value.why)
    return value


def buffer(mine: bytes, size: int) -> torch.Tensor:
    """Return ``size`` bytes that begin with ``mine``. Raises ValueError where another rank wants to send too much."""
    if not 0 <= size <= MOST_BYTES:
        raise ValueError(f"a message of {size} bytes")
    found = torch.empty(size, dtype=torch.uint8)
    if mine:
        found[: len(mine)] = torch.frombuffer(bytearray(mine), dtype=torch.uint8)
    return found


def _encode(value: Any, arrays: list[bytes]) -> Any:
    if type(value) in _PLAIN:
        return value
    if isinstance(value, str) and not isinstance(value, np.generic):
        return str(value)  # one that knows more than its text, on its own rank
    if isinstance(value, np.ndarray | np.generic):
        if value.dtype.kind not in "biufcSU":
            raise TypeError(f"ranks cannot tell each other arrays of {value.dtype}")
        arrays.append(value.tobytes())
        kind = "array" if isinstance(value, np.ndarray) else "scalar"
        return {"kind": kind, "dtype": value.dtype.str, "shape": list(value.shape), "bytes": value.nbytes}
    if isinstance(value, torch.Tensor):
        flat = value.detach().cpu().contiguous()
        arrays.append(flat.view(-1).view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
        return {
            "kind": "tensor",
            "dtype": str(value.dtype).removeprefix("torch."),
            "shape": list(value.shape),
            "bytes": len(arrays[-1]),
        }
    if isinstance(value, bytes):
        arrays.append(value)
        return {"kind": "bytes", "bytes": len(value)}
    if isinstance(value, Path):
        return {"kind": "path", "text": str(value)}
    if isinstance(value, type) and issubclass(value, HpcHessError):
        return {"kind": "class", **_name(value)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: _encode(getattr(value, field.name), arrays) for field in dataclasses.fields(value)}
        return {"kind": "fields", **_name(type(value)), "fields": fields}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        fields = {name: _encode(part, arrays) for name, part in zip(value._fields, value, strict=True)}
        return {"kind": "fields", **_name(type(value)), "fields": fields}
    if isinstance(value, list):
        return [_encode(part, arrays) for part in value]
    if isinstance(value, dict):
        return {"kind": "dict", "items": [[_encode(k, arrays), _encode(v, arrays)] for k, v in value.items()]}
    for kind, collection in _COLLECTIONS.items():
        if isinstance(value, collection):
            return {"kind": kind, "items": [_encode(part, arrays) for part in value]}
    raise TypeError(f"ranks cannot tell each other a {type(value).__name__}")


class _Arrays:
    """The bytes behind the text, in the order in which they were written."""

    def __init__(self, message: bytes, start: int) -> None:
        self._message, self._at = message, start

    def take(self, size: int) -> bytes:
        part = self._message[self._at : self._at + size]
        if size < 0 or len(part) != size:
            raise ValueError("a message of a rank is cut off")
        self._at += size
        return part


def _decode(found: Any, arrays: _Arrays) -> Any:
    if isinstance(found, list):
        return [_decode(part, arrays) for part in found]
    if not isinstance(found, dict):
        return found
    kind = found["kind"]
    if kind in ("array", "scalar"):
        dtype = np.dtype(found["dtype"])
        if dtype.hasobject:
            raise ValueError("an array of objects")
        array: Any = np.ndarray(found["shape"], dtype, bytearray(arrays.take(found["bytes"])))
        return array if kind == "array" else array[()]
    if kind == "tensor":
        tensor = torch.empty(found["shape"], dtype=getattr(torch, found["dtype"]))
        if tensor.nbytes != found["bytes"]:
            raise ValueError("a tensor of another size")
        if tensor.nbytes:
            tensor.view(-1).view(torch.uint8).numpy()[:] = np.frombuffer(arrays.take(tensor.nbytes), np.uint8)
        return tensor
    if kind == "bytes":
        return arrays.take(found["bytes"])
    if kind == "path":
        return Path(found["text"])
    if kind == "dict":
        return {_decode(k, arrays): _decode(v, arrays) for k, v in found["items"]}
    if kind in _COLLECTIONS:
        return _COLLECTIONS[kind](_decode(part, arrays) for part in found["items"])
    if kind == "class":
        return _class(found, HpcHessError)
    if kind == "fields":
        return _with_fields(_class(found, object), {name: _decode(part, arrays) for name, part in found["fields"].items()})
    raise ValueError(f"a message holds a '{kind}'")


def _name(kind: type) -> dict[str, str]:
    return {"module": kind.__module__, "name": kind.__qualname__}


def _class(found: dict[str, Any], base: type) -> Any:
    """Return a class that is loaded already, of this kind: nothing is imported, nothing called."""
    kind: Any = sys.modules[found["module"]]
    for part in found["name"].split("."):
        kind = vars(kind)[part]
    if not isinstance(kind, type) or not issubclass(kind, base):
        raise ValueError(f"a message holds {found['module']}.{found['name']}")  # noqa: TRY004  # what arrived is no message
    return kind


def _with_fields(kind: Any, fields: dict[str, Any]) -> Any:
    """Return a dataclass or a named tuple with these fields, as it was: without its checks and defaults."""
    if issubclass(kind, tuple) and set(getattr(kind, "_fields", ())) == set(fields):
        return kind._make(fields[name] for name in kind._fields)
    if not dataclasses.is_dataclass(kind) or {field.name for field in dataclasses.fields(kind)} != set(fields):
        raise ValueError(f"a message holds a {kind.__name__} with other fields")
    value: Any = object.__new__(kind)  # type: ignore[arg-type]
    for name, part in fields.items():
        object.__setattr__(value, name, part)
    return value
