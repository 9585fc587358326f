"""Probes: the published generator, the same entries whoever asks for them, and the right distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hpc_hess.linalg import probes
from hpc_hess.linalg.probes import Purpose, fill, normals, philox, signs
from hpc_hess.parallel.layout import Layout

# From kat_vectors of the Random123 library (Salmon et al., SC 2011): philox4x32, 10 rounds: counter, key -> words
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_published_known_answers(counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]) -> None:
    assert tuple(int(w) for w in philox(counter, key)) == words


def _reference(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 with Python's integers."""
    for _ in range(10):
        p0, p1 = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [(p1 >> 32) ^ counter[1] ^ key[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ counter[3] ^ key[1], p0 & 0xFFFFFFFF]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return counter


def _sign(seed: int, stream: int, i: int) -> int:
    """The documented rule, entry by entry."""
    block = i // 128
    words = _reference([block & 0xFFFFFFFF, block >> 32, stream, 0], [seed & 0xFFFFFFFF, seed >> 32])
    return -1 if (words[(i // 32) % 4] >> (i % 32)) & 1 else 1


def _normal(seed: int, stream: int, i: int, purpose: int = 1) -> float:
    block = i // 4
    words = _reference([block & 0xFFFFFFFF, block >> 32, stream, purpose], [seed & 0xFFFFFFFF, seed >> 32])
    first, second = words[2 * ((i % 4) // 2) : 2 * ((i % 4) // 2) + 2]
    radius, angle = np.sqrt(-2 * np.log((first + 0.5) / 2**32)), 2 * np.pi * (second + 0.5) / 2**32
    return float(radius * (np.sin(angle) if i % 2 else np.cos(angle)))


def test_pinned_first_entries() -> None:
    """Published with the format: a change here makes every stored run unreadable."""
    # word 0 of block 0 of key 0 is 0x6627e8d5: bits 1 0 1 0 1 0 1 1 | 0 0 0 1 0 1 1 1 from the lowest
    expected = [-1, 1, -1, 1, -1, 1, -1, -1, 1, 1, 1, -1, 1, -1, -1, -1]
    assert signs(0, 0, 0, 16).tolist() == expected
    assert signs(2026, 3, 10**11, 12).tolist() == [_sign(2026, 3, 10**11 + k) for k in range(12)]
    torch.testing.assert_close(
        normals(0, 0, 0, 4, dtype=torch.float64),
        torch.tensor([_normal(0, 0, i) for i in range(4)], dtype=torch.float64),
        rtol=1e-14,
        atol=1e-14,
    )


@pytest.mark.parametrize("start", [0, 1, 127, 128, 2**32 - 5, 2**39 - 3, 10**11 + 77, 2**40 + 1])
@pytest.mark.parametrize("seed", [0, 5, 2**40 + 17, 2**63 - 1])
def test_entries_follow_the_documented_rule(seed: int, start: int) -> None:
    """Also where the block index needs more than 32 bits (signs: index 2^39) and the seed's high word counts."""
    assert signs(seed, 2, start, 20).tolist() == [_sign(seed, 2, start + k) for k in range(20)]
    expected = [_normal(seed, 2, start + k) for k in range(20)]
    np.testing.assert_allclose(normals(seed, 2, start, 20, dtype=torch.float64).numpy(), expected, rtol=1e-13, atol=1e-14)
    # float32: a uniform within 2^-25 of 1 is rounded, which moves the smallest radii by up to 2^-12
    np.testing.assert_allclose(normals(seed, 2, start, 20).numpy(), expected, rtol=1e-5, atol=3e-4)


@pytest.mark.parametrize("draw", [signs, normals])
@pytest.mark.parametrize("offset", [0, 10**11])
def test_slices_equal_the_whole(draw: object, offset: int) -> None:
    assert callable(draw)
    whole = draw(7, 1, offset, 1000)
    for start, length in [(0, 1), (1, 3), (31, 2), (127, 2), (128, 300), (999, 1), (500, 0)]:
        assert torch.equal(draw(7, 1, offset + start, length), whole[start : start + length])


@pytest.mark.parametrize("draw", [signs, normals])
def test_chunked_drawing_has_no_seams(draw: object, monkeypatch: pytest.MonkeyPatch) -> None:
    assert callable(draw)
    whole = draw(7, 1, 130, 5000)
    monkeypatch.setattr(probes, "_CHUNK", 3)
    assert torch.equal(draw(7, 1, 130, 5000), whole)


def test_dtypes_hold_the_same_signs() -> None:
    single = signs(1, 0, 0, 300)
    for dtype in (torch.float64, torch.bfloat16):
        drawn = signs(1, 0, 0, 300, dtype=dtype)
        assert drawn.dtype == dtype
        assert torch.equal(drawn.float(), single)


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_fill_is_the_same_vector_over_any_ranks(distribution: str) -> None:
    shapes = {"a": (13, 7), "b": (3, 8, 2), "c": (5,), "d": ()}
    whole = torch.empty(Layout(shapes).num_params)
    fill(whole, *Layout(shapes).shard(0).global_intervals, seed=3, probe=1, distribution=distribution)
    for num_shards in (2, 3, 4):
        layout = Layout(shapes, num_shards, {"b": 1})
        for shard in (layout.shard(i) for i in range(num_shards)):
            local = torch.empty(shard.size)
            fill(local, *shard.global_intervals, seed=3, probe=1, distribution=distribution)
            starts, lengths = shard.global_intervals
            index = np.concatenate([np.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)])
            assert torch.equal(local, whole[index])


def test_moments_of_signs() -> None:
    n = 1 << 20
    x = signs(11, 0, 0, n, dtype=torch.float64)
    assert set(x.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(x.mean())) < 4 / np.sqrt(n)
    for lag in (1, 2, 32, 128):  # bits of one word, words of one block, blocks
        assert abs(float((x[lag:] * x[:-lag]).mean())) < 4 / np.sqrt(n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments_of_normals(dtype: torch.dtype) -> None:
    n = 1 << 20
    x = normals(11, 0, 0, n, dtype=dtype).double()
    assert torch.isfinite(x).all()
    for power, expected, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)]:
        assert abs(float((x**power).mean()) - expected) < 4 * np.sqrt(variance / n), power
    for lag in (1, 2, 3, 4):  # cosine against sine, pairs, blocks
        assert abs(float((x[lag:] * x[:-lag]).mean())) < 4 / np.sqrt(n)
    from scipy.stats import kstest

    assert kstest(x[:200_000].numpy(), "norm").pvalue > 1e-3


def test_probes_seeds_and_purposes_are_independent() -> None:
    n = 1 << 16
    vectors = [signs(s, p, 0, n).double() for s in (0, 1) for p in (0, 1, 2)]
    vectors += [normals(0, p, 0, n).double() for p in (0, 1)]
    vectors += [normals(0, 0, 0, n, purpose=Purpose.WEIGHTS).double()]
    gram = torch.stack(vectors) @ torch.stack(vectors).T / n
    off = gram - torch.diag(gram.diagonal())
    assert float(off.abs().max()) < 5 / np.sqrt(n)


def test_far_entries_cost_what_near_ones_do() -> None:
    """An offset of 1.2e11 is a counter, not a loop."""
    starts, lengths = np.array([0, 119_999_999_000]), np.array([1000, 1000])
    out = torch.empty(2000)
    fill(out, starts, lengths, seed=1, probe=0, distribution="rademacher")
    assert torch.equal(out[1000:], signs(1, 0, 119_999_999_000, 1000))
    assert not torch.equal(out[1000:], out[:1000])
