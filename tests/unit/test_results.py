"""Results of the notebook functions show themselves, draw on the user's axes, and come back from a file."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn.functional import cross_entropy

import hpc_hess
from hpc_hess.errors import DataError

ROOT = Path(__file__).parents[2]
Make = Callable[[Any], Any]
MAKERS: dict[str, Make] = {
    "spectrum": lambda A: hpc_hess.slq(A, steps=12, probes=3),
    "one probe": lambda A: hpc_hess.slq(A, steps=3),
    "pairs": lambda A: hpc_hess.eigenpairs(A, 3),
    "trace": lambda A: hpc_hess.trace(A, products=10),
    "diagonal": lambda A: hpc_hess.diagonal(A, products=10),
    "solution": lambda A: hpc_hess.solve(A, np.ones(A.shape[0]), damping=0.1),
}
DRAWN = [name for name in MAKERS if name != "trace"]


def problem() -> tuple[nn.Module, list[Any]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    return model, [(torch.randn(30, 5, dtype=torch.float64), torch.randint(0, 3, (30,))) for _ in range(2)]


@pytest.fixture(scope="module")
def operator() -> Any:
    model, batches = problem()
    return hpc_hess.hessian(model, batches, lambda m, b: cross_entropy(m(b[0]), b[1]), method="exact")


@pytest.fixture(scope="module")
def results(operator: Any) -> dict[str, Any]:
    return {name: make(operator) for name, make in MAKERS.items()}


@pytest.mark.parametrize("name", MAKERS)
def test_a_result_comes_back_from_its_file(name: str, results: dict[str, Any], tmp_path: Path) -> None:
    result = results[name]
    path = result.save(tmp_path / "result.of.mine")  # just this name
    assert [file.name for file in tmp_path.iterdir()] == ["result.of.mine"]
    back = hpc_hess.load(path)
    assert type(back) is type(result)
    for each in dataclasses.fields(result):
        found, expected = getattr(back, each.name), getattr(result, each.name)
        np.testing.assert_array_equal(found, expected)
        assert type(found) is type(expected)
        if isinstance(expected, np.ndarray):
            assert found.dtype == expected.dtype
    assert repr(back) == repr(result)
    with np.load(path, allow_pickle=False) as file:
        assert all(file[key].dtype != object for key in file.files)


def test_values_are_plain_numbers_and_arrays(results: dict[str, Any]) -> None:
    for result in results.values():
        for each in dataclasses.fields(result):
            value = getattr(result, each.name)
            ones = value if isinstance(value, list) else [value]
            assert {type(one) for one in ones} <= {int, float, bool, str, np.ndarray, type(None)}, each.name
    spectrum = results["spectrum"]
    assert type(spectrum.lambda_max) is float
    assert type(spectrum.trace.mean) is float
    assert type(results["pairs"].vectors) is np.ndarray
    x, residuals = results["solution"]
    assert type(x) is type(residuals) is np.ndarray
    assert results["diagonal"][1] is results["diagonal"].stderr


def test_only_whole_results_of_this_version_are_read(results: dict[str, Any], tmp_path: Path) -> None:
    path = results["spectrum"].save(tmp_path / "s.npz")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="damaged one"):
        hpc_hess.load(path)
    np.savez(path, alphas=np.ones(3))
    with pytest.raises(DataError, match="holds no result that save"):
        hpc_hess.load(path)
    np.save(tmp_path / "array.npy", np.ones(3))
    with pytest.raises(DataError, match="holds no result that save"):
        hpc_hess.load(tmp_path / "array.npy")
    np.savez(path, **{"hpc_hess.result": np.array('{"result": "Spectrum", "version": 9}')})
    with pytest.raises(DataError, match="version 9, here 1"):
        hpc_hess.load(path)
    with pytest.raises(DataError, match="there is no file"):
        hpc_hess.load(tmp_path / "nothing.npz")


def test_a_save_that_fails_leaves_the_file_before_it(
    results: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = results["spectrum"].save(tmp_path / "s.npz")
    before = path.read_bytes()

    def full(file: Any, **_: Any) -> None:
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="no space"):
        results["pairs"].save(path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", MAKERS)
def test_a_result_says_in_three_lines_what_was_found(name: str, results: dict[str, Any]) -> None:
    lines = repr(results[name]).splitlines()
    assert len(lines) == 3
    assert max(map(len, lines)) <= 120
    assert "Hessian" in lines[0]


def test_the_numbers_shown_are_those_of_the_result(results: dict[str, Any]) -> None:
    spectrum, pairs = results["spectrum"], results["pairs"]
    assert f"{spectrum.lambda_max:.4g}" in repr(spectrum)
    assert "3 probes of 12 steps" in repr(spectrum)
    assert all(f"{value:.4g}" in repr(pairs) for value in pairs.values)
    assert "converged" in repr(results["solution"])


def images(html: str) -> list[Any]:
    from PIL import Image

    found = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]


@pytest.mark.parametrize("name", MAKERS)
def test_a_notebook_shows_the_lines_and_the_figure(name: str, results: dict[str, Any]) -> None:
    html = results[name]._repr_html_()
    assert all(line.strip().replace("&", "&amp;").replace("<", "&lt;") in html for line in repr(results[name]).splitlines())
    pictures = images(html)
    assert len(pictures) == (name in DRAWN)
    for picture in pictures:
        grey = np.asarray(picture.convert("L"))
        assert 0.002 < (grey < 128).mean() < 0.6  # neither empty nor a black field


def test_an_operator_shows_itself(operator: Any) -> None:
    assert repr(operator) == ("Operator: Hessian of 75 parameters in 4 tensors\n  exact products, vectors in float64 on cpu")
    assert "Hessian of 75 parameters" in operator._repr_html_()
    drawn = hpc_hess.hessian(nn.Linear(2, 2), iter([torch.ones(1, 2)]), lambda m, b: m(b).sum())
    assert repr(drawn).splitlines()[1:] == [
        "  differences of gradients, vectors in float32 on cpu",
        "  note: batches were drawn once and are kept: 1, of 0.00 MB",
    ]


@pytest.mark.parametrize("name", DRAWN)
def test_a_plot_goes_on_the_axes_that_were_given(name: str, results: dict[str, Any]) -> None:
    before = dict(mpl.rcParams)
    ax = Figure().subplots()
    assert results[name].plot(ax) is ax
    assert ax.get_xlabel()
    assert ax.lines or ax.collections or ax.images or ax.patches
    assert dict(mpl.rcParams) == before
    with pytest.raises(AttributeError):
        results["trace"].plot()


def test_a_plot_without_axes_is_a_figure_of_pyplot(results: dict[str, Any]) -> None:
    from matplotlib import pyplot

    mpl.use("agg")
    count = len(pyplot.get_fignums())
    ax = results["spectrum"].plot()
    assert len(pyplot.get_fignums()) == count + 1
    pyplot.close(ax.get_figure())


def test_what_is_drawn_are_the_eigenvalues(operator: Any) -> None:
    """With all steps the curve holds every eigenvalue, and its ends are named."""
    spectrum = hpc_hess.slq(operator, steps=75, progress=False)
    ax = spectrum.plot(Figure().subplots())
    said = {text.get_text() for text in ax.texts}
    assert any(f"{spectrum.lambda_max:.4g}" in text for text in said)
    x, y = (np.asarray(data, float) for data in ax.lines[0].get_data())
    shown = np.isfinite(y)
    assert np.trapezoid(y[shown], x[shown]) == pytest.approx(1.0, abs=0.1)  # per decade of the axis


def test_pairs_are_drawn_where_they_live(operator: Any) -> None:
    pairs = hpc_hess.eigenpairs(operator, 2, progress=False)
    assert pairs.modules.tolist() == ["0.bias", "0.weight", "2.bias", "2.weight"]
    np.testing.assert_allclose(pairs.shares[:, 1], (pairs.vectors[:, 8:48] ** 2).sum(1), rtol=1e-9)
    ax = pairs.plot(Figure().subplots())
    labels = [label.get_text().replace("\u2212", "-") for label in ax.get_yticklabels()]
    assert [float(label) for label in labels] == pytest.approx(pairs.values[::-1].tolist(), rel=1e-3)


def test_the_class_structure_shows_its_eigenvalues() -> None:
    model, batches = problem()
    parts = hpc_hess.decompose(model, batches, num_classes=3)
    assert len(repr(parts).splitlines()) == 3
    A1 = np.stack([parts.means.a1.matvec(parts.hessian.space.wrap(row)).data.numpy() for row in torch.eye(75).double()])
    np.testing.assert_allclose(parts.eigenvalues["A1"], np.linalg.eigvalsh(A1)[-3:], atol=1e-12)
    ax = parts.plot(Figure().subplots())
    assert [label.get_text() for label in ax.get_yticklabels()] == ["A1", "A2", "B1"]
    assert len(images(parts._repr_html_())) == 1


@pytest.mark.parametrize("method", ["finite_difference", "exact"])
def test_a_matrix_of_zeros_shows_itself(method: Any) -> None:
    model = nn.Linear(3, 2).double()
    operator = hpc_hess.hessian(model, [torch.randn(5, 3).double()], lambda m, b: m(b).mean(), method=method)
    for make in MAKERS.values():
        result = make(operator)
        assert len(result._repr_html_()) > 50
        assert len(repr(result).splitlines()) == 3


def test_the_interface_is_imported_without_what_draws() -> None:
    code = (
        "import sys, hpc_hess; assert 'torch' not in sys.modules; hpc_hess.slq; "
        "print(sorted({'matplotlib', 'tqdm.notebook', 'IPython'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_type_checkers_see_the_names_that_there_are() -> None:
    """The stub says what is imported late."""
    stub = (ROOT / "hpc_hess" / "__init__.pyi").read_text()
    found: dict[str, Any] = {}
    exec(stub.replace("__version__: str\n", ""), found)
    assert found["__all__"] == hpc_hess.__all__
    assert all(found[name] is getattr(hpc_hess, name) for name in hpc_hess.__all__)
    names = re.search(r"__all__ = \[(.*?)\]", (ROOT / "hpc_hess" / "api" / "__init__.py").read_text(), re.DOTALL)
    assert names is not None
    apart = "HessianCallback"  # imports the Trainer, so it is no part of hpc_hess.api
    assert re.findall(r'"(\w+)"', names[1]) == [name for name in hpc_hess.__all__ if name != apart]
