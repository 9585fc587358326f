"""B itself: the numbers that the faults are compared with."""

from __future__ import annotations

import pytest

from tests.support.base_model import HIGHEST_B, LOSS_B, LOWEST_B, extremes, model_b


def test_base_model_has_the_spectrum_that_the_faults_are_measured_against() -> None:
    loss, values = extremes(model_b())
    assert loss == pytest.approx(LOSS_B, abs=1e-6)
    assert values == pytest.approx([LOWEST_B, HIGHEST_B], abs=1e-3)
