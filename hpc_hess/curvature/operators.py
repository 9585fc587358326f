"""From an operator's line in the registry to the operator: its exact product, and what it makes of a product."""

from __future__ import annotations

from dataclasses import dataclass

from hpc_hess.curvature.exact.exact import StreamedOperator
from hpc_hess.linalg.operator import LinearOperator
from hpc_hess.model.sharded.shard import ShardedModel
from hpc_hess.parallel.vector import Vector
from hpc_hess.registry.operators import OperatorSpec
from hpc_hess.registry.table import load


@dataclass(frozen=True)
class Point:
    """Where an operator is taken: theta_0 of ``model``, the loss there, and the gradient if the operator needs it."""

    loss: float
    gradient: Vector | None
    model: ShardedModel


def exact_product(spec: OperatorSpec) -> type[StreamedOperator]:
    """Return the class of the operator's exact product."""
    found: type[StreamedOperator] = load(spec.product)
    return found


def built(spec: OperatorSpec, product: LinearOperator, point: Point) -> LinearOperator:
    """Return what ``spec`` builds of a product by either method, or that product itself. Collective: yes."""
    if spec.build is None:
        return product
    operator: LinearOperator = load(spec.build)(product, point)
    return operator
