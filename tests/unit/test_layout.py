"""Layout: who owns which entries, on paper, against NumPy and torch.chunk."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest
import torch

from hpc_hess.errors import LayoutError
from hpc_hess.parallel.layout import Layout, Shard

SHAPES: dict[str, tuple[int, ...]] = {
    "z.last": (7,),
    "experts": (3, 8, 12),
    "embed": (17, 5),
    "one": (1, 6),
    "scalar": (),
    "tall": (2, 24, 4),
}


def expand(intervals: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Every index of (starts, lengths), in order."""
    starts, lengths = intervals
    pieces = [np.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)]
    return np.concatenate(pieces) if pieces else np.empty(0, np.int64)


def owned(shard: Shard) -> np.ndarray:
    """The entries that torch.chunk gives a rank, by the full model's numbering, in local-vector order."""
    names = sorted(SHAPES)
    sizes = [math.prod(SHAPES[name]) for name in names]
    offsets = dict(zip(names, itertools.accumulate([0, *sizes]), strict=False))
    parts = []
    for piece in shard.pieces:
        parameter = piece.parameter
        whole = torch.arange(parameter.numel).reshape(parameter.shape or (1,)) + offsets[parameter.name]
        chunks = torch.chunk(whole, shard.layout.num_shards, dim=parameter.shard_dim)
        parts.append(chunks[shard.index].flatten() if shard.index < len(chunks) else torch.empty(0, dtype=torch.int64))
        assert len(parts[-1]) == math.prod(piece.local_shape) == piece.stop - piece.start
    return torch.cat(parts).numpy()


@pytest.mark.parametrize("num_shards", [1, 2, 3, 4, 5, 8, 40])
@pytest.mark.parametrize("dims", [{}, {"experts": 1}, {"experts": 2, "tall": 1, "embed": 1}])
def test_shards_are_what_torch_chunk_cuts(num_shards: int, dims: dict[str, int]) -> None:
    layout = Layout(SHAPES, num_shards, dims)
    shards = [layout.shard(i) for i in range(num_shards)]
    for shard in shards:
        np.testing.assert_array_equal(expand(shard.global_intervals), owned(shard))
        np.testing.assert_array_equal(expand(shard.file_intervals), owned(shard))
        assert shard.size == len(owned(shard))
    everything = np.concatenate([expand(s.global_intervals) for s in shards])
    np.testing.assert_array_equal(np.sort(everything), np.arange(sum(map(math.prod, SHAPES.values()))))


@pytest.mark.parametrize("num_shards", [1, 3, 8])
def test_intervals_are_ascending_merged_and_int64(num_shards: int) -> None:
    for shard in (Layout(SHAPES, num_shards, {"experts": 1}).shard(i) for i in range(num_shards)):
        starts, lengths = shard.global_intervals
        assert starts.dtype == lengths.dtype == np.int64
        assert (lengths > 0).all()
        assert (starts[1:] > (starts + lengths)[:-1]).all()  # a gap between any two


def test_one_shard_is_one_interval() -> None:
    layout = Layout(SHAPES)
    starts, lengths = layout.shard(0).file_intervals
    assert (starts.tolist(), lengths.tolist()) == ([0], [layout.num_params])


def test_dimension_0_gives_one_interval_a_parameter_another_one_per_outer_index() -> None:
    assert len(Layout({"a": (8, 6)}, 2).shard(1).global_intervals[0]) == 1
    starts, lengths = Layout({"a": (3, 8, 2)}, 4, {"a": 1}).shard(1).global_intervals
    assert (starts.tolist(), lengths.tolist()) == ([4, 20, 36], [4, 4, 4])


def test_a_rank_with_nothing() -> None:
    layout = Layout({"a": (2, 3), "b": ()}, 4)
    assert [layout.shard(i).size for i in range(4)] == [4, 3, 0, 0]
    shard = layout.shard(3)
    assert [len(part) for part in shard.global_intervals] == [0, 0]
    assert [piece.local_shape for piece in shard.pieces] == [(0, 3), (0,)]


def test_a_scalar_belongs_to_shard_0() -> None:
    layout = Layout({"a": (4,), "s": ()}, 2)
    assert layout.shard(0).pieces[1].local_shape == ()
    np.testing.assert_array_equal(expand(layout.shard(0).global_intervals), [0, 1, 4])
    np.testing.assert_array_equal(expand(layout.shard(1).global_intervals), [2, 3])


@pytest.mark.parametrize("num_shards", [1, 3, 5])
def test_a_subset_compacts_the_file_but_not_the_global_index(num_shards: int) -> None:
    full, part = Layout(SHAPES, num_shards), Layout(SHAPES, num_shards, selected={"experts", "tall"})
    place = {p.name: p for p in full.parameters}
    assert [p.name for p in part.parameters] == ["experts", "tall"]
    assert [p.global_offset for p in part.parameters] == [place[n].global_offset for n in ("experts", "tall")]
    assert [p.file_offset for p in part.parameters] == [0, place["experts"].numel]
    assert part.num_params == place["experts"].numel + place["tall"].numel
    assert part.num_params_full == full.num_params_full == full.num_params
    files = np.concatenate([expand(part.shard(i).file_intervals) for i in range(num_shards)])
    np.testing.assert_array_equal(np.sort(files), np.arange(part.num_params))
    # the k-th entry of the file is the k-th selected entry of the model
    selected = np.concatenate([place[n].global_offset + np.arange(place[n].numel) for n in ("experts", "tall")])
    for shard in (part.shard(i) for i in range(num_shards)):
        np.testing.assert_array_equal(selected[expand(shard.file_intervals)], expand(shard.global_intervals))


def test_order_of_the_table_does_not_matter() -> None:
    backwards = dict(reversed(list(SHAPES.items())))
    a, b = Layout(SHAPES, 3), Layout(backwards, 3)
    assert a.parameters == b.parameters
    assert a.fingerprint == b.fingerprint


def test_fingerprint_changes_with_names_shapes_and_selection_only() -> None:
    base = Layout(SHAPES).fingerprint
    assert Layout(SHAPES, 7, {"experts": 2}).fingerprint == base  # the number of ranks is no part of the numbering
    assert Layout(SHAPES, selected=set(SHAPES)).fingerprint == base
    changed = [
        Layout({**SHAPES, "more": (1,)}).fingerprint,
        Layout({**SHAPES, "embed": (5, 17)}).fingerprint,
        Layout({("y.last" if k == "z.last" else k): v for k, v in SHAPES.items()}).fingerprint,
        Layout(SHAPES, selected={"embed"}).fingerprint,
        Layout(SHAPES, selected={"experts"}).fingerprint,
    ]
    assert len({base, *changed}) == 6


def test_bad_selections() -> None:
    with pytest.raises(LayoutError, match="no parameter is selected"):
        Layout(SHAPES, selected=set())
    with pytest.raises(LayoutError, match=r"do not exist in the model: \['nowhere'\]"):
        Layout(SHAPES, selected={"embed", "nowhere"})


def _dense_120b() -> dict[str, tuple[int, ...]]:
    """A Llama shape of 1.2e11 parameters."""
    hidden, inner, vocab, layers = 10240, 36864, 128256, 92
    shapes: dict[str, tuple[int, ...]] = {"embed": (vocab, hidden), "head": (vocab, hidden), "norm": (hidden,)}
    for i in range(layers):
        for name, shape in {"q": (hidden, hidden), "k": (1280, hidden), "v": (1280, hidden), "o": (hidden, hidden)}.items():
            shapes[f"layers.{i}.{name}"] = shape
        for name in ("gate", "up"):
            shapes[f"layers.{i}.{name}"] = (inner, hidden)
        shapes[f"layers.{i}.down"] = (hidden, inner)
        shapes[f"layers.{i}.norm"] = (hidden,)
    return shapes


@pytest.mark.parametrize("dims", [0, 1])
def test_120_billion_parameters_in_seconds(dims: int) -> None:
    shapes = _dense_120b()
    if dims:  # experts [E, out, in] that shard on dimension 1
        shapes = {f"layers.{i}.experts": (8, 14336 * 2, 5632) for i in range(92)}
        shapes["embed"] = (128256, 10240)
    num_shards = 512
    began = time.process_time()
    layout = Layout(shapes, num_shards, {n: 1 for n in shapes if n.endswith("experts")})
    assert 1.1e11 < layout.num_params < 1.3e11
    total, previous = 0, -1
    for i in range(num_shards):
        starts, lengths = layout.shard(i).file_intervals
        assert starts.dtype == np.int64
        assert int(starts[0]) > previous  # each shard begins behind the one before
        previous = int(starts[0])
        assert int((starts + lengths).max()) <= layout.num_params
        total += int(lengths.sum())
    assert total == layout.num_params
    assert time.process_time() - began < 15
    # the last entry of the model is the last entry of the last shard that has rows of the last parameter
    ends = [int((s + n).max()) for s, n in (layout.shard(i).global_intervals for i in range(num_shards - 12, num_shards))]
    assert max(ends) == layout.num_params
