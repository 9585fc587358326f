"""Storing theta + step v: rounded once to the nearest, or dithered so that small steps survive on average."""

import math

import pytest
import torch

from hpc_hess.parallel import kernels

SPACING = 2.0**-23  # of float32 numbers in [1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_to_the_nearest_and_what_was_realised(dtype):
    base, direction = (torch.randn(300_001, dtype=dtype) for _ in range(2))
    out = torch.empty_like(base)
    along = kernels.displace(out, base, direction, 1e-3)
    assert torch.equal(out, torch.add(base, direction, alpha=1e-3))
    exact = float((out - base).double() @ direction.double())
    assert float(along) == pytest.approx(exact, rel={torch.float32: 1e-7, torch.float64: 1e-12}[dtype])


@pytest.mark.parametrize("size", [1, 4095, 4097, 3_000_001])
def test_moments(size):
    v = torch.randn(size)
    exact = v.double().square()
    assert kernels.moments(v).tolist() == pytest.approx([exact.sum().item(), exact.square().sum().item()], rel=3e-7)


@pytest.mark.parametrize("share", [0.3, -0.3, 1.7])
def test_dithered_steps_are_right_on_average_where_the_nearest_loses_them(share):
    base = torch.full((200_000,), 1.5)
    direction, out = torch.full_like(base, share), torch.empty_like(base)
    wanted = share * SPACING
    kernels.displace(out, base, direction, SPACING)
    nearest = (out - base).double().mean().item()
    assert nearest == round(share) * SPACING
    kernels.displace(out, base, direction, SPACING, dither=True)
    moved = (out - base).double()
    assert moved.mean().item() == pytest.approx(wanted, abs=0.01 * SPACING)
    low = math.floor(share) * SPACING
    assert set(moved.unique().tolist()) == {low, low + SPACING}  # always to one of the two neighbours


def test_what_float32_holds_is_not_dithered():
    base = torch.arange(1.0, 1000.0)
    direction, out = torch.ones_like(base), torch.empty_like(base)
    assert kernels.displace(out, base, direction, 0.5, dither=True).item() == 0.5 * len(base)
    assert torch.equal(out, base + 0.5)
    again = torch.empty_like(base)
    kernels.displace(out, base, direction, 1e-8, dither=True)
    kernels.displace(again, base, direction, 1e-8, dither=True)
    assert torch.equal(out, again)
