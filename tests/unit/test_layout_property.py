"""Layouts of any shapes, sharded dimensions, world sizes and selections: every entry belongs to one rank, in order."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_hess.parallel.layout import Int64, Layout

shapes = st.lists(st.integers(1, 5), max_size=4).map(tuple)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Layout, dict[str, tuple[int, ...]]]:
    """A layout, and the shapes of the whole model."""
    table = draw(st.dictionaries(st.text("abz.", min_size=1, max_size=4), shapes, min_size=1, max_size=5))
    dims = {name: draw(st.integers(0, len(shape) - 1)) for name, shape in table.items() if shape and draw(st.booleans())}
    selected = draw(st.none() | st.sets(st.sampled_from(sorted(table)), min_size=1))
    return Layout(table, draw(st.integers(1, 9)), dims, selected), table


def places(intervals: tuple[Int64, Int64]) -> Int64:
    """Every index of the intervals, in their order."""
    return np.concatenate([np.empty(0, np.int64), *(np.arange(s, s + n) for s, n in zip(*intervals, strict=True))])


@settings(deadline=None)
@given(case=layouts())
def test_every_entry_belongs_to_one_rank(case: tuple[Layout, dict[str, tuple[int, ...]]]) -> None:
    layout, table = case
    shards = [layout.shard(rank) for rank in range(layout.num_shards)]
    assert sorted(np.concatenate([places(shard.file_intervals) for shard in shards])) == list(range(layout.num_params))
    whole, offset = [], 0  # where the selected parameters lie in the whole model's vector
    for name in sorted(table):
        count = math.prod(table[name])
        whole += list(range(offset, offset + count)) if name in {p.name for p in layout.parameters} else []
        offset += count
    assert layout.num_params_full == offset
    assert sorted(np.concatenate([places(shard.global_intervals) for shard in shards])) == whole


@settings(deadline=None)
@given(case=layouts())
def test_a_rank_holds_its_slice_of_each_parameter(case: tuple[Layout, dict[str, tuple[int, ...]]]) -> None:
    """Cut as torch.chunk cuts, empty shards included; offsets, sizes and intervals say the same."""
    layout, _ = case
    for rank in range(layout.num_shards):
        shard = layout.shard(rank)
        held, expected, start = places(shard.file_intervals), list[int](), 0
        for piece in shard.pieces:
            p = piece.parameter
            entries = np.arange(p.numel).reshape(p.shape or (1,)) + p.file_offset
            rows = -(-entries.shape[p.shard_dim] // layout.num_shards)
            mine = np.take(entries, range(entries.shape[p.shard_dim])[rank * rows : (rank + 1) * rows], p.shard_dim)
            assert (piece.start, piece.stop) == (start, start + mine.size)
            assert math.prod(piece.local_shape) == mine.size
            assert piece.local_shape == (mine.shape if p.shape else mine.shape[: mine.size == 0])
            assert len(piece.interval_starts) * piece.interval_length == mine.size
            expected += mine.flatten().tolist()
            start = piece.stop
        assert held.tolist() == expected
        assert shard.size == start


@settings(deadline=None)
@given(case=layouts())
def test_intervals_are_as_few_as_they_can_be(case: tuple[Layout, dict[str, tuple[int, ...]]]) -> None:
    """Ascending, not empty, and none begins where the one before it ends; both numberings cut the vector alike."""
    layout, _ = case
    for rank in range(layout.num_shards):
        shard = layout.shard(rank)
        for starts, lengths in (shard.file_intervals, shard.global_intervals):
            assert (lengths > 0).all()
            assert (starts[1:] > starts[:-1] + lengths[:-1]).all()
            assert int(lengths.sum()) == shard.size


@settings(deadline=None)
@given(case=layouts(), ranks=st.integers(1, 9))
def test_a_vector_keeps_its_order_on_any_number_of_ranks(
    case: tuple[Layout, dict[str, tuple[int, ...]]], ranks: int
) -> None:
    layout, table = case
    names = {p.name for p in layout.parameters}
    other = Layout(table, ranks, {p.name: p.shard_dim for p in layout.parameters}, names)
    assert other.fingerprint == layout.fingerprint
    assert [(p.name, p.file_offset, p.global_offset) for p in other.parameters] == [
        (p.name, p.file_offset, p.global_offset) for p in layout.parameters
    ]
