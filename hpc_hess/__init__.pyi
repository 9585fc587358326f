from hpc_hess.api.classifiers import Decomposition, decompose
from hpc_hess.api.operators import Operator, hessian
from hpc_hess.api.results import Diagonal, Eigenpairs, Result, Solution, Spectrum, Trace, load
from hpc_hess.api.sketches import gradient_sketches, sketched
from hpc_hess.api.spectra import diagonal, eigenpairs, slq, solve, sub_block, trace
from hpc_hess.api.trainer import HessianCallback

__version__: str
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
