"""result.json is JSON: what is not a finite number is null, and the page says that it is not known."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from hpc_hess.studies.block_diagonal import view
from hpc_hess.studies.quadrature.result import to_json

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
)


def nulled(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: nulled(part) for key, part in value.items()}
    if isinstance(value, list):
        return [nulled(part) for part in value]
    return value if not isinstance(value, float) or math.isfinite(value) else None


@settings(deadline=None)
@given(result=st.dictionaries(st.text(max_size=5), values, max_size=4))
def test_any_result_is_json(result: dict[str, Any]) -> None:
    assert json.loads(to_json(result), parse_constant=pytest.fail) == nulled(result)


def test_numpy_numbers_and_tuples_too() -> None:
    result = {"a": (np.float64("nan"), np.float64(0.1)), "b": np.float64("inf")}
    assert json.loads(to_json(result), parse_constant=pytest.fail) == {"a": [None, 0.1], "b": None}


@pytest.mark.parametrize("unknown", [None, float("nan")])  # of an old run directory
def test_a_standard_error_that_is_not_known_is_said_to_be(unknown: float | None) -> None:
    row = {
        "direction": "random",
        "blocks": "row",
        "relative_error": 0.5,
        "relative_error_stderr": unknown,
        "cosine": 0.8,
        "cosine_stderr": unknown,
        "num_products": 2,
    }
    known = {**row, "blocks": "layer", "relative_error_stderr": 0.01, "cosine_stderr": 0.0}
    found = {"products": [known, row], "counts": {"layer": 2, "row": 40}}
    assert [line[3:5] for line in view.table(found)] == [
        ["0.500 ± 0.01", "0.800"],
        ["0.500 ± not known", "0.800 ± not known"],
    ]
    figure = Figure()
    caption = view.draw(figure, found, {})
    assert "no standard error is known" in caption
    assert "no standard error is known" not in view.draw(Figure(), {**found, "products": [known]}, {})
    bars = [container for axes in figure.axes for container in axes.containers if container.get_label() == "by row"]
    assert bars
