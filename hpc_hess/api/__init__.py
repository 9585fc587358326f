"""The Python interface, for notebooks and training programs: any ``torch.nn.Module``, in one process or spread over ranks.

>>> operator = hpc_hess.hessian(model, batches, loss)   # doctest: +SKIP
>>> spectrum = hpc_hess.slq(operator, steps=40, probes=4)   # doctest: +SKIP
>>> spectrum.lambda_max, spectrum.trace   # doctest: +SKIP
"""

from hpc_hess.api.classifiers import Decomposition, decompose
from hpc_hess.api.operators import Operator, hessian
from hpc_hess.api.results import Diagonal, Eigenpairs, Result, Solution, Spectrum, Trace, load
from hpc_hess.api.sketches import gradient_sketches, sketched
from hpc_hess.api.spectra import diagonal, eigenpairs, slq, solve, sub_block, trace

__all__ = [
    "Decomposition",
    "Diagonal",
    "Eigenpairs",
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
