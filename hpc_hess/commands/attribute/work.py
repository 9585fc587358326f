"""Attribution: which examples of a data set speak for a text. Sketches of every example's gradient, and queries of them.

``build`` goes on where it was stopped, and grows with data.sequences. Ranks take examples in turn.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from hpc_hess.commands.arguments import OF_SKETCHES, Query
from hpc_hess.config import Config
from hpc_hess.console.progress import Progress, make_progress
from hpc_hess.errors import ConfigError, NumericsError, StoreError
from hpc_hess.linalg.solve import conjugate_gradients, minres
from hpc_hess.model.blocks.per_example import ExampleGradients
from hpc_hess.model.data.data import Samples, load_samples, one_example, text_samples
from hpc_hess.model.data.tokenizer import LazyTokenizer
from hpc_hess.model.sources.source import Source
from hpc_hess.parallel.world import World
from hpc_hess.registry.operators import OPERATORS
from hpc_hess.session.operators import build_operator, exact_operator, needs_gradient
from hpc_hess.session.problem import Problem, fills_a_cache, in_turn, load_problem
from hpc_hess.session.session import opened
from hpc_hess.sketch import influence
from hpc_hess.sketch.kinds import SketchSettings
from hpc_hess.sketch.sketch import Sketch, SketchedOperator, part_of, whole_of
from hpc_hess.storage.agree import attempt
from hpc_hess.storage.examples import NAME, Examples, prepare
from hpc_hess.storage.identity import must_match
from hpc_hess.storage.run_files import write_aside

RECORD_NAME = "attribution.json"
_WRITE_EVERY_S = 5.0  # at most this much work is lost to a kill


class Sketcher:
    """Sketches of gradients of examples: each rank's own. Construction is collective."""

    def __init__(self, config: Config, problem: Problem, first: Samples) -> None:
        model, self._world = problem.model, problem.model.world
        self.sketch = Sketch(model.layout.num_params_full, SketchSettings.of(config.sketch))
        row = one_example(first, self._world.rank if self._world.rank < len(first) else 0)
        self._gradients = ExampleGradients(model, row, problem.plain)
        self._device = model.space.device

    def round(self, samples: Samples, ids: Sequence[int]) -> tuple[np.ndarray, list[float]]:
        """Return sketches (len(ids), D) and losses of at most one example for each rank, on every rank. Collective: yes."""
        world, D = self._world, self.sketch.dimension
        mine = ids[world.rank] if world.rank < len(ids) else None
        collection = self.sketch.begin(self._device)
        batch = one_example(samples, ids[0] if mine is None else mine, dummy=mine is None)
        loss = self._gradients(batch, lambda data, starts, lengths: self.sketch.add(collection, data, starts, lengths))
        table = torch.zeros((len(ids), D + 1), dtype=torch.float64, device=self._device)
        if mine is not None:
            table[world.rank, :D], table[world.rank, D] = self.sketch.end(collection), loss
        found = world.sum_over_ranks(table, "sketches of examples").cpu().numpy()
        return found[:, :D], found[:, D].tolist()


def _require_causal(config: Config) -> None:
    """Raise ConfigError: gradients of single examples are those of causal language models."""
    if config.model.task != "causal-lm":
        raise ConfigError(
            f'attribution is for causal language models, not for model.task = "{config.model.task}": set '
            'model.task = "causal-lm", and a model of that kind'
        )


def build(config: Config, world: World) -> int:
    """Sketch the gradient of every example of the data set into OUT/sketches.h5; returns the exit code. Collective: yes.

    Raises
    ------
    HpcHessError : as one sentence for the user; what is written stays.

    """
    _require_causal(config)
    out = Path(config.run.out)
    SketchSettings.of(config.sketch)  # an error now, not after the weights are read
    with opened(config, world, out, config.data.sequences) as session:
        progress = session.progress
        problem = load_problem(config, world, progress)
        samples, examples, done = problem.samples, None, np.zeros(0, bool)
        with attempt(world, out, "open the sketches"):
            if world.rank == 0:
                examples = prepare(out, _tokens(samples), config.sketch.dimension, _identity(config, problem))
                session.held.callback(examples.close)
                done = examples.done
                if not (out / "config.toml").exists():  # a run's own stays
                    write_aside(out / "config.toml", config.to_toml())
        done = world.broadcast(done, "examples that are done")
        left = np.flatnonzero(~done).tolist()
        if not left:
            progress.note(f"all {len(samples)} examples are sketched already: {out / NAME}")
            return 0
        progress.resume_at(len(done) - len(left))
        if len(left) < len(done):
            progress.note(f"going on after {len(done) - len(left)} of {len(done)} examples")
        progress.phase("sketching gradients")
        writer = _Writer(examples, out, world)
        sketcher, slowest_s = Sketcher(config, problem, samples), 0.0
        for first in range(0, len(left), world.size):
            if reason := session.stopper.agreed(slowest_s):
                writer.flush()
                return session.stopped(reason)
            began = time.perf_counter()
            ids = left[first : first + world.size]
            sketches, losses = sketcher.round(samples, ids)
            good = _first_not_finite(sketches, losses)
            writer.add(ids[:good], sketches[:good], losses[:good])
            if good < len(ids):
                writer.flush()  # the examples before it hold
                raise NumericsError(_not_finite(f"example {ids[good]}{_place(samples, ids[good])}"))
            session.progressed = True  # before it stops, it writes them
            seconds = world.max_over_ranks(time.perf_counter() - began, "example time")
            slowest_s = max(slowest_s, seconds)
            count = len(done) - len(left) + first + len(ids)
            progress.resume_at(count)
            progress.status(f"example {count} of {len(done)} | {seconds:.2g} s each rank | loss {losses[-1]:.3f}")
        writer.flush()
    if world.rank == 0:
        print(f"\n{len(done)} sketches of {config.sketch.dimension} numbers: {out / NAME}")
    world.barrier("finish")
    return 0


class _Writer:
    """Keeps rows for a few seconds, then puts them on disk together. Every rank has one, rank 0 writes."""

    def __init__(self, examples: Examples | None, out: Path, world: World) -> None:
        self._examples, self._out, self._world = examples, out, world
        self._rows: list[tuple[int, np.ndarray, float]] = []
        self._last = time.monotonic()

    def add(self, ids: Sequence[int], sketches: np.ndarray, losses: Sequence[float]) -> None:
        """Take rows; write them if it is time. Collective: yes."""
        self._rows += zip(ids, sketches, losses, strict=True)
        if self._world.any_true(time.monotonic() - self._last > _WRITE_EVERY_S, "time to write?"):
            self.flush()

    def flush(self) -> None:
        """Write what was taken. Collective: yes. Raises StoreError."""
        with attempt(self._world, self._out / NAME, "write sketches"):
            if self._examples is not None and self._rows:
                ids, sketches, losses = zip(*self._rows, strict=True)
                self._examples.write(ids, np.stack(sketches), losses)
        self._rows, self._last = [], time.monotonic()


# -- queries -----------------------------------------------------------------------------------------------------------


def _query_rows(config: Config, asked: Query, source: Source) -> tuple[Samples, list[str]]:
    """Return the rows that are asked about, and what a user should know of them. Collective: no."""
    if asked.text:
        return text_samples(asked.text, config.data, config.model, source), []
    section = config.data.model_copy(update={"source": asked.data, "sequences": asked.sequences + 1, "rows": "pack"})
    samples = load_samples(section, config.model, source)
    if len(samples) <= asked.sequences:
        return samples, []
    section = section.model_copy(update={"sequences": asked.sequences})
    note = f"the first {asked.sequences} rows of {asked.data} are asked about (--sequences)"
    return load_samples(section, config.model, source), [note]


def query(config: Config, world: World, asked: Query) -> int:
    """Rank the examples of OUT/sketches.h5 for a query; writes OUT/attribution.{json,html}. Collective: yes.

    Raises
    ------
    HpcHessError : no sketches, or of another model, sketch or selection.

    """
    _require_causal(config)
    world.make_mesh(config.parallel.replicate)
    out = Path(config.run.out)
    with make_progress(world.rank == 0, asked.sequences) as progress:
        kept: _Kept | None = None  # rank 0 has it
        with attempt(world, out, "read the sketches"):
            if world.rank == 0:
                kept = _read(out)
        attributes = world.broadcast(kept.attributes if kept else {}, "settings of the sketches")
        problem = load_problem(config, world, progress)
        remedy = "query with the configuration they were built with, or choose another run.out"
        must_match(attributes, _identity(config, problem), f"{out / NAME} holds sketches", remedy)
        samples, notes = in_turn(
            world,
            lambda: _query_rows(config, asked, problem.source),  # every rank has the text from its own arguments
            "read the query",
            shared=fills_a_cache(config.model, config.data.model_copy(update={"source": asked.data or ""})),
        )
        for note in notes:
            progress.note(note)
        progress.phase("gradient of the query")
        sketcher = Sketcher(config, problem, samples)
        found = [
            sketcher.round(samples, range(first, min(first + world.size, len(samples))))
            for first in range(0, len(samples), world.size)
        ]
        rows = np.concatenate([sketches for sketches, _ in found])
        bad = _first_not_finite(rows, [loss for _, losses in found for loss in losses])
        if bad < len(rows):
            raise NumericsError(_not_finite(f"row {bad} of the query"))
        tokens = (samples.labels[:, 1:] >= 0).sum(1).numpy()  # the query's loss is a mean over tokens, not over rows
        target = tokens @ rows / tokens.sum()
        plain = target
        damping = asked.damping or world.broadcast(influence.default_damping(kept.sketches) if kept else 0.0, "damping")
        if asked.precondition == OF_SKETCHES:
            if kept is not None:
                target = influence.fisher_preconditioned(target[None], kept.sketches, damping)[0]
        elif asked.precondition != "none":
            target = _solved(config, problem, sketcher.sketch, target, damping, asked, progress)
    if kept is not None:
        used = None if asked.precondition == "none" else damping
        with _answering(out):
            _answer(config, problem, samples, asked, _Target(plain, target, used), kept)
    world.barrier("finish")
    return 0


def _first_not_finite(sketches: np.ndarray, losses: Sequence[float]) -> int:
    """Return how many examples come before the first whose loss or gradient is not finite; all of them where none is."""
    finite = np.isfinite(sketches).all(1) & np.isfinite(losses)
    return len(finite) if finite.all() else int(np.argmin(finite))


def _not_finite(what: str) -> str:
    return f"the loss or the gradient of {what} is not finite; check that text, the weights, and model.compute_dtype"


def _place(samples: Samples, index: int) -> str:
    return f" ({samples.places[index]})" if samples.places else ""


@contextlib.contextmanager
def _answering(out: Path) -> Iterator[None]:
    """Let one query at a time write its answer. Local, rank 0."""
    import fcntl

    with (out / "attribution.lock").open("w", encoding="utf-8") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


class _Kept(NamedTuple):
    """What sketches.h5 holds of the examples that are done: (n, D), (n,), (n,)."""

    sketches: np.ndarray
    losses: np.ndarray
    ids: np.ndarray
    attributes: dict[str, Any]


def _read(out: Path) -> _Kept:
    if not (out / NAME).exists():
        raise StoreError(f"there are no sketches in {out}: make them with hpc-hess attribute build")
    with Examples(out / NAME) as examples:
        done = examples.done
        if not done.any():
            raise StoreError(f"{out / NAME} holds no finished sketch: go on with hpc-hess attribute build")
        return _Kept(examples.sketches, examples.losses[done], np.flatnonzero(done), examples.attributes)


def _solved(
    config: Config, problem: Problem, sketch: Sketch, target: np.ndarray, damping: float, asked: Query, progress: Progress
) -> np.ndarray:
    """Solve (Phi A Phi^T + damping I) x = target, A the matrix of the examples that was asked for. Collective: yes."""
    spec = OPERATORS[asked.precondition]
    exact = config.operator.method == "exact" or "finite_difference" not in spec.methods
    section = config.operator.model_copy(update={"kind": spec.name, "method": "exact" if exact else "finite_difference"})
    config, problem = config.model_copy(update={"operator": section}), replace(problem, sketch=None)
    progress.phase(f"{asked.products} products at most with the {spec.matrix} in sketch space")
    loss, gradient = problem.gradient.at_theta0()
    operator = build_operator(
        config,
        problem,
        loss,
        gradient if needs_gradient(config) else None,
        exact_operator(config, problem) if exact else None,
    )
    sketched = SketchedOperator(operator, sketch)
    solver = conjugate_gradients if spec.positive else minres
    right = part_of(torch.from_numpy(target), sketched.space)

    def say(residual: float) -> None:
        progress.status(f"solving in sketch space: residual {residual:.2e}")

    solution = solver(sketched, right, damping=damping, tolerance=1e-3, most=asked.products, after_product=say)
    progress.note(f"relative residual {solution.converged_to:.1e} after {len(solution.residuals) - 1} products")
    return whole_of(solution.x).cpu().numpy()


class _Target(NamedTuple):
    """What is looked for in sketch space, (D,): the query as it is, and after the preconditioner with this damping."""

    plain: np.ndarray
    solved: np.ndarray
    damping: float | None


def _answer(config: Config, problem: Problem, samples: Samples, asked: Query, target: _Target, kept: _Kept) -> None:
    """Write and print the ranking. Rank 0."""
    from hpc_hess.commands.attribute.page import answer_text, write_page  # matplotlib: not on the other ranks

    out, norms = Path(config.run.out), np.linalg.norm(kept.sketches, axis=1)
    # the spread of an inner product of two sketches about that of the gradients, for a sketch as good as a Gaussian one
    spread = np.linalg.norm(target.solved) * norms / np.sqrt(config.sketch.dimension)
    values = influence.scores(target.solved[None], kept.sketches)[0]
    cosines = influence.cosines(target.plain[None], kept.sketches)[0]
    tokenizer = LazyTokenizer(config.model, problem.source)
    with Examples(out / NAME) as examples:

        def described(place: int) -> dict[str, Any]:
            row = int(kept.ids[place])
            return {
                "id": row,
                "place": problem.samples.places[row] if row < len(problem.samples.places) else "",
                "score": float(values[place]),
                "error": float(spread[place]),
                "cosine": float(cosines[place]),
                "loss": float(kept.losses[place]),
                "text": tokenizer.text(examples.tokens(row)),
            }

        record = {
            "format": 1,
            "query": [tokenizer.text(row[row >= 0]) for row in _tokens(samples)],
            "precondition": asked.precondition,
            "damping": target.damping,
            "examples": len(kept.ids),
            "sketch": config.sketch.model_dump(),
            "model": problem.source.name,
            "score_error": float(np.median(spread)),
            "told_apart": float((np.abs(values) > 2 * spread).mean()),
            "top": [described(k) for k in influence.top(values, asked.top)],
            "bottom": [described(k) for k in influence.top(-values, min(asked.top, max(0, len(values) - asked.top)))],
        }
    write_aside(out / RECORD_NAME, json.dumps(record, indent=1) + "\n")
    print(answer_text(record))
    page = f" and {write_page(out, record, values, cosines)}" if config.run.report else ""
    print(f"\nwritten to {out / RECORD_NAME}{page}")


def _tokens(samples: Samples) -> np.ndarray:
    """Return the token ids (n, L), -1 on padding."""
    return samples.input_ids.masked_fill(samples.attention_mask == 0, -1).numpy()


def _identity(config: Config, problem: Problem) -> dict[str, Any]:
    """What a sketch follows from, beside its example."""
    return {
        "model_fingerprint": problem.source.fingerprint,
        "parameters": config.parameters.model_dump(),
        "sketch": config.sketch.model_dump(),
        "compute_dtype": config.model.compute_dtype,
    }
