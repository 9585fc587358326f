"""Exact Hessian products of dense architectures against double backward: left padding, -100 labels, accumulation."""

from __future__ import annotations

import pytest

from hpc_hess.curvature.exact.exact import ExactHessian
from tests.support.exact_case import case, error, reference, vectors, widened
from tests.support.toys import toy_model

DENSE = ["llama", "llama_untied", "gpt2", "gpt_neox", "opt", "qwen2", "qwen3", "gemma", "gemma2", "gemma3"]


@pytest.mark.parametrize("name", DENSE)
def test_products_equal_double_backward(name: str) -> None:
    model, loss = case(name)
    untouched = toy_model(name, dtype=model.space.dtype)
    with widened():
        hessian = ExactHessian(model, loss)
        u, v = vectors(model, 2)
        expected = reference(untouched, model, loss, v)
        together = hessian.matmat([u, v])
        assert error(hessian.matvec(v), expected) < 1e-13
        assert error(together[1], expected) < 1e-13
        assert u.dot(together[1]) == pytest.approx(v.dot(together[0]), rel=1e-10)
    assert hessian.num_products == 3
