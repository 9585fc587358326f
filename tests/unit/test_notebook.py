"""The notebook runs from its first cell to its last, and each value that it ends a cell with shows itself."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "notebook.ipynb"


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mpl.use("agg")
    from matplotlib import pyplot

    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    names: dict[str, Any] = {"__name__": "__main__"}
    shown = []
    for cell in cells:
        *body, last = ast.parse("".join(cell["source"])).body
        value = isinstance(last, ast.Expr)
        exec(compile(ast.Module([*body, *([] if value else [last])], []), str(NOTEBOOK), "exec"), names)
        if isinstance(last, ast.Expr):
            shown.append(eval(compile(ast.Expression(last.value), str(NOTEBOOK), "eval"), names))
    pyplot.close("all")
    html = [value._repr_html_() for value in shown if hasattr(value, "_repr_html_")]
    assert [text.count("<img") for text in html] == [0, 1, 1, 1]  # operator, spectrum, eigenpairs, decomposition
    assert "batches were drawn once" in html[0]
    again, trace, values = shown[-1]
    assert again == names["spectrum"].lambda_max
    assert trace == names["spectrum"].trace.mean
    assert again == pytest.approx(values[-1], rel=1e-3)
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
