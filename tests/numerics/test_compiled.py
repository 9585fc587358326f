"""Compiled stages: the same numbers, one program for all layers that are alike, files that other runs share."""

from __future__ import annotations

from pathlib import Path

from hpc_hess.curvature.exact import programs
from hpc_hess.curvature.exact.exact import ExactHessian, StreamedOperator
from hpc_hess.curvature.exact.streaming import Settings
from tests.support.exact_case import case, error, vectors, widened


def compiled(operator: StreamedOperator) -> programs.Programs:
    found = operator.repaying._programs
    assert found is not None
    return found


def about_compiling(operator: StreamedOperator) -> list[str]:
    return [note for note in operator.notes if "compiled" in note]


def test_programs_give_the_same_numbers_and_are_shared_through_files(tmp_path: Path) -> None:
    model, loss = case("llama")
    vs = vectors(model, 2)
    with widened():
        expected = ExactHessian(model, loss).matmat(vs)
    for number in range(2):
        operator = ExactHessian(model, loss, settings=Settings(compile="on", programs=tmp_path))
        found = operator.matmat(vs)
        assert max(error(f, e.data) for f, e in zip(found, expected, strict=True)) < 1e-6  # the model's own float32
        made = compiled(operator)
        assert (made.compiled, made.loaded) == ((6, 0) if number == 0 else (0, 6)), about_compiling(operator)
        assert not about_compiling(operator)
