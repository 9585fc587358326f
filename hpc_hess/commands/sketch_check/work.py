"""How far sketches of a model's gradients can be trusted: scores from sketches against scores from whole gradients.

A few gradients are kept whole (queries), the others pass by one after the other: every pair's inner product is known exactly
and from each sketch. Also from the gradients of single layers (Schioppa 2024, table 1). Goes on where it was stopped.
"""

from __future__ import annotations

import json
import math
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpc_hess.commands.arguments import Comparison
from hpc_hess.config import Config
from hpc_hess.errors import ConfigError
from hpc_hess.model.data.data import objective_of
from hpc_hess.parallel.vector import Vector
from hpc_hess.parallel.world import World
from hpc_hess.session.memory_budget import room_for_rows
from hpc_hess.session.problem import Problem, load_problem
from hpc_hess.session.session import opened
from hpc_hess.sketch.comparison import correlation
from hpc_hess.sketch.kinds import SketchSettings
from hpc_hess.sketch.sketch import Sketch
from hpc_hess.storage.agree import attempt
from hpc_hess.storage.identity import must_match
from hpc_hess.storage.run_files import write_aside

RECORD_NAME = "sketch_check.json"


def sketch_check(config: Config, world: World, asked: Comparison) -> int:
    """Compare and write OUT/sketch_check.{json,html}; returns the exit code. Collective: yes.

    Raises
    ------
    HpcHessError : as one sentence for the user.

    """
    out = Path(config.run.out)
    with opened(config, world, out, config.data.sequences) as session:
        progress = session.progress
        problem = load_problem(config, world, progress)
        examples = len(problem.samples) - asked.queries
        if examples < 2:
            raise ConfigError(
                f"--queries {asked.queries} leaves {examples} of {len(problem.samples)} sequences to compare with: raise "
                "data.sequences"
            )
        room_for_rows(world, problem.model.space, asked.queries + 1, 0, "--queries")
        bound_to = _identity(config, problem, asked)
        record = _take_up(out, world, bound_to)
        table = _Table(config, problem, world, asked)
        if len(record["rows"]) < examples:
            progress.phase(f"{asked.queries} whole gradients")
            table.begin()
        for index in range(len(record["rows"]), examples):
            if reason := session.stopper.agreed(table.slowest_s):
                return session.stopped(reason)
            record["rows"].append(table.row(asked.queries + index))
            with attempt(world, out, "keep a row"):
                if world.rank == 0:
                    write_aside(out / RECORD_NAME, json.dumps(record) + "\n")
            session.progressed = True
            progress.resume_at(asked.queries + index + 1)
            progress.status(f"example {index + 1} of {examples}")
        page, found = None, summary(record)
        with attempt(world, out / RECORD_NAME, "write the comparison", of=OSError):
            if world.rank == 0:
                from hpc_hess.commands.sketch_check.page import check_text, write_page  # matplotlib: not on the other ranks

                write_aside(out / RECORD_NAME, json.dumps(record | {"found": found}) + "\n")
                page = write_page(out, found)
    if page is not None:
        print(check_text(found))
        print(f"\nwritten to {out / RECORD_NAME} and {page}")
    world.barrier("finish")
    return 0


class _Table:
    """Scores of examples for the queries: exact, by each sketch, by each layer."""

    def __init__(self, config: Config, problem: Problem, world: World, asked: Comparison) -> None:
        self._problem, self._world, self._asked = problem, world, asked
        size = problem.model.layout.num_params_full
        self._sketches = {
            name: Sketch(size, SketchSettings.of(config.sketch, kind=kind, dimension=1 << bits))
            for kind in asked.kinds
            for bits in asked.bits
            for name in [f"{kind} {bits}"]
        }
        self._layers = _layers(problem)
        self._queries: list[Vector] = []
        self._sketched: dict[str, np.ndarray] = {}
        self._buffer = problem.model.space.zeros()
        self.slowest_s = 0.0

    def begin(self) -> None:
        """Compute the queries' gradients and sketches. Collective: yes."""
        self._queries = [self._gradient(k).copy() for k in range(self._asked.queries)]
        self._sketched = {
            name: np.stack([sketch.apply(g).cpu().numpy() for g in self._queries]) for name, sketch in self._sketches.items()
        }

    def row(self, index: int) -> dict[str, Any]:
        """Return the scores of example ``index`` with every query. Collective: yes."""
        began = time.perf_counter()
        g = self._gradient(index)
        gradient_s = self._world.max_over_ranks(time.perf_counter() - began, "gradient time")
        exact = [query.dot(g) for query in self._queries]
        scores, seconds, norms = {}, {}, {}
        norm = g.norm()
        for name, sketch in self._sketches.items():
            started = time.perf_counter()
            s = sketch.apply(g).cpu().numpy()
            seconds[name] = self._world.max_over_ranks(time.perf_counter() - started, "sketch time")
            scores[name], norms[name] = (self._sketched[name] @ s).tolist(), float(np.linalg.norm(s)) / norm
        layers = self._by_layer(g)
        self.slowest_s = max(self.slowest_s, time.perf_counter() - began)
        return {
            "exact": exact,
            "scores": scores,
            "layers": layers,
            "gradient_s": gradient_s,
            "seconds": seconds,
            "norms": norms,
        }

    def _gradient(self, index: int) -> Vector:
        """Return the gradient of one example's mean loss; rank 0 has the example, the others help to shard it."""
        world, problem = self._world, self._problem
        one = objective_of(problem.samples, [index], world.rank, world.size, 1, problem.model.space.device)
        return problem.gradient.over(one)(self._buffer)[1]

    def _by_layer(self, g: Vector) -> dict[str, list[float]]:
        pieces = list(self._problem.model.pieces_of(g.data))
        found = torch.zeros((len(self._layers), len(self._queries)), dtype=torch.float64, device=g.data.device)
        for column, query in enumerate(self._queries):
            others = list(self._problem.model.pieces_of(query.data))
            for line, members in enumerate(self._layers.values()):
                for k in members:
                    found[line, column] += torch.dot(pieces[k].reshape(-1), others[k].reshape(-1)).double()
        found = g.space.sum(found.view(-1), "scores by layer").view(found.shape)
        return {name: line.tolist() for name, line in zip(self._layers, found, strict=True)}


def _layers(problem: Problem) -> dict[str, list[int]]:
    """Return pieces by layer, 2 before 10: names up to the block's number, the others by their module."""
    layers: dict[str, list[int]] = {}
    for k, piece in enumerate(problem.model.shard.pieces):
        name = piece.parameter.name
        numbered = re.match(r"(.*?\.\d+)\.", name)
        layers.setdefault(numbered.group(1) if numbered else name.rpartition(".")[0], []).append(k)
    return dict(sorted(layers.items(), key=lambda item: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", item[0])]))


def summary(record: dict[str, Any]) -> dict[str, Any]:
    """Return correlations, times and norms by sketch, and correlations by layer, from a record's rows."""
    rows = record["rows"]
    exact = np.array([row["exact"] for row in rows])
    sketches = []
    for name in rows[0]["scores"]:
        kind, bits = name.split()
        norms = np.array([row["norms"][name] for row in rows])
        sketches.append(
            {
                "kind": kind,
                "bits": int(bits),
                "r": correlation(exact, [row["scores"][name] for row in rows]),
                "seconds": float(np.median([row["seconds"][name] for row in rows])),
                "norm_mean": float(norms.mean()),
                "norm_spread": float(norms.std()),
            }
        )
    layers = {name: correlation(exact, [row["layers"][name] for row in rows]) for name in rows[0]["layers"]}
    return {
        "model": record["identity"]["model"],
        "pairs": exact.size,
        "sketches": sketches,
        "layers": {name: None if math.isnan(r) else r for name, r in layers.items()},
        "gradient_s": float(np.median([row["gradient_s"] for row in rows])),
    }


def _identity(config: Config, problem: Problem, asked: Comparison) -> dict[str, Any]:
    return {
        "model": problem.source.name,
        "model_fingerprint": problem.source.fingerprint,
        "data_fingerprint": problem.samples.fingerprint,
        "parameters": config.parameters.model_dump(),
        "seed": config.sketch.seed,
        "preconditioner": config.sketch.preconditioner,
        "kinds": list(asked.kinds),
        "bits": list(asked.bits),
        "queries": asked.queries,
        "compute_dtype": config.model.compute_dtype,
    }


def _take_up(out: Path, world: World, identity: dict[str, Any]) -> dict[str, Any]:
    """Return the record of an earlier run of the same comparison, or an empty one. Collective: yes. Raises StoreError."""
    record: dict[str, Any] = {"format": 1, "identity": identity, "rows": []}
    with attempt(world, out / RECORD_NAME, "take up the comparison"):
        path = out / RECORD_NAME
        if world.rank == 0 and path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            before = {"compute_dtype": identity["compute_dtype"]} | found["identity"]  # old records do not say it
            must_match(before, identity, f"{path} holds a comparison", "choose another run.out, or go back to that")
            record["rows"] = found["rows"]
    return world.broadcast(record, "rows of the comparison")
