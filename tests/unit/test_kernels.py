"""Local kernels against plain float64 NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hpc_hess.parallel import kernels

DTYPES = [torch.bfloat16, torch.float32, torch.float64]


def _data(rows: int, size: int, row_dtype: torch.dtype, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    generator = torch.Generator().manual_seed(rows + size)
    v = torch.randn(rows, size, generator=generator, dtype=torch.float64).to(row_dtype)
    w = torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
    return v, w, np.random.default_rng(rows).standard_normal(rows)


def _np(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().numpy()


def _scale(v: torch.Tensor, w: torch.Tensor) -> float:
    return float(_np(v.abs()).max() * np.abs(_np(w)).sum())


@pytest.mark.parametrize("row_dtype", DTYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (3, 1000), (5, 70_001), (40, 12_345), (4, 0)])
def test_against_numpy(rows: int, size: int, row_dtype: torch.dtype, dtype: torch.dtype) -> None:
    v, w, c = _data(rows, size, row_dtype, dtype)
    coefficients = torch.from_numpy(c)
    short_blocks = v.dtype == w.dtype == torch.float32 and rows > 1
    exact = (1e-8 if short_blocks else 1e-14) * (_scale(v, w) if size else 1.0)
    projected = kernels.project(v, w)
    assert projected.dtype == torch.float64
    np.testing.assert_allclose(projected.numpy(), _np(v) @ _np(w), atol=exact)
    np.testing.assert_allclose(kernels.dot(w, w).numpy(), [_np(w) @ _np(w)], rtol=1e-13)

    rounding = 4 * torch.finfo(dtype).eps * (1 + np.abs(c).sum() * (_np(v.abs()).max() if size else 1))
    subtracted = w.clone()
    again = kernels.subtract_then_project(v, subtracted, coefficients)
    np.testing.assert_allclose(_np(subtracted), _np(w) - _np(v).T @ c, atol=rounding)
    # the second projection is of the vector as stored, not of its exact value
    expected = _np(v) @ _np(subtracted)
    np.testing.assert_allclose(again.numpy(), expected, rtol=1e-6 if short_blocks else 1e-12, atol=10 * exact)

    remainder = w.clone()
    square = kernels.subtract_then_square(v, remainder, coefficients)
    assert torch.equal(remainder, subtracted)
    np.testing.assert_allclose(square.numpy(), [_np(remainder) @ _np(remainder)], rtol=1e-13)

    out = torch.full((size,), 7.0, dtype=dtype)
    kernels.combine(v, coefficients, out)
    np.testing.assert_allclose(_np(out), _np(v).T @ c, atol=rounding)


@pytest.mark.parametrize("cache", [1, 4096, 1 << 26])
def test_the_block_size_changes_no_value_beyond_rounding(cache: int, monkeypatch: pytest.MonkeyPatch) -> None:
    v, w, c = _data(6, 9_999, torch.float32, torch.float32)
    monkeypatch.setattr(kernels, "_THREAD_ENTRIES", cache)
    monkeypatch.setattr(kernels, "_FLOAT32_WIDTH", cache)
    assert (len(list(kernels._blocks(6, 9_999, w.device))) > 1) == (cache < 1 << 26)
    np.testing.assert_allclose(kernels.project(v.double(), w).numpy(), _np(v) @ _np(w), rtol=1e-11)
    np.testing.assert_allclose(kernels.project(v, w).numpy(), _np(v) @ _np(w), atol=1e-8 * _scale(v, w))
    kernels.subtract_then_square(v, w, torch.from_numpy(c))
    expected = _np(_data(6, 9_999, torch.float32, torch.float32)[1]) - _np(v).T @ c
    np.testing.assert_allclose(_np(w), expected, atol=1e-6)


def test_sums_are_float64_over_float32_data() -> None:
    """One large and many small terms: a float32 sum loses the small ones (on a real model that moved alpha by 3e-3)."""
    a = torch.full((1 << 16,), 1e-4)
    a[0] = 1e4
    exact = float(_np(a) @ _np(a))
    assert float(kernels.dot(a, a)) == pytest.approx(exact, rel=1e-12)
    assert float(kernels.project(a[None], a)) == pytest.approx(exact, rel=1e-12)
    lost = float(torch.dot(a, a))
    assert abs(lost - exact) > 1e-4  # what float32 would have given


def test_rows_of_a_wider_matrix() -> None:
    """A window of a ring is a slice of rows; its columns are contiguous, its rows need not start at 0."""
    v, w, _ = _data(8, 5_000, torch.float32, torch.float64)
    np.testing.assert_allclose(kernels.project(v[3:6], w).numpy(), _np(v)[3:6] @ _np(w), rtol=1e-10)


@pytest.mark.parametrize("size", [1, 4097, 3 << 18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_difference_is_that_of_its_three_steps_to_the_last_bit(size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(size, generator=generator, dtype=dtype) for _ in range(2))
    steps = a.clone().add_(b, alpha=-1.0).mul_(1 / 3)
    square = kernels.difference(a, b, 1 / 3)
    assert torch.equal(a, steps)
    assert torch.equal(square, kernels.dot(steps, steps))
