"""Exact Hessian products of mixture-of-experts architectures, grouped experts kernels switched off."""

from __future__ import annotations

import pytest

from hpc_hess.curvature.exact.exact import ExactHessian
from tests.support.exact_case import case, error, reference, vectors, widened
from tests.support.toys import MOE, toy_model


@pytest.mark.parametrize("name", MOE)
def test_products_equal_double_backward(name: str) -> None:
    model, loss = case(name)
    untouched = toy_model(name, dtype=model.space.dtype)
    model.module.config._experts_implementation = "grouped_mm"
    with widened():
        hessian = ExactHessian(model, loss)
        u, v = vectors(model, 2)
        expected = reference(untouched, model, loss, v)
        together = hessian.matmat([u, v])
        assert error(hessian.matvec(v), expected) < 1e-13
        assert error(together[1], expected) < 1e-13
    assert any("tokens are sorted by expert" in note for note in hessian.notes)
    assert model.module.config._experts_implementation == "grouped_mm", "the user's setting is left as it was"
