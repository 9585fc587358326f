"""The numbers of toy runs, to the last bit: ``python -m tests.golden.record`` writes golden.json, once, from a version
that is right. Every product, every study, 1 and 2 ranks, one thread each."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from hpc_hess.commands.run.work import run
from hpc_hess.config import load_config
from hpc_hess.parallel.world import World
from hpc_hess.storage.reader import read_store
from hpc_hess.system import cpu_name
from tests.support.spawn import run_ranks

GOLDEN = Path(__file__).with_name("golden.json")
TOY = Path(__file__).parents[2] / "launch" / "configs" / "toy.toml"
RANKS = (1, 2)
_LEFT_OUT = ("timing", "memory", "hardware", "versions", "world_size", "cautions", "digest")  # of a run, not of its matrix
_LAYER = '["model.layers.1.self_attn.*", "model.layers.1.input_layernorm.weight", "model.norm.weight"]'
_STUDIES = [
    "analysis.eigenpairs=1",
    "analysis.most_products=14",
    "analysis.trace=hutch++",
    "analysis.diagonal=hutchinson",
    "analysis.samples=6",
    "analysis.deflated_steps=3",
    "analysis.inverse=minres",
    "analysis.inverse_products=4",
    'analysis.block_diagonal=["layer", "tensor", "head", "row"]',
    "analysis.block_samples=2",
    "analysis.block_spectrum=layer",
    "analysis.block_steps=3",
    "analysis.columns=3",
    'analysis.sub_block=["model.norm.weight[:4]"]',
]
_ALWAYS = ["data.sequences=3", "run.report=false", "store.keep_basis=true"]
_SHORT = ["lanczos.steps=3", "lanczos.probes=1"]
_EXACT = "operator.method=exact"
CASES: dict[str, list[str]] = {
    "whole": ["lanczos.steps=4"],  # of all parameters
    "differences": [f"parameters.include={_LAYER}", "lanczos.steps=4", *_STUDIES],
    "exact": [f"parameters.include={_LAYER}", _EXACT, "lanczos.steps=4", *_STUDIES],
    "gauss_newton": [
        f"parameters.include={_LAYER}",
        _EXACT,
        "operator.kind=gauss_newton",
        *_SHORT,
        "analysis.class_groups=2",
        "analysis.class_steps=4",
        "analysis.trace=xtrace",
        "analysis.diagonal=xdiag",
        "analysis.samples=6",
    ],
    "residual": [_EXACT, "operator.kind=residual", *_SHORT],
    "fisher": [_EXACT, "operator.kind=fisher", *_SHORT, "analysis.trace=hutchinson", "analysis.samples=6"],
    "perplexity": ["operator.kind=perplexity", *_SHORT, "lanczos.reorthogonalise=2"],
    "forward": ["operator.scheme=forward", *_SHORT],
    "sketched": [_EXACT, "operator.sketched=true", "sketch.dimension=256", *_SHORT],
}


def machine() -> dict[str, str]:
    """What the last bits depend on."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy", "scipy")}
    return {"cpu": cpu_name(), "instructions": torch.backends.cpu.get_cpu_capability(), **versions}


def runs(world: World, folder: str) -> None:
    """Run every case in a directory of its own. Collective: yes."""
    for case, overrides in CASES.items():
        out = Path(folder) / case
        assert run(load_config(TOY, [*_ALWAYS, *overrides, f"run.out={out}"]), world) == 0


def found(ranks: int, timeout_s: float = 570) -> dict[str, Any]:
    """Return what each case finds: result.json without what was measured, and a checksum of every vector on disk."""
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(runs, ranks, folder, timeout_s=timeout_s)
        return {case: _numbers(Path(folder) / case) for case in CASES}


def _numbers(out: Path) -> dict[str, Any]:
    result = {k: v for k, v in json.loads((out / "result.json").read_text()).items() if k not in _LEFT_OUT}
    del result["trace"]["half_width_95"]  # how it is bounded
    return result | {"vectors": dict(_checksums(out))}


def _checksums(out: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(out.rglob("krylov.h5")):
        with read_store(path.parent) as view:
            assert view.verify() == []
            for probe, member in enumerate(view.probes):
                for row in member.rows:
                    name = f"{path.parent.relative_to(out)}/{probe}/{row}"
                    yield name, hashlib.blake2b(view.row(probe, row).tobytes(), digest_size=8).hexdigest()
    for path in sorted(out.rglob("*.npy")):
        yield str(path.relative_to(out)), hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()


def main() -> None:
    values = {"machine": machine(), **{f"{ranks} ranks": found(ranks, timeout_s=3600) for ranks in RANKS}}
    GOLDEN.write_text(json.dumps(values, indent=0) + "\n")


if __name__ == "__main__":
    main()
