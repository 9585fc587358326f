"""Sketches of sharded vectors and gradients of single examples: the same numbers on 1 to 4 ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from hpc_hess.linalg.lanczos import Lanczos
from hpc_hess.linalg.operator import diagonal
from hpc_hess.linalg.probes import normals
from hpc_hess.model.blocks.per_example import ExampleGradients
from hpc_hess.model.sharded.micro_batch import MicroBatch
from hpc_hess.model.sharded.precision import honest_casts
from hpc_hess.parallel.basis import Basis
from hpc_hess.parallel.layout import Layout
from hpc_hess.parallel.vector import VectorSpace
from hpc_hess.parallel.world import World
from hpc_hess.sketch.kinds import KINDS, SketchSettings
from hpc_hess.sketch.sketch import Sketch, SketchedOperator, part_of, whole_of
from tests.support.exact_case import NO_SDPA
from tests.support.exact_ranks import Case, sharded_case
from tests.support.sharded import from_global, send
from tests.support.spawn import run_ranks
from tests.support.toys import MOE, toy_model, toy_tokens

TABLE: dict[str, tuple[int, ...]] = {"a": (13, 7), "experts": (3, 12, 5), "s": (), "tiny": (2, 3), "wide": (1, 9)}
ARCHITECTURES = ["llama", "llama_untied", "gpt2", "gemma3", "qwen2_moe", "gpt_oss"]


def _identities(world: World) -> dict[str, Any]:
    """<Phi x, y>, <x, Phi^T y> and Phi x of every kind; a Lanczos run in sketch space."""
    if world.connected:
        world.make_mesh(1)
    dims = {"experts": 1} if world.shard_size > 1 else {}
    found: dict[str, Any] = {}
    for dtype in (torch.float64, torch.float32):
        space = VectorSpace(world, Layout(TABLE, world.shard_size, dims), dtype)
        x = from_global(space, normals(1, 0, 0, space.size, dtype=torch.float64))
        y = normals(1, 1, 0, 32, dtype=torch.float64)
        for kind in KINDS:
            block = 0 if kind == "ffd" else 64
            sketch = Sketch(space.size, SketchSettings(kind=kind, dimension=32, block=block))  # type: ignore[arg-type]
            applied, lifted = sketch.apply(x), sketch.transpose(y, space)
            found[f"{kind} {dtype}"] = applied.numpy(), float(applied @ y), x.dot(lifted), x.norm() * float(y.norm())
    space = VectorSpace(world, Layout(TABLE, world.shard_size, dims), torch.float64)
    operator = diagonal(space, from_global(space, torch.linspace(-3, 10, space.size, dtype=torch.float64)))
    sketched = SketchedOperator(operator, Sketch(space.size, SketchSettings(dimension=16, block=64)))
    start = part_of(normals(3, 0, 0, 16, dtype=torch.float64), sketched.space)
    process = Lanczos(sketched, Basis(sketched.space, 6), 5)
    process.start(start)
    while not process.finished:
        process.step()
    found["lanczos"] = process.alpha, process.beta, whole_of(start).numpy()
    found["lifted"] = send(lifted)
    return found


def test_sketches_are_the_same_on_any_number_of_ranks() -> None:
    alone = _identities(World.alone())
    for ranks in (2, 3, 4):
        for got in run_ranks(_identities, ranks):
            for kind in KINDS:
                for dtype, loose in ((torch.float64, 1e-13), (torch.float32, 1e-6)):
                    key = f"{kind} {dtype}"
                    applied, here, there, scale = got[key]
                    assert np.allclose(applied, alone[key][0], atol=10 * loose, rtol=0), (key, ranks)
                    assert abs(here - there) < loose * scale, (key, ranks)
            for mine, reference in zip(got["lanczos"], alone["lanczos"], strict=True):
                assert np.allclose(mine, reference, atol=1e-10)


def _rows() -> list[MicroBatch]:
    """Four examples of unequal lengths; the third has a token that is not predicted."""
    ids = toy_tokens(4, 12)
    batches = []
    for row, length in enumerate((12, 7, 10, 12)):
        labels = ids[row : row + 1, :length].clone()
        if row == 2:
            labels[0, 4] = -100
        batches.append(MicroBatch([row], ids[row : row + 1, :length], torch.ones(1, length, dtype=torch.int64), labels))
    return batches


def _examples(world: World, names: list[str]) -> list[dict[int, tuple[float, np.ndarray]]]:
    """For each architecture this rank's examples: (loss, gradient in the global index)."""
    if world.connected:
        world.make_mesh(1)
    answers = []
    for name in names:
        include = ["*layers.0*", "*embed*"] if name == "llama_untied" else None
        model, plain, _ = sharded_case(world, Case(name, include))
        rows = _rows()
        gradients = ExampleGradients(model, rows[world.rank % 4], plain if model.sharded else None)
        mine: dict[int, tuple[float, np.ndarray]] = {}
        for first in range(0, 4, world.size):
            index = first + world.rank
            whole = torch.zeros(model.layout.num_params_full, dtype=torch.float64)

            def sink(data: torch.Tensor, starts: Any, lengths: Any, whole: torch.Tensor = whole) -> None:
                assert len(data) == sum(lengths)
                for start, part in zip(starts, data.split(list(lengths)), strict=True):
                    whole[start : start + len(part)] += part

            row = rows[min(index, 3)]
            if index > 3:
                row = MicroBatch([-1], row.input_ids, row.attention_mask, torch.full_like(row.labels, -100))
            loss = gradients(row, sink)
            if index <= 3:
                mine[index] = loss, whole.numpy()
            else:
                assert loss == 0
                assert not whole.any()
        answers.append(mine)
    return answers


def _oracle(name: str, batch: MicroBatch) -> tuple[float, torch.Tensor]:
    model = toy_model(name, dtype=torch.float64, attention="eager" if name in NO_SDPA else "sdpa")
    with honest_casts(torch.float64):
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    loss = cross_entropy(logits[0, :-1], batch.labels[0, 1:], ignore_index=-100)
    loss.backward()
    named = dict(model.named_parameters())
    parts = [named[n].grad if named[n].grad is not None else torch.zeros_like(named[n]) for n in sorted(named)]
    return float(loss), torch.cat([p.flatten() for p in parts])


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_gradients_of_single_examples(ranks: int) -> None:
    answers = [_examples(World.alone(), ARCHITECTURES)] if ranks == 1 else run_ranks(_examples, ranks, ARCHITECTURES)
    for place, name in enumerate(ARCHITECTURES):
        found = {k: v for answer in answers for k, v in answer[place].items()}
        assert sorted(found) == [0, 1, 2, 3]
        for row, (loss, gradient) in found.items():
            expected, whole = _oracle(name, _rows()[row])
            loose = 1e-5 if name in MOE else 1e-9  # fp32 within their code
            assert abs(loss - expected) < loose * expected
            if name == "llama_untied":
                model = toy_model(name)
                inside = [
                    torch.full((p.numel(),), "layers.0" in n or "embed" in n) for n, p in sorted(model.named_parameters())
                ]
                whole = whole * torch.cat(inside)
            assert (torch.from_numpy(gradient) - whole).norm() < loose * whole.norm(), (name, row, ranks)
