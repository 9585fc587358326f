"""The sketches by name, each defined once, as a chain of factors; its transpose is the chain read backwards.

With blocks x_b of M entries, H an orthonormal transform of M entries, R_D the first D coordinates, and B_b, G_b, Pi_b
random signs, normals and permutations of each block (Schioppa 2024, table and section 3):

    affd   sqrt(M / D) R_D H' sum_b G_b H B_b x_b
    afjl   sqrt(M / D) sum_b G_b R_D H B_b x_b
    qk     sqrt(N / D) (Q_1 x ... x Q_K) x, Q_i the first rows of Haar matrices, over the whole vector
    ffd    sum_b B_b H Pi_b G_b H x_b, M = D: the transpose of Fastfood
    fjl    sum_b S_b H B_b x_b / sqrt D, S_b sparse Gaussian
    gaussian, rademacher   dense matrices / sqrt D, made on the fly

H' is the same for all blocks, so that it is applied once, to the sum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from hpc_hess.config import SketchSection
from hpc_hess.errors import ConfigError
from hpc_hess.sketch.factors import Collect, Dense, Factor, Gaussians, Mix, Permutations, Same, Signs, Sparse, Sum
from hpc_hess.sketch.transforms import Kronecker, Preconditioner, Transform, haar, spreading

Kind = Literal["affd", "afjl", "qk", "ffd", "fjl", "gaussian", "rademacher"]
KINDS: tuple[str, ...] = get_args(Kind)
_BLOCK = 1 << 16  # entries, where D is smaller: smaller ones spread less, larger ones are shared by more ranks
_LARGEST_QK_BLOCK = 1 << 20


@dataclass(frozen=True)
class Chain:
    """A sketch's parts: ``factors`` act on each block, ``collect`` joins the blocks, ``tail`` acts on the result."""

    block: int  # M
    collected: int  # entries of what is collected
    factors: tuple[Factor, ...]
    collect: Collect
    tail: Transform | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class SketchSettings:
    """Which sketch: its kind, its dimension D (a power of two), the transform within it, the seed of its streams."""

    kind: Kind = "affd"
    dimension: int = 1 << 13
    preconditioner: Preconditioner = "hadamard"
    seed: int = 0
    block: int = 0  # entries of a block, a power of two; 0: chosen

    def __post_init__(self) -> None:
        for name in ("dimension", "block"):
            value = getattr(self, name)
            if value < (name == "dimension") or value & (value - 1):
                raise ConfigError(f"sketch.{name} = {value} is not valid: it should be a power of two")

    @classmethod
    def of(cls, section: SketchSection, **changes: Any) -> SketchSettings:
        """Return what [sketch] asks for, with ``changes``. Raises ConfigError."""
        return cls(**(section.model_dump() | changes))


def chain(settings: SketchSettings, size: int) -> Chain:
    """Return the sketch of ``settings`` for vectors of ``size`` entries."""
    D, seed, kind = settings.dimension, settings.seed, settings.kind
    if kind == "qk":
        return _qk(settings, size)
    M = settings.block or max(D, min(_BLOCK, _power_above(size)))
    if kind == "ffd":
        M = D
    if kind in ("affd", "afjl") and D > M:
        raise ConfigError(f"sketch.dimension = {D} is not valid: it should be at most the block of {M} entries")
    blocks = -(-size // M)

    def transform(which: int, rows: int, *, columns: bool = False) -> Transform:
        return spreading(settings.preconditioner, M, rows, seed, which, permute="columns" if columns else "rows")

    if kind == "affd":
        within: tuple[Factor, ...] = (Signs(seed), Same(transform(0, M)), Gaussians(seed, M, blocks))
        return Chain(M, M, within, Sum(), transform(1, D, columns=True), math.sqrt(M / D))
    if kind == "afjl":
        within = (Signs(seed), Same(transform(0, D)), Gaussians(seed, D, blocks))
        return Chain(M, D, within, Sum(), None, math.sqrt(M / D))
    if kind == "ffd":
        first, second = Same(transform(0, M)), Same(transform(1, M))
        return Chain(M, D, (first, Gaussians(seed, M, blocks), Permutations(seed), second, Signs(seed)), Sum())
    if kind == "fjl":
        entries = max(1, math.ceil(D * math.log2(max(size, 2)) ** 2 / blocks))
        within = (Signs(seed), Same(transform(0, M)))
        return Chain(M, D, within, Sparse(seed, D, M, entries), None, 1 / math.sqrt(D))
    return Chain(M, D, (), Dense(seed, D, M, gaussian=kind == "gaussian"), None, 1 / math.sqrt(D))


def _qk(settings: SketchSettings, size: int) -> Chain:
    """The last factors act within a block of M entries, the first one across the blocks."""
    across = 1 << -(-_power_above(size).bit_length() // 3)  # about the cube root of the whole
    M = settings.block or min(across**2, _LARGEST_QK_BLOCK)
    blocks = -(-size // M)
    columns = [blocks, *_halves(M)]
    rows = _shares(settings.dimension, columns)
    matrices = [haar(row, column, settings.seed, k) for k, (row, column) in enumerate(zip(rows, columns, strict=True))]
    scale = math.sqrt(math.prod(columns) / settings.dimension)
    within = (Same(Kronecker(matrices[1:])),)
    return Chain(M, settings.dimension, within, Mix(matrices[0]), None, scale)


def _power_above(size: int) -> int:
    """Return the smallest power of two that is not below ``size``."""
    return 1 << (size - 1).bit_length()


def _halves(size: int) -> list[int]:
    bits = size.bit_length() - 1
    return [1 << (bits - bits // 2), 1 << bits // 2]


def _shares(dimension: int, columns: list[int]) -> list[int]:
    """Cut D into powers of two, one for each factor, as equal as their columns allow."""
    rows = [1] * len(columns)
    while math.prod(rows) < dimension:
        able = [i for i, (row, column) in enumerate(zip(rows, columns, strict=True)) if 2 * row <= column]
        if not able:
            raise ConfigError(f"sketch.dimension = {dimension} is larger than the vector that is sketched")
        smallest = min(able, key=lambda i: (rows[i], -columns[i]))
        rows[smallest] *= 2
    return rows
