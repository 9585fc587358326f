"""Weights from a GGUF file, for demonstrations: the whole model is dequantised on each rank, then served in slices."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from hpc_hess.errors import ModelError


class GgufReader:
    """Holds the dequantised float32 model until ``close``.

    Raises
    ------
    ModelError : a package is missing, the file is damaged, or its tensors do not match the model.

    """

    def __init__(self, path: Path, skeleton: nn.Module) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        bar = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            model = AutoModelForCausalLM.from_pretrained(
                str(path.parent), gguf_file=path.name, dtype=torch.float32, local_files_only=True
            )
        except ImportError as error:
            raise ModelError(
                f"reading a GGUF file needs the demo packages: pip install gguf sentencepiece protobuf ({error})"
            ) from None
        except Exception as error:
            raise ModelError(f"cannot read {path}: {error}") from None
        finally:
            if bar:
                logging.enable_progress_bar()
        self._tensors = {name: t.detach() for name, t in model.state_dict().items()}
        for name, parameter in skeleton.named_parameters():
            found = self._tensors.get(name)
            if found is None or found.shape != parameter.shape:
                shape = "nothing" if found is None else str(tuple(found.shape))
                raise ModelError(f"parameter '{name}' has shape {tuple(parameter.shape)} but {path} holds {shape}")

    def read(self, name: str, dim: int, low: int, high: int) -> torch.Tensor:
        """Return entries [low, high) of parameter ``name`` along ``dim``. Collective: no."""
        tensor = self._tensors[name]
        return tensor.narrow(dim, low, high - low) if tensor.ndim else tensor

    def read_buffer(self, name: str) -> torch.Tensor | None:
        """Return a persistent buffer of the model, else None."""
        return self._tensors.get(name)

    def close(self) -> None:
        """Free the dequantised model."""
        self._tensors.clear()
