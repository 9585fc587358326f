"""The checksum of a row: the same however the row is cut, another one for any entry that is changed, moved or swapped."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hpc_hess.storage.checksum import ZERO, combine, multiplier, partial_checksum

FAR = st.sampled_from([0, 1, (1 << 15) - 3, 1 << 15, 3 * (1 << 15) + 7, 10**11])  # tables end at 2^15 words
rows = st.tuples(
    st.sampled_from(["<u2", "<u4", "<u8"]), st.binary(min_size=8, max_size=160), FAR, st.sampled_from([1, 7, 1100])
)


def row_of(drawn: tuple[str, bytes, int, int]) -> tuple[NDArray, int]:
    """Entries of any bits, and where they begin in the row; a long one passes the bound of short intervals."""
    kind, text, start, times = drawn
    return np.frombuffer(text[: len(text) // 8 * 8] * times, kind).copy(), start


def checksum(values: NDArray, start: int) -> int:
    """Of one interval."""
    return combine([partial_checksum(values, np.array([start]), np.array([len(values)]))])


def by_definition(values: NDArray, start: int) -> int:
    words = values.view("<u2" if values.itemsize == 2 else "<u4").tolist()
    first = start * len(words) // len(values)
    return sum(word * multiplier(first + k) for k, word in enumerate(words)) % (1 << 64) or ZERO


@settings(deadline=None)
@given(drawn=rows)
def test_is_the_sum_that_it_says(drawn: tuple[str, bytes, int, int]) -> None:
    values, start = row_of(drawn)
    assume(len(values) < 300)  # word by word
    assert checksum(values, start) == by_definition(values, start)


@settings(deadline=None)
@given(data=st.data(), drawn=rows, ranks=st.integers(1, 5))
def test_any_cut_gives_the_same(data: st.DataObject, drawn: tuple[str, bytes, int, int], ranks: int) -> None:
    """Cut into intervals, each of them on any rank, as layouts and numbers of ranks do."""
    values, start = row_of(drawn)
    ends = sorted({0, len(values), *data.draw(st.lists(st.integers(0, len(values)), max_size=8))})
    spans = list(pairwise(ends))
    owners = data.draw(st.lists(st.integers(0, ranks - 1), min_size=len(spans), max_size=len(spans)))
    parts = []
    for rank in range(ranks):
        mine = [span for span, owner in zip(spans, owners, strict=True) if owner == rank]
        held = np.concatenate([values[:0], *(values[a:b] for a, b in mine)])
        starts, lengths = (np.array(found, np.int64) for found in ([start + a for a, _ in mine], [b - a for a, b in mine]))
        parts.append(partial_checksum(held, starts, lengths))
    assert combine(parts) == checksum(values, start)


@settings(deadline=None)
@given(data=st.data(), drawn=rows)
def test_any_changed_bit_is_seen(data: st.DataObject, drawn: tuple[str, bytes, int, int]) -> None:
    values, start = row_of(drawn)
    before = checksum(values, start)
    bits = values.view(np.uint8)
    bits[data.draw(st.integers(0, len(bits) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert checksum(values, start) != before


@settings(deadline=None)
@given(data=st.data(), drawn=rows)
def test_any_two_entries_swapped_are_seen(data: st.DataObject, drawn: tuple[str, bytes, int, int]) -> None:
    values, start = row_of(drawn)
    i, j = (data.draw(st.integers(0, len(values) - 1)) for _ in range(2))
    assume(values[i] != values[j])
    before = checksum(values, start)
    values[[i, j]] = values[[j, i]]
    assert checksum(values, start) != before


@settings(deadline=None)
@given(drawn=rows, by=st.integers(1, 1 << 20))
def test_a_moved_row_is_seen(drawn: tuple[str, bytes, int, int], by: int) -> None:
    values, start = row_of(drawn)
    assume(values.any())
    assert checksum(values, start + by) != checksum(values, start)


@settings(deadline=None)
@given(data=st.data(), drawn=rows)
def test_any_two_stretches_exchanged_are_seen(data: st.DataObject, drawn: tuple[str, bytes, int, int]) -> None:
    values, start = row_of(drawn)
    length = data.draw(st.integers(1, max(1, len(values) // 2)))
    i = data.draw(st.integers(0, len(values) - length))
    j = data.draw(st.integers(0, len(values) - length))
    assume(abs(i - j) >= length and (values[i : i + length] != values[j : j + length]).any())
    other = values.copy()
    other[i : i + length], other[j : j + length] = values[j : j + length], values[i : i + length]
    assert checksum(other, start) != checksum(values, start)


@settings(deadline=None)
@given(drawn=rows)
def test_is_never_what_a_row_without_a_checksum_has(drawn: tuple[str, bytes, int, int]) -> None:
    values, start = row_of(drawn)
    assert checksum(values, start) != 0
    assert checksum(np.zeros_like(values), start) == ZERO
