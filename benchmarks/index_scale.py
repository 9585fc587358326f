"""Index arithmetic, probes and a sparse store at N = 1.2e11, without a model: correct, and in seconds."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.frame import Table, benchmark
from hpc_hess.linalg import probes
from hpc_hess.parallel.layout import Layout
from hpc_hess.parallel.world import World

RANKS = 512


def shapes_120b() -> dict[str, tuple[int, ...]]:
    """Parameter shapes of a 120 B mixture of experts: 36 layers, 128 experts, hidden 2880 (GPT-OSS-120B-like)."""
    table: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (201088, 2880), "lm_head.weight": (201088, 2880)}
    for i in range(36):
        layer = f"model.layers.{i}."
        table |= {
            layer + "self_attn.q_proj.weight": (4096, 2880),
            layer + "self_attn.k_proj.weight": (512, 2880),
            layer + "self_attn.v_proj.weight": (512, 2880),
            layer + "self_attn.o_proj.weight": (2880, 4096),
            layer + "mlp.router.weight": (128, 2880),
            layer + "mlp.experts.gate_up_proj": (128, 2880, 5760),
            layer + "mlp.experts.down_proj": (128, 2880, 2880),
            layer + "input_layernorm.weight": (2880,),
            layer + "post_attention_layernorm.weight": (2880,),
        }
    return table


@benchmark("Index arithmetic at N = 1.2e11")
def main(table: Table) -> None:
    table.settings["ranks"] = RANKS

    def timed(what: str, function: Any) -> Any:
        start = time.perf_counter()
        value, correct = function()
        table.add({"what": what, "seconds": time.perf_counter() - start, "correct": correct})
        return value

    shapes = shapes_120b()
    layout = timed("layout of 120 B parameters", lambda: (lay := Layout(shapes, RANKS), 1.1e11 < lay.num_params < 1.3e11))
    experts = {name: 1 for name in shapes if ".experts." in name}

    def intervals(dims: dict[str, int] | None) -> Any:
        lay = Layout(shapes, RANKS, dims)
        total, previous = 0, []
        for rank in range(RANKS):
            starts, lengths = lay.shard(rank).global_intervals
            total += int(lengths.sum())
            previous.append((starts, lengths))
        starts = np.concatenate([s for s, _ in previous])
        lengths = np.concatenate([n for _, n in previous])
        order = np.argsort(starts)
        tiled = starts[order][0] == 0 and np.array_equal(starts[order][1:], (starts + lengths)[order][:-1])
        return previous, bool(total == lay.num_params and tiled)

    timed(f"intervals of all {RANKS} ranks, dimension 0", lambda: intervals(None))
    owned = timed(f"intervals of all {RANKS} ranks, experts on dimension 1", lambda: intervals(experts))

    def probe_slices() -> Any:
        rng = np.random.default_rng(0)
        good = True
        for _ in range(200):
            rank = int(rng.integers(RANKS))
            starts, _ = owned[rank]
            i = int(starts[rng.integers(len(starts))])
            whole = probes.signs(7, 3, max(0, i - 64), 256)
            good &= bool((probes.signs(7, 3, i, 64) == whole[min(i, 64) : min(i, 64) + 64]).all())
        return None, good

    timed("200 probe slices anywhere below 1.2e11", probe_slices)
    n = 50_000_000
    timed("50 M signs beyond 1e11", lambda: (x := probes.signs(0, 0, 100_000_000_001, n), abs(float(x.mean())) < 1e-3))
    timed(
        "50 M normals beyond 1e11", lambda: (x := probes.normals(0, 0, 100_000_000_001, n), abs(float(x.std()) - 1) < 1e-3)
    )
    timed("sparse store of 2 rows x 1.2e11: create, write one rank's edge rows, commit, reopen", _store)
    table.settings["num_params"] = layout.num_params


def _store() -> Any:
    """A store whose rows are 480 GB, on a file system with sparse files: only what is written takes space."""
    from hpc_hess.storage import build
    from hpc_hess.storage.journal import Member
    from hpc_hess.storage.store import Store

    # the reservation is the one thing a machine without 1 TB cannot do
    build.require_space = lambda *a, **k: None  # type: ignore[assignment]
    build.reserve = lambda *a, **k: None  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as folder:
        layout = Layout({"a": (120_000_000_000 - 5,), "z": (5,)}, 1)

        class Edge:
            """The last 5 entries of the vector: a shard that ends at 1.2e11."""

            def __init__(self) -> None:
                self.layout, self.index, self.size = layout, 0, 5
                self.file_intervals = (np.array([layout.num_params - 5]), np.array([5]))
                self.global_intervals = self.file_intervals
                self.pieces = layout.shard(0).pieces[1:]

        shard: Any = Edge()
        world = World.alone()
        options: dict[str, Any] = {"layout": layout, "shard": shard, "world": world, "driver": "files"}
        store = Store.create(
            Path(folder),
            **options,
            probes=1,
            steps=2,
            rows=2,
            keep_basis=False,
            dtype=np.float32,
            attributes={"config": "{}"},
        )
        values = np.arange(1, 6, dtype=np.float32)
        store.write_row(0, 0, values)
        store.commit(0, [Member(np.zeros(0), np.zeros(0))])
        store.close()
        store = Store.open(Path(folder), **options)
        good = bool(np.array_equal(store.read_row(0, 0), values))
        store.close()
        return None, good


if __name__ == "__main__":
    main()
