"""Curvature operators: one line each, read by the configuration, products, planner, placement, check, report and API."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hpc_hess.registry.table import Reference, Registry

Method = Literal["finite_difference", "exact"]
_EXACT = "hpc_hess.curvature.exact"


@dataclass(frozen=True)
class OperatorSpec:
    """A matrix that ``operator.kind`` can name.

    Attributes
    ----------
    name : the value of operator.kind.
    matrix, meaning : the matrix in words, after "the"; what that is, where the words do not say it.
    methods : how its products can be taken. Differences of gradients give the Hessian, and what ``build`` makes of it.
    product : the class of the exact product, a curvature.exact.exact.StreamedOperator.
    build : build(product, point) -> LinearOperator, of a product by either method and a curvature.operators.Point; None:
        the product as it is. Collective: as products are.
    needs_gradient : whether ``build`` needs the gradient at theta_0.
    vectors : vectors of the parameters that it holds besides, for the memory.
    positive : whether it is positive semi-definite.
    of_tokens : whether the loss has to be a mean over tokens.
    has_class_means : whether the means of the classes' loss gradients make a part of it, which a study can take out.

    """

    name: str
    matrix: str
    meaning: str = ""
    methods: tuple[Method, ...] = ("finite_difference", "exact")
    product: Reference = f"{_EXACT}.exact:ExactHessian"
    build: Reference | None = None
    needs_gradient: bool = False
    vectors: int = 0
    positive: bool = False
    of_tokens: bool = False
    has_class_means: bool = False

    @property
    def said(self) -> str:
        """The name, the matrix, and what its products need."""
        only = ", by exact products only" if self.methods == ("exact",) else ""
        return f"`{self.name}` ({self.meaning or f'the {self.matrix}'}{only})"

    @property
    def by(self) -> str:
        """The methods, as a configuration says them."""
        return " or ".join(f'"{method}"' for method in self.methods)

    @property
    def title(self) -> str:
        """The matrix as the beginning of a heading."""
        return self.matrix[0].upper() + self.matrix[1:].removesuffix(" matrix")


OPERATORS: Registry[OperatorSpec] = Registry(
    OperatorSpec("hessian", "Hessian"),
    OperatorSpec(
        "gauss_newton",
        "Gauss-Newton matrix",
        methods=("exact",),
        product=f"{_EXACT}.gauss_newton:GaussNewton",
        positive=True,
        has_class_means=True,
    ),
    OperatorSpec(
        "residual",
        "Hessian residual",
        "the Hessian less the Gauss-Newton matrix",
        methods=("exact",),
        product=f"{_EXACT}.gauss_newton:Residual",
    ),
    OperatorSpec(
        "fisher",
        "empirical Fisher matrix",
        methods=("exact",),
        product=f"{_EXACT}.gauss_newton:EmpiricalFisher",
        positive=True,
    ),
    OperatorSpec(
        "perplexity",
        "perplexity Hessian",
        "the Hessian of exp(loss)",
        build="hpc_hess.curvature.perplexity:of_perplexity",
        needs_gradient=True,
        of_tokens=True,
    ),
)
