"""Hessian spectra of large language models: ``hessian`` and ``slq`` for notebooks, ``hpc-hess run`` for clusters."""

from typing import Any

__all__ = ["Spectrum", "decompose", "diagonal", "eigenpairs", "hessian", "slq", "solve", "sub_block", "trace"]


def __getattr__(name: str) -> Any:
    """Import the notebook functions on first use, so that ``hpc-hess --help`` does not wait for torch."""
    if name in __all__:
        from hpc_hess import api, classifiers

        return getattr(classifiers if name == "decompose" else api, name)
    raise AttributeError(f"module 'hpc_hess' has no attribute '{name}'")
