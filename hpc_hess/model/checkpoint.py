"""Weights from a directory of safetensors files, read slice by slice."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from hpc_hess.errors import ModelError
from hpc_hess.intake.findings import Finding
from hpc_hess.model.conversion import model_tensors
from hpc_hess.model.lazy import Computed, Lazy
from hpc_hess.model.stored import SafetensorsFiles

_COMPARED_ROWS = 16


class SafetensorsReader:
    """Reads slices of the model's tensors from safetensors files; the files are mapped, never read whole.

    Parameters
    ----------
    directory : holds ``model.safetensors``, or ``model.safetensors.index.json`` with the files it names.
    skeleton : the model, before or after sharding; gives names, shapes and the architecture's conversion table.

    Raises
    ------
    ModelError : a file is missing or damaged, a parameter has no tensor or one of another shape, or two tensors that
        the configuration ties differ.

    """

    def __init__(self, directory: Path, skeleton: nn.Module) -> None:
        self._directory = directory
        self.findings: list[Finding] = []
        self._files = SafetensorsFiles(directory)
        self._tensors = model_tensors(self._files.tensors(), skeleton)
        self._tie(skeleton)
        self._check(skeleton)

    def read(self, name: str, dim: int, low: int, high: int) -> torch.Tensor:
        """Return entries [low, high) of parameter ``name`` along ``dim``, in the file's dtype. Collective: no.

        Raises
        ------
        ModelError : the file cannot be read there.

        """
        tensor = self._tensors[name]
        box = [(0, n) for n in tensor.shape]
        if box:
            box[dim] = (low, high)
        try:
            found = tensor.read(tuple(box))
            return found if box else found.reshape(1)  # a scalar, held as a vector: see model.scalars
        except Exception as error:
            raise ModelError(f"cannot read tensor '{name}' of {self._directory}: {error}") from None

    def read_buffer(self, name: str) -> torch.Tensor | None:
        """Return a buffer the checkpoint holds, else None."""
        tensor = self._tensors.get(name)
        return None if tensor is None else tensor.read(tuple((0, n) for n in tensor.shape))

    def close(self) -> None:
        """Unmap the files."""
        self._files.close()
        self._tensors.clear()

    def _tie(self, skeleton: nn.Module) -> None:
        """Find each tied parameter under whichever of its names the checkpoint has; refuse names that disagree."""
        names: dict[int, list[str]] = {}
        for name, parameter in skeleton.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        for tied in names.values():
            present = [name for name in tied if name in self._tensors]
            for other in present[1:]:
                if not _same(self._tensors[present[0]], self._tensors[other]):
                    raise ModelError(
                        f"the configuration ties '{present[0]}' and '{other}', but {self._directory} holds different "
                        'values for them: set "tie_word_embeddings": false in its config.json'
                    )
            for name in tied:
                if present:
                    self._tensors.setdefault(name, self._tensors[present[0]])

    def _check(self, skeleton: nn.Module) -> None:
        missing = [name for name, _ in skeleton.named_parameters() if name not in self._tensors]
        if missing:
            more = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
            raise ModelError(f"{self._directory} has no tensor for parameter '{missing[0]}'{more}")
        for name, parameter in skeleton.named_parameters():
            tensor = self._tensors[name]
            if not isinstance(tensor, Computed) and (tensor.shape or (1,)) != tuple(parameter.shape):
                raise ModelError(
                    f"parameter '{name}' has shape {tuple(parameter.shape)} by config.json but {tensor.shape} in "
                    f"{self._directory}: the configuration belongs to another checkpoint"
                )


def _same(a: Lazy, b: Lazy) -> bool:
    """Compare a sample of rows; a copy made when the model was saved is equal everywhere."""
    if a.shape != b.shape or not a.shape:
        return a.shape == b.shape
    rows = sorted({i * (a.shape[0] - 1) // _COMPARED_ROWS for i in range(_COMPARED_ROWS + 1)})
    rest = tuple((0, n) for n in a.shape[1:])
    return all(torch.equal(a.read(((i, i + 1), *rest)), b.read(((i, i + 1), *rest))) for i in rows)
