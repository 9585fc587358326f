"""Norms under sketches: random, sparse and adversarial vectors; the known weakness of Fastfood.

Schioppa 2024: an epsilon-delta property for AFFD and QK, theorem 3.1 against FFD. The adversary knows the definition, not
the seed: vectors that one of the fixed transforms maps to a coordinate, and pairs of coordinates that differ in high bits
only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated

import torch

from benchmarks.frame import Table, benchmark
from hpc_hess.sketch.kinds import Kind, SketchSettings
from hpc_hess.sketch.sketch import Sketch
from hpc_hess.sketch.transforms import hadamard

SIZE = 300_001  # odd
Vectors = Callable[[int], torch.Tensor]


def dense(k: int) -> torch.Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(k), dtype=torch.float64)


def sparse(k: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(k)
    x = torch.zeros(SIZE, dtype=torch.float64)
    places = torch.randint(SIZE, (1 + k % 10,), generator=generator)
    x[places] = torch.randn(len(places), generator=generator, dtype=torch.float64)
    return x


def pairs(k: int) -> torch.Tensor:
    """Two equal entries 2^15 apart: their columns of a Hadamard matrix agree but in half of the blocks of rows."""
    x = torch.zeros(SIZE, dtype=torch.float64)
    x[k] = x[k + (1 << 15)] = 1.0
    return x


def concentrated(D: int) -> Vectors:
    """A column of the transform that Fastfood applies first: H x = e_i in one block."""
    columns = hadamard(64)  # any column of a Kronecker factor; the others are constant

    def vector(k: int) -> torch.Tensor:
        x = torch.zeros(SIZE, dtype=torch.float64)
        outer = D // 64
        x[:D] = torch.kron(columns[k % 64], torch.ones(outer, dtype=torch.float64))
        return x

    return vector


def spread(kind: Kind, D: int, vectors: Vectors, count: int) -> dict[str, float]:
    """Return mean, spread and the share beyond 20 % of |Phi x|^2 / |x|^2; each vector has a seed of its own."""
    ratios = []
    for k in range(count):
        sketch, x = Sketch(SIZE, SketchSettings(kind=kind, dimension=D, seed=k)), vectors(k)
        collection = sketch.begin(x.device)
        places = x.nonzero().flatten()
        if len(places) < 100:  # only where it is not zero
            sketch.add(collection, x[places], places.tolist(), [1] * len(places))
        else:
            sketch.add(collection, x, [0], [SIZE])
        ratios.append(float(sketch.end(collection).square().sum() / x.square().sum()))
    r = torch.tensor(ratios)
    return {"mean": float(r.mean()), "spread": float(r.std()), "beyond 20 %": float(((r - 1).abs() > 0.2).double().mean())}


@benchmark("Norms of sketched vectors")
def main(table: Table, count: Annotated[int, "vectors of each sort"] = 1000, bits: int = 10) -> None:
    D = 1 << bits
    table.settings["N"] = SIZE
    table.note = (
        f"|Phi x|^2 / |x|^2, each vector with another seed. A dense Gaussian matrix has spread {math.sqrt(2 / D):.3f} and "
        f"about {math.erfc(0.2 / (2 / math.sqrt(D))):.1e} beyond 20 %. fjl: a tenth of the vectors."
    )
    kinds: list[Kind] = ["affd", "afjl", "qk", "ffd", "fjl"]
    sorts: dict[str, Vectors] = {
        "random": dense,
        "sparse": sparse,
        "pairs 2^15 apart": pairs,
        "a column of the transform": concentrated(D),
    }
    for kind in kinds:
        for name, vectors in sorts.items():
            tried = count if kind != "fjl" else max(20, count // 10)
            table.add({"sketch": kind, "vectors": name, **spread(kind, D, vectors, tried)})


if __name__ == "__main__":
    main()
