"""What the stored tensors of a checkpoint are: types and companions that tell of quantisation, and known leftovers.

Pure functions of names, shapes and types as safetensors writes them ("F32", "F8_E4M3", ...).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

from hpc_hess.intake.findings import Finding, noted

FLOATS = ("F64", "F32", "F16", "BF16")
ROTARY = "rotary frequencies"
TOWERS = "parts for images and sound"
INTEGERS = ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")
_SPELLED = {
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F4": "float4_e2m1fn_x2",
    "I8": "int8",
    "U8": "uint8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "C64": "complex64",
    "BOOL": "bool",
}

# What lies beside quantised weights: scales, zero points, packed values. Only of tensors that the model does not take.
_COMPANION = re.compile(
    r"(?:^|[._:])(?:"
    r"weight_(?:scale\w*|packed|shape|zero_point|g_idx|global_scale|quantizer\..+|scaling_factor|format)"
    r"|weight\.(?:\w*absmax|\w*quant_map|quant_state\..+|_data|_scale\w*|_zero_point|_shift)"
    r"|\w*scale_inv|scales|qscales|qweight|qzeros|q_(?:weight|scale|groups|perm|invperm|scale_max|group_map)|g_idx|qdata|absmax"
    r"|SCB|weight_format|W_q|codebooks?|codes|Qidxs|trellis|suh|svh|_packed_params\..+"
    r")$"
)
_WITH_WEIGHT = re.compile(r"(?:\.|_)(?:scale|zeros?|zero_point|scb|meta)$")  # of X.weight, where that is stored too
_ROTARY = re.compile(r"(?:^|[._])(?:inv_freq|(?:cos|sin)_cached|freqs_cis)$")
_POSITIONS = re.compile(r"(?:^|\.)position_ids$")
_MASK = re.compile(r"(?:^|\.)(?:attn|attention|self_attn|crossattention)\.(?:(?:masked_)?bias|causal_mask)$")
_HEAD = re.compile(
    r"^(?:score|classifier|classification_head|qa_outputs|v_head|value_head|reward_head|cls\.seq_relationship)\."
)
_POOLER = re.compile(r"(?:^|\.)pooler\.")
_MTP = re.compile(r"(?:^|\.)(?:mtp|mtp_\w+|nextn)\.")
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_OTHER_SENSES = re.compile(
    r"^(?:model\.|thinker\.)?(?:visual|vision_\w+|vqmodel|audio_\w+|image_\w+|multi_modal_projector|mm_projector|embed_vision|embed_audio|"
    r"speech_\w+|talker|token2wav|code2wav)(?:\.|$)"
)
_ENCODER = re.compile(r"^(?:model\.)?encoder\.")


@dataclass(frozen=True)
class Architecture:
    """What is known of a model to tell leftovers by.

    ``ignored``: patterns that transformers itself ignores; ``layers``: number of blocks; ``extra_layers``: layers for the
    prediction of further tokens that the configuration counts; ``text_of_more``: only the text part of a model with other
    senses was built; ``left_out``: parts of it that were taken out, with their numbers of parameters;
    ``decoder_of_more``: only the decoder of an encoder-decoder model.
    """

    ignored: Collection[str] = ()
    layers: int | None = None
    extra_layers: int = 0
    text_of_more: bool = False
    left_out: Mapping[str, int] = field(default_factory=dict)
    decoder_of_more: bool = False


@dataclass
class Unused:
    """Stored tensors without a place in the model: ``known`` leftovers by what they are, and the ``others``."""

    known: dict[str, list[str]] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)


def wrong_type(dtype: str, floating: bool) -> str | None:
    """Return the name of a stored type that cannot be the values of a parameter (or buffer) of that kind, else None."""
    fits = dtype in FLOATS if floating else dtype in INTEGERS
    return None if fits else _SPELLED.get(dtype, dtype)


def companion(unused: Iterable[str], stored: Collection[str]) -> str | None:
    """Return the first unused tensor that belongs to a quantised weight: a scale, a zero point, packed values."""
    for key in unused:
        if key.endswith("_blocks") and key.removesuffix("_blocks") + "_scales" in stored:  # MXFP4
            return key
        if _COMPANION.search(key) or (_WITH_WEIGHT.search(key) and _WITH_WEIGHT.sub(".weight", key) in stored):
            return key
        if _WITH_WEIGHT.search(key) and _WITH_WEIGHT.sub("", key) in stored:
            return key
    return None


def sort_unused(
    unused: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], model: Architecture, is_zero: Callable[[str], bool]
) -> Unused:
    """Tell known leftovers from tensors that the model should have taken.

    ``unused`` maps stored names to those after transformers' renaming; ``is_zero`` reads a vector and tells whether
    all of it is zero (a bias of zeros changes nothing).
    """
    found = Unused()
    own = re.compile("|".join(f"(?:{p})" for p in model.ignored)) if model.ignored else None
    mtp_layers = {m[1] for key in unused if "eh_proj" in key and (m := _LAYER.search(key))}
    for key, renamed in unused.items():
        kind = TOWERS if tower(key, renamed, model) else _kind(key, shapes[key], model, mtp_layers)
        if kind is None and own is not None and (own.search(renamed) or own.search(key)):
            kind = "left out by transformers too"
        if kind is None and key.endswith("bias") and len(shapes[key]) == 1 and is_zero(key):
            kind = "biases that are zero"
        if kind is None:
            found.others.append(key)
        else:
            found.known.setdefault(kind, []).append(key)
    return found


def _kind(key: str, shape: tuple[int, ...], model: Architecture, mtp_layers: set[str]) -> str | None:
    if _ROTARY.search(key):
        return ROTARY
    if _POSITIONS.search(key) and len(shape) <= 2:
        return "position numbers"
    if _MASK.search(key) and (len(shape) == 4 or math.prod(shape) == 1):
        return "attention masks"
    if _HEAD.search(key):
        return "a head for another task"
    if _POOLER.search(key):
        return "a pooler"
    layer = _LAYER.search(key)
    beyond = layer is not None and model.layers is not None and int(layer[1]) >= model.layers
    if _MTP.search(key) or (
        beyond
        and layer is not None
        and model.layers is not None
        and (int(layer[1]) < model.layers + model.extra_layers or layer[1] in mtp_layers)
    ):
        return "layers that predict further tokens"
    if model.decoder_of_more and (_ENCODER.search(key) or key == "final_logits_bias"):
        return "the encoder"
    return None


def tower(key: str, renamed: str, model: Architecture) -> str | None:
    """Return which part for images or sound a stored tensor belongs to, None where it belongs to none."""
    for part in model.left_out:
        if renamed == part or renamed.startswith(f"{part}."):
            return part
    if (model.text_of_more or model.left_out) and (match := _OTHER_SENSES.search(key)):
        return match[0].rstrip(".")
    return None


def towers_note(parts: Mapping[str, int]) -> Finding:
    """Return the note that only the language model is computed; ``parts``: how many parameters each of the others has."""
    said = ", ".join(f"{part} ({_parameters(count)})" for part, count in parts.items())
    return noted("weights.unused", f"the language model alone is taken, without its {TOWERS}: {said}")


def _parameters(count: int) -> str:
    for size, word in ((10**9, " billion"), (10**6, " million")):
        if count >= size:
            return f"{count / size:.3g}{word} parameters"
    return f"{count:,} parameters"


def names(keys: list[str], most: int = 3) -> str:
    """Return "a, b, c and 4 others"."""
    shown = ", ".join(keys[:most])
    rest = len(keys) - most
    return shown if rest <= 0 else f"{shown} and {rest} other{'s' if rest > 1 else ''}"
