"""A bar while the notebook functions compute; interrupts, by real signals, that leave what was computed usable."""

from __future__ import annotations

import io
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import hpc_hess
from hpc_hess.linalg import probes
from hpc_hess.linalg.eigen import ThickRestart
from hpc_hess.linalg.operator import Enough
from hpc_hess.parallel.basis import Basis
from hpc_hess.parallel.vector import Vector
from tests.support.known_spectra import with_spectrum

N = 40
VALUES = np.concatenate([np.linspace(-1, 1, N - 3), [5.0, 8.0, 12.0]])


class Interrupted:
    """Sends SIGINT to this process within product ``number``, ``times`` times; counts products."""

    def __init__(self, operator: Any, number: int, times: int = 1) -> None:
        self.space, self.matrix, self.layout = operator.space, "matrix", operator.space.layout
        self._operator, self._number, self._times, self.count = operator, number, times, 0

    def matvec(self, v: Vector) -> Vector:
        self.count += 1
        if self.count == self._number:
            for _ in range(self._times):
                signal.raise_signal(signal.SIGINT)
        return self._operator.matvec(v)

    def taken(self, b: Any) -> tuple[Vector, bool, torch.dtype]:
        return self.space.wrap(torch.as_tensor(b).clone()), False, torch.float64


def operator(number: int = 0, times: int = 1) -> Any:
    return Interrupted(with_spectrum(torch.from_numpy(VALUES), torch.float64), number, times)


@pytest.fixture(autouse=True)
def _handler_is_put_back() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores the signal
    yield
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


def stopped(what: str, call: Callable[[], Any]) -> Any:
    with pytest.warns(RuntimeWarning, match=f"{what} was interrupted after") as said:
        result = call()
    assert len(said) == 1
    assert said[0].filename == __file__  # the user's line
    return result


# -- interrupts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [1, 2])
def test_slq_gives_the_spectrum_of_the_steps_so_far(times: int) -> None:
    """The first interrupt waits for its product, the second does not."""
    found = stopped("slq", lambda: hpc_hess.slq(operator(7, times), steps=20, probes=3))
    steps = 8 - times
    assert found.steps == steps
    whole = hpc_hess.slq(operator(), steps=steps)
    np.testing.assert_array_equal(found.alphas, whole.alphas)
    np.testing.assert_array_equal(found.betas, whole.betas)
    assert found.lambda_max == whole.lambda_max


@pytest.mark.parametrize(("number", "lengths"), [(25, [20]), (29, [20]), (30, [20, 10]), (45, [20, 20])])
def test_a_probe_counts_from_half_of_its_steps_on(number: int, lengths: list[int]) -> None:
    found = stopped("slq", lambda: hpc_hess.slq(operator(number), steps=20, probes=3))
    assert [len(alpha) for alpha in found.alphas] == lengths
    assert found.trace.count == len(lengths)
    assert np.isfinite(found.density(axis="symlog").mean).all()


def test_an_interrupt_in_the_last_product_loses_nothing() -> None:
    with pytest.warns(RuntimeWarning, match="after 20 of at most 20 products: which were all it needed"):
        found = hpc_hess.slq(operator(20), steps=20)
    assert found.steps == 20


CALLS: dict[str, Callable[[Any], Any]] = {
    "slq": lambda A: hpc_hess.slq(A, steps=5),
    "eigenpairs": lambda A: hpc_hess.eigenpairs(A, 2),
    "trace": lambda A: hpc_hess.trace(A, products=10),
    "diagonal": lambda A: hpc_hess.diagonal(A, products=10),
    "solve": lambda A: hpc_hess.solve(A, np.ones(N), damping=2.0),
    "hutch++": lambda A: hpc_hess.trace(A, method="hutch++", products=12),
    "hutchinson": lambda A: hpc_hess.trace(A, method="hutchinson", products=12),
    "diagonal hutchinson": lambda A: hpc_hess.diagonal(A, method="hutchinson", products=12),
    "sub_block": lambda A: hpc_hess.sub_block(A, ["*[:6]"], columns=1),
}


@pytest.mark.parametrize("name", CALLS)
def test_without_a_product_there_is_no_result(name: str) -> None:
    with pytest.raises(KeyboardInterrupt, match="before there was a result"):
        CALLS[name](operator(1, times=2))


@pytest.mark.parametrize(("name", "number"), [("sub_block", 3), ("hutch++", 6)])
def test_what_cannot_be_used_in_part_raises(name: str, number: int) -> None:
    A = operator(number)
    with pytest.raises(KeyboardInterrupt, match="before there was a result"):
        CALLS[name](A)
    assert A.count == number


@pytest.mark.parametrize("number", [1, 5, 9, 14, 15, 16, 30])
def test_eigenpairs_are_those_of_the_basis_so_far(number: int) -> None:
    """Their residuals are true, also just after a restart."""
    A = operator(number)
    found = stopped("eigenpairs", lambda: hpc_hess.eigenpairs(A, 2, basis_size=14, tolerance=1e-12))
    assert found.num_products == number
    assert not found.converged
    assert not found.multiplicity_resolved
    plain = operator()
    for value, residual, vector in zip(found.values, found.residuals, found.vectors, strict=True):
        image = plain.matvec(plain.space.wrap(torch.from_numpy(vector.copy()))).data.numpy()
        assert np.linalg.norm(image - value * vector) == pytest.approx(residual, rel=1e-6, abs=1e-9)


def test_residuals_after_a_restart_are_those_before_it() -> None:
    """What a search that goes on from there decides by."""
    A = with_spectrum(torch.from_numpy(VALUES), torch.float64)
    process = ThickRestart(A, Basis(A.space, 13), 12, 2, "both", 1e-12)
    process.start(probes.draw(A.space, seed=0, probe=0, distribution="gaussian"))
    while not process.full:
        process.step()
    before = process.pairs()
    process.restart()
    np.testing.assert_allclose(process.pairs().residuals, before.residuals, rtol=1e-6, atol=1e-12)
    assert before.residuals.max() > 0.1
    again = ThickRestart(A, process.basis, 12, 2, "both", 1e-12)
    again.from_state(process.to_state())
    np.testing.assert_allclose(again.pairs().residuals, before.residuals, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    ("method", "number"), [("xtrace", 4), ("xtrace", 16), ("xtrace", 22), ("hutchinson", 9), ("hutch++", 25)]
)
def test_traces_of_the_products_so_far(method: Any, number: int) -> None:
    found = stopped("trace", lambda: hpc_hess.trace(operator(number), method=method, products=30))
    half = found.half_width(1e-6)
    assert half is not None
    assert abs(found.mean - VALUES.sum()) < half
    if method == "xtrace" and number > 16:  # that of the vectors that have both of their products
        assert found.mean == pytest.approx(hpc_hess.trace(operator(), products=2 * (number - 15)).mean, rel=1e-12)
    if method == "hutchinson":
        assert found.mean == hpc_hess.trace(operator(), method=method, products=number).mean


@pytest.mark.parametrize(("method", "number"), [("xdiag", 6), ("xdiag", 24), ("hutchinson", 9)])
def test_diagonals_of_the_products_so_far(method: Any, number: int) -> None:
    found = stopped("diagonal", lambda: hpc_hess.diagonal(operator(number), method=method, products=30))
    if method == "xdiag" and number < 15:  # with the same signs
        few = hpc_hess.diagonal(operator(), method="hutchinson", products=number)
    else:
        few = hpc_hess.diagonal(operator(), method=method, products=2 * (number - 15) if method == "xdiag" else number)
    np.testing.assert_allclose(found.values, few.values, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.stderr, few.stderr, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ["minres", "cg"])
def test_a_solution_so_far(method: Any) -> None:
    b = np.random.default_rng(0).standard_normal(N)
    found = stopped("solve", lambda: hpc_hess.solve(operator(5), b, damping=2.0, method=method, tolerance=1e-12))
    few = hpc_hess.solve(operator(), b, damping=2.0, method=method, tolerance=1e-12, products=5)
    np.testing.assert_array_equal(found.x, few.x)
    assert not found.converged


def test_an_interrupt_within_a_product_leaves_the_model_as_it_was() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double(), torch.randn(8, 4).double()
    before, calls = [p.detach().clone() for p in model.parameters()], 0

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 20:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return model(batch).square().mean()

    model.train()
    found = stopped("slq", lambda: hpc_hess.slq(hpc_hess.hessian(model, [x], loss), steps=40))
    assert found.steps < 12
    assert calls == 20
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_a_handler_of_the_users_is_left_alone() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        assert hpc_hess.slq(operator(3), steps=5).steps == 5
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [signal.SIGINT]


def test_in_another_thread_there_is_no_handler() -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: hpc_hess.slq(operator(), steps=5).steps).result() == 5


# -- bars ----------------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Return what standard error is from here on; not a fixture, as pytest takes it back before the test."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr("hpc_hess.api.watching._DELAY_S", 0.0)
    return stream


@pytest.mark.parametrize("name", CALLS)
def test_a_terminal_shows_a_bar(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = terminal(monkeypatch)
    CALLS[name](operator())
    what = "trace" if name in ("hutch++", "hutchinson") else name.split()[0]
    assert f"{what}:" in stream.getvalue()
    assert "product" in stream.getvalue()


def test_it_is_silent_where_it_should_be(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = terminal(monkeypatch)
    hpc_hess.slq(operator(), steps=5, progress=False)
    other = operator()
    monkeypatch.setattr(other.space.world, "rank", 1)
    hpc_hess.slq(other, steps=5)
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stderr", pipe)
    hpc_hess.slq(operator(), steps=5)
    assert stream.getvalue() == pipe.getvalue() == ""


def test_a_short_call_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = terminal(monkeypatch)
    monkeypatch.setattr("hpc_hess.api.watching._DELAY_S", 60.0)
    hpc_hess.slq(operator(), steps=5)
    assert "slq" not in stream.getvalue()


def test_errors_pass_through() -> None:
    class Fails(Interrupted):
        def matvec(self, v: Vector) -> Vector:
            raise ValueError("of the user's")

    with pytest.raises(ValueError, match="of the user's"):
        hpc_hess.slq(Fails(operator(), 0), steps=3)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hpc_hess.slq(operator(), steps=3)
    assert issubclass(Enough, Exception)
