"""Hessian spectra of large language models: ``hessian`` and ``slq`` for notebooks, ``hpc-hess run`` for clusters."""

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = [
    "Decomposition",
    "Diagonal",
    "Eigenpairs",
    "HessianCallback",
    "Operator",
    "Result",
    "Solution",
    "Spectrum",
    "Trace",
    "decompose",
    "diagonal",
    "eigenpairs",
    "gradient_sketches",
    "hessian",
    "load",
    "sketched",
    "slq",
    "solve",
    "sub_block",
    "trace",
]


def __getattr__(name: str) -> Any:
    """Import the notebook functions on first use, so that ``hpc-hess --help`` does not wait for torch."""
    if name == "HessianCallback":  # apart: it imports the Trainer
        return importlib.import_module("hpc_hess.api.trainer").HessianCallback
    if name in __all__:
        return getattr(importlib.import_module("hpc_hess.api"), name)
    raise AttributeError(f"module 'hpc_hess' has no attribute '{name}'")
