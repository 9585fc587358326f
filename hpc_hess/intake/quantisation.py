"""The quantised forms of weights that are read, as config.json declares them, and one sentence for every other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_hess.errors import ModelError

Block = tuple[int | None, int | None]  # rows and columns under one scale; None: all of them

_BYTES = ("float-quantized", "int-quantized", "naive-quantized")  # formats of compressed-tensors that pack nothing
_REMEDY = (
    "read are MXFP4, FP8 with weight_scale_inv, and FP8 or int8 of compressed-tensors: take the release that is not "
    "quantised, or dequantise it to bfloat16 or float32 safetensors first"
)


@dataclass(frozen=True)
class Quantisation:
    """How weights are stored.

    ``method`` as config.json names it; ``suffix`` of the names of scales, after the name of their weight; ``blocks`` which
    entries of a weight share a scale, as far as the configuration says: each scale has the shape of one of them.
    """

    method: str
    suffix: str
    blocks: tuple[Block, ...] = ()


def declared(hf_config: Any, path: Path) -> Quantisation | None:
    """Return the quantisation that a Hugging Face configuration declares, None where it declares none.

    Raises
    ------
    ModelError : one that is not read.

    """
    for part in (hf_config, hf_config.get_text_config()):
        found = getattr(part, "quantization_config", None)
        if found:
            values = found if isinstance(found, Mapping) else found.to_dict()
            return _read(values, path)
    return None


def _read(values: Mapping[str, Any], path: Path) -> Quantisation:
    method = str(values.get("quant_method"))

    def refused(what: str) -> ModelError:
        return ModelError(f"{path} is quantised ({what}): {_REMEDY}")

    if method == "mxfp4":
        return Quantisation(method, "_scales")
    if method == "fp8":
        size = values.get("weight_block_size", (128, 128))
        if size is None:
            return Quantisation(method, "_scale_inv", ((None, None),))
        if not (isinstance(size, list | tuple) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size)):
            raise ModelError(f"{path} has weight_block_size = {size!r}, which should be two positive numbers: correct it")
        return Quantisation(method, "_scale_inv", ((size[0], size[1]),))
    if method != "compressed-tensors":
        raise refused(method)
    for key in ("sparsity_config", "transform_config"):
        other = values.get(key)
        if other and not (isinstance(other, Mapping) and other.get("format") == "dense"):
            raise refused(f"{method} with {key}")
    groups = values.get("config_groups")
    if not isinstance(groups, Mapping) or not groups or not all(isinstance(g, Mapping) for g in groups.values()):
        raise refused(f"{method} without config_groups")
    return Quantisation(method, "_scale", tuple({_block(group, values, refused): None for group in groups.values()}))


def _block(group: Mapping[str, Any], values: Mapping[str, Any], refused: Any) -> Block:
    """Return the entries under one scale in a group of compressed-tensors."""
    form = group.get("format") or values.get("format")
    weights = group.get("weights") or {}
    bits, strategy = weights.get("num_bits"), weights.get("strategy")
    if form not in _BYTES or bits != 8 or not weights.get("symmetric", True):
        zero = "" if weights.get("symmetric", True) else " with zero points"
        raise refused(f"compressed-tensors, {form}, {bits} bits{zero}")
    size = weights.get("block_structure") if strategy == "block" else [1, weights.get("group_size")]
    if strategy == "tensor":
        return (None, None)
    if strategy == "channel":
        return (1, None)
    if strategy in ("block", "group") and isinstance(size, list) and all(isinstance(n, int) and n > 0 for n in size):
        return (size[0], size[1])
    raise refused(f"compressed-tensors, one scale by {strategy}")
