"""Blocks cover the intervals that they are made of, exactly and in order, however they are joined, split and clipped."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_hess.parallel.layout import Int64, Layout
from hpc_hess.storage.blocks import Block, bounded, clipped, overlaps, regular_blocks

Intervals = tuple[Int64, Int64]


@st.composite
def intervals(draw: st.DrawFn) -> Intervals:
    """Ascending intervals with gaps or none between them, in runs of equal ones as shards of inner dimensions have."""
    starts, lengths, at = list[int](), list[int](), draw(st.integers(0, 5))
    for length, gap, count in draw(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 4), st.integers(1, 5)), max_size=6)):
        for _ in range(count * draw(st.sampled_from([1, 1, 1, 40]))):  # beyond the 64 that are looked at together, too
            starts.append(at)
            lengths.append(length)
            at += length + gap
    return np.array(starts, np.int64), np.array(lengths, np.int64)


def places(found: Intervals) -> list[int]:
    return [place for start, length in zip(*found, strict=True) for place in range(start, start + length)]


def pairs(blocks: list[Block]) -> list[tuple[int, int]]:
    """(place here, place in the row) of every entry, in the order in which blocks move them."""
    return [
        (b.local + k * b.length + i, b.start + k * b.stride + i)
        for b in blocks
        for k in range(b.count)
        for i in range(b.length)
    ]


@settings(deadline=None)
@given(found=intervals())
def test_joined(found: Intervals) -> None:
    blocks = regular_blocks(*found)
    assert pairs(blocks) == list(enumerate(places(found)))
    for one, next_ in pairwise(blocks):  # two that could be one are one
        assert not (one.count > 1 and one.length == next_.length and next_.start == one.start + one.count * one.stride)


@settings(deadline=None)
@given(found=intervals(), itemsize=st.sampled_from([2, 4, 8]), most=st.integers(1, 200))
def test_split(found: Intervals, itemsize: int, most: int) -> None:
    blocks = bounded(regular_blocks(*found), itemsize, most)
    assert pairs(blocks) == list(enumerate(places(found)))
    assert all(b.size * itemsize <= max(most, itemsize) for b in blocks)
    assert all(b.size for b in blocks)


@settings(deadline=None)
@given(data=st.data(), found=intervals(), most=st.integers(1, 200))
def test_clipped(data: st.DataObject, found: Intervals, most: int) -> None:
    whole = list(enumerate(places(found)))
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    blocks = clipped(bounded(regular_blocks(*found), 1, most), start, stop)
    assert pairs(blocks) == [(here - start, there) for here, there in whole[start:stop]]


@settings(deadline=None)
@given(data=st.data(), found=intervals(), row=st.integers(0, 300))
def test_what_is_written_is_read(data: st.DataObject, found: Intervals, row: int) -> None:
    """Through parts of any size, into a row that holds other ranks' entries."""
    here = places(found)
    values, file = np.arange(len(here)) + 1000, np.full(max([row, *here], default=0) + 1, -1)
    most = data.draw(st.integers(1, 50))
    for start in range(0, len(here), most):
        part = values[start : start + most]
        for at, place in pairs(clipped(regular_blocks(*found), start, min(start + most, len(here)))):
            file[place] = part[at]
    assert file[here].tolist() == values.tolist()
    assert (np.delete(file, here) == -1).all()


@settings(deadline=None)
@given(mine=intervals(), theirs=intervals())
def test_shared(mine: Intervals, theirs: Intervals) -> None:
    here, there = ({place: at for at, place in enumerate(places(each))} for each in (mine, theirs))
    shared = overlaps(mine, theirs)
    moved = [(a + i, b + i) for a, b, length in shared for i in range(length)]
    assert moved == [(here[place], there[place]) for place in sorted(here.keys() & there.keys())]
    for one, next_ in pairwise(shared):  # as few as they can be
        assert (one[0] + one[2], one[1] + one[2]) != next_[:2]


@settings(deadline=None)
@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    before=st.integers(1, 6),
    after=st.integers(1, 6),
    dim=st.integers(0, 2),
)
def test_rows_go_to_other_ranks(shape: list[int], before: int, after: int, dim: int) -> None:
    """A vector written on some ranks and read on others is the same."""
    table = {"a": tuple(shape), "b": (3,)}
    old, new = (Layout(table, ranks, {"a": dim % len(shape)}) for ranks in (before, after))
    for reader in map(new.shard, range(after)):
        read = np.full(reader.size, -1, np.int64)
        for writer in map(old.shard, range(before)):
            held = np.array(places(writer.file_intervals), np.int64)
            for to, at, length in overlaps(reader.file_intervals, writer.file_intervals):
                read[to : to + length] = held[at : at + length]
        assert read.tolist() == places(reader.file_intervals)
