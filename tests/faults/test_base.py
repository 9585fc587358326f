"""B itself: the numbers that the faults are compared with."""

from __future__ import annotations

import pytest

from tests.faults.support import HIGHEST_B, LOSS_B, LOWEST_B, dense_spectrum, model_b


def test_base_model_has_the_spectrum_that_the_faults_are_measured_against() -> None:
    loss, values = dense_spectrum(model_b())
    assert loss == pytest.approx(LOSS_B, abs=1e-6)
    assert values[[0, -1]] == pytest.approx([LOWEST_B, HIGHEST_B], abs=1e-3)
