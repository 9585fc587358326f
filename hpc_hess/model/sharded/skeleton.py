"""The model without its weights: parameters on the meta device, buffers real, ready to be sharded and filled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from hpc_hess.config import ModelSection
from hpc_hess.errors import ModelError
from hpc_hess.intake.configuration import refuse_code, why
from hpc_hess.model.sources.initial import InitialWatch
from hpc_hess.model.sources.scalars import vectors_for_scalars
from hpc_hess.model.sources.source import Source
from hpc_hess.registry.tasks import TASKS

_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


def build_skeleton(source: Source, section: ModelSection) -> nn.Module:
    """Return the model of `model.task` with meta parameters of the master dtype and real buffers on the CPU. Collective: no.

    Eval mode (dropout off), no KV cache, experts computed eagerly (the grouped kernels have no forward-mode
    derivative), tied parameters tied (``named_parameters`` yields each once). Parameters that the model itself freezes
    (tables of positions, routers' biases) require no gradient; ``skeleton.frozen_by_itself`` names them.
    Scalar parameters have the shape (1,) here; ``skeleton.scalars`` names them.
    ``skeleton.initial`` tells by name how the model's own initialiser starts each parameter, for random weights.

    Buffers are what an ordinary float32 construction gives; with float64 masters floating buffers become float64.

    Raises
    ------
    ModelError : transformers has no such model for the task, an attention implementation the model lacks, a failing
        constructor.

    """
    import transformers

    spec, config = TASKS[section.task], source.hf_config
    for part in _configs(config):
        part.use_cache = False
        if hasattr(part, "_experts_implementation"):
            part._experts_implementation = "eager"
    watch = InitialWatch()
    try:
        with watch.watching():
            model = getattr(transformers, spec.auto).from_config(
                config, dtype=torch.float32, attn_implementation=section.attention, trust_remote_code=source.own_code
            )
    except Exception as error:  # of a constructor: any kind
        text = why(error, config.get_text_config().to_dict())
        unknown = isinstance(error, ValueError) and "Unrecognized configuration class" in text
        if isinstance(error, ValueError) and not unknown and ("attention" in text.lower() or "attn" in text.lower()):
            raise ModelError(
                f'{type(config).__name__.removesuffix("Config")} has no "{section.attention}" attention in '
                'transformers: set model.attention = "eager"'
            ) from None
        refuse_code(error, source.path)
        if unknown:
            others = [f'"{name}"' for name in TASKS if name != spec.name and _has(config, name)]
            remedy = f"set model.task = {' or '.join(others)}" if others else text
            raise ModelError(f"{source.path} is not a Hugging Face {spec.words}: {remedy}") from None
        raise ModelError(f"cannot build the model of {source.path}: {text}") from None
    model.tie_weights()
    model.initial = {name: watch.initial(parameter) for name, parameter in model.named_parameters()}
    vectors_for_scalars(model)
    _cast(model, _DTYPES[section.master_dtype])
    model.eval()
    model.frozen_by_itself = [name for name, p in model.named_parameters() if p.numel() and not p.requires_grad]
    return model


def _has(config: Any, task: str) -> bool:
    """Whether transformers has a model of this configuration for a task."""
    import transformers

    return type(config) in getattr(transformers, TASKS[task].auto)._model_mapping


def text_config(hf_config: Any) -> Any:
    """Return the configuration of the language model, also where it is a part of a composite one."""
    return hf_config.get_text_config() if hasattr(hf_config, "get_text_config") else hf_config


def max_positions(hf_config: Any) -> int | None:
    """Return the longest sequence the configuration allows, None when it sets no limit (ALiBi, state space models)."""
    config = text_config(hf_config)
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            padding = getattr(config, "pad_token_id", None)  # after which RoBERTa's positions begin
            roberta = "roberta" in config.model_type or config.model_type == "camembert"
            return value - (padding or 0) - 1 if roberta else value
    return None


def vocabulary_size(hf_config: Any) -> int:
    """Return the number of rows of the token embedding."""
    return int(text_config(hf_config).vocab_size)


def _configs(config: Any) -> Iterator[Any]:
    """Yield the configuration and the sub-configurations of a composite model."""
    yield config
    for name in getattr(config, "sub_configs", None) or {}:
        part = getattr(config, name, None)
        if part is not None:
            yield from _configs(part)


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Give parameters the master dtype in place, keeping ties; floating buffers follow to float64 only."""
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen and parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
                seen.add(id(module._parameters[name]))
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point() and dtype == torch.float64:
                module._buffers[name] = buffer.to(dtype)
