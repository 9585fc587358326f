"""Exact sub-blocks against dense matrices: selections, any number of ranks, stopped between two batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from hpc_hess.errors import ConfigError
from hpc_hess.linalg.keeping import KeepNothing
from hpc_hess.parallel.layout import Layout
from hpc_hess.parallel.vector import Vector
from hpc_hess.parallel.world import World
from hpc_hess.studies.sub_block.compute import Room, describe, heat_map, select, sub_block
from tests.support.cut_matrix import SHAPES, SIZE, make_space, operator_of
from tests.support.spawn import run_ranks

TEXTS = [
    "layers.0.attn.q_proj.weight[-1, :]",
    "layers.1.*[0:2]",
    "scale",
    "layers.1.attn.o_proj.weight[1:, 2:4]",
    "layers.1.mlp.weight[::-2, 1::3]",
]


def expected() -> list[int]:
    """The same entries by NumPy's own indexing."""
    position, whole = 0, {}
    for name in sorted(SHAPES):
        count = int(np.prod(SHAPES[name]))
        whole[name] = np.arange(position, position + count).reshape(SHAPES[name])
        position += count
    o_proj, mlp = whole["layers.1.attn.o_proj.weight"], whole["layers.1.mlp.weight"]
    return [
        *whole["layers.0.attn.q_proj.weight"][-1, :],
        *sorted({*o_proj.ravel()[:2], *o_proj[1:, 2:4].ravel()}),
        *sorted({*mlp.ravel()[:2], *mlp[::-2, 1::3].ravel()}),
        *whole["layers.1.norm.weight"].ravel()[:2],
        *whole["scale"].ravel(),
    ]


def not_quite_symmetric() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((SIZE, SIZE))


def assembled(world: World, columns: int) -> np.ndarray:
    space = make_space(world)
    return sub_block(operator_of(space, not_quite_symmetric()), select(space.layout, TEXTS), columns=columns)


def test_the_entries_of_the_matrix_on_one_two_and_three_ranks() -> None:
    entries = expected()
    selection = select(Layout(SHAPES), TEXTS)
    assert selection.entries.tolist() == entries
    assert sum(selection.counts) == len(entries)
    assert selection.parameters == sorted(selection.parameters)
    wanted = not_quite_symmetric()[np.ix_(entries, entries)]
    for ranks in (1, 2, 3):
        for found in run_ranks(assembled, ranks, 4):
            np.testing.assert_array_equal(found, wanted)


class StopError(Exception):
    """The job ends here."""


class Recorded(KeepNothing):
    """Keeps vectors in a list, and stops before the second batch of them that is new."""

    def __init__(self, kept: list[list[Vector]]) -> None:
        self.kept, self.asked, self.new = kept, 0, 0

    def vectors(self, make: Callable[[], Sequence[Vector]]) -> list[Vector]:
        self.asked += 1
        if self.asked > len(self.kept):
            self.new += 1
            if self.new > 1:
                raise StopError
            self.kept.append(list(make()))
        return self.kept[self.asked - 1]


def test_stopped_between_two_batches() -> None:
    space = make_space(World.alone())
    operator = operator_of(space, not_quite_symmetric())
    selection = select(space.layout, TEXTS)
    kept: list[list[Vector]] = []
    for _ in range(20):
        try:
            found = sub_block(operator, selection, columns=3, keep=Recorded(kept))
            break
        except StopError:
            pass
    assert len(kept) == -(-len(selection.entries) // 3)
    assert operator.num_products == len(selection.entries)  # each once
    np.testing.assert_array_equal(found, sub_block(operator, selection, columns=100))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layers.0.attn.q_prj.weight[0]", "no parameter .* called '.*q_prj.weight': 'layers.0.attn.q_proj.weight'"),
        ("embed.weight[5, 0]", r"goes beyond the parameter's shape \[5, 2\]"),
        ("embed.weight[0, 0, 0]", r"has 3 indices, the parameter's shape is \[5, 2\]"),
        ("embed.weight[::0]", "step of .* is 0"),
        ("embed.weight[a]", "'a' in .* is neither an index nor a range"),
        ("embed.weight[", "is not a parameter's name with indices"),
        ("embed.weight[3:3]", "selects no entry"),
    ],
)
def test_what_is_no_selection(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        select(Layout(SHAPES), [text])


def test_entries_are_counted_before_they_are_listed() -> None:
    large = Layout({"a.weight": (1 << 20, 1 << 17), "b.weight": (3, 5)})  # as indices a terabyte
    room = Room(memory=8 * 6 * 100**2, disk=8 * 2 * 50**2)
    with pytest.raises(ConfigError, match=r"selects 137,438,953,487 entries, .* room for 50 at most: select fewer"):
        select(large, ["*"], room)
    with pytest.raises(ConfigError, match="selects 71 entries, .* room for 50 at most"):
        select(large, ["a.weight[:50]", "*[0:5, 0:3]"], room)
    assert len(select(large, ["a.weight[7, :50]", "a.weight[7, 10:40]"], room).entries) == 50  # each counts once
    assert len(select(large, ["a.weight[7, :100]"], Room(8 * 6 * 100**2, None)).entries) == 100


def test_what_is_said_of_a_matrix() -> None:
    a = np.random.default_rng(2).standard_normal((40, 40))
    matrix = a + a.T + 3 * np.eye(40)
    said = describe(matrix, seed=0)
    diagonal = np.diag(matrix)
    assert said["diagonal_share"] == pytest.approx((diagonal**2).sum() / (matrix**2).sum())
    assert said["frobenius"] == pytest.approx(np.linalg.norm(matrix))
    assert [said["lambda_min"], said["lambda_max"]] == pytest.approx(np.linalg.eigvalsh(matrix)[[0, -1]])
    expected_errors = said["diagonal_error_of_one"] / np.sqrt(said["samples"])
    assert np.all(np.abs(np.log(np.array(said["diagonal_errors"]) / expected_errors)) < 0.5)
    heat = heat_map(np.kron(np.arange(1.0, 5).reshape(2, 2), -np.ones((3, 3))), cells=2)
    np.testing.assert_allclose(heat, [[-1, -2], [-3, -4]])
