"""slq(out=...): runs of a user's program that are kept, killed, stopped, gone on with, and refused to others."""

from __future__ import annotations

import copy
import json
import os
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import hpc_hess
from hpc_hess.commands.run.screen import inspect_text
from hpc_hess.commands.run.work import run
from hpc_hess.config import load_config
from hpc_hess.errors import ConfigError, StoppedError, StoreError
from hpc_hess.parallel.world import World
from hpc_hess.storage.reader import read_store
from hpc_hess.studies.run_page import rewrite_report
from tests.support.in_training import case, dealt, spread, squared
from tests.support.spawn import run_ranks, start_ranks
from tests.support.toys import toy_model, toy_tokens

STEPS, PROBES = 6, 2


class Counted:
    """A loss that sends its own process a signal, within the product after the second step of the run ``out``."""

    def __init__(self, out: Path | None = None, number: int = signal.SIGKILL) -> None:
        self.events, self.left, self.number = out and out / "events.jsonl", 3, number

    def __call__(self, model: nn.Module, batch: Any) -> Any:
        if self.events and self.events.exists() and '"step": 2' in self.events.read_text():
            self.left -= 1
            if self.left == 0:
                signal.raise_signal(self.number)
        return squared(model, batch)


def spectrum(operator: Any, out: Path | None, **options: Any) -> np.ndarray:
    found = hpc_hess.slq(operator, **{"steps": STEPS, "probes": PROBES, "seed": 3, **options}, out=out)
    return np.concatenate([*found.alphas, *found.betas])


def operator(loss: Any = None, **options: Any) -> Any:
    model, _, batches = case("squared")
    return hpc_hess.hessian(model, batches, loss or Counted(), **options)


def _on_rank(world: World, how: str, out: Path | None, killed: bool) -> np.ndarray:
    model, _, batches = case("squared")
    model, of = spread(model, how, world.size)
    mine = dealt(batches, world.rank, world.size)
    return spectrum(hpc_hess.hessian(model, mine, Counted(out if killed else None), **of), out)


def steps_kept(out: Path) -> int:
    with read_store(out) as store:
        return sum(len(probe.alpha) for probe in store.probes)


@pytest.mark.parametrize("options", [{}, {"method": "exact"}, {"kind": "hessian", "scheme": "forward"}])
def test_a_run_that_is_kept_has_the_numbers_of_one_that_is_not(options: dict[str, Any], tmp_path: Path) -> None:
    out, right = tmp_path / "x", spectrum(operator(**options), None)
    of, before = operator(**options), [signal.getsignal(n) for n in (signal.SIGUSR1, signal.SIGTERM)]
    assert (spectrum(of, out) == right).all()
    result = json.loads((out / "result.json").read_text())
    assert (np.concatenate([p["alpha"] for p in result["probes"]]) == right[: STEPS * PROBES]).all()
    assert (result["data"]["batches"], result["data"]["weight"], result["model"]["name"]) == (5, 16.0, "Net")
    assert (out / "report.html").exists()
    changed = (out / "krylov.h5").stat().st_mtime_ns
    assert (spectrum(of, out) == right).all()
    assert (out / "krylov.h5").stat().st_mtime_ns == changed  # it was finished
    more = spectrum(of, out, probes=3)
    assert (more == spectrum(operator(**options), None, probes=3)).all()
    assert [signal.getsignal(n) for n in (signal.SIGUSR1, signal.SIGTERM)] == before


def test_the_commands_work_on_it(tmp_path: Path, world: World) -> None:
    spectrum(operator(), tmp_path / "x")
    assert "finished: 12 steps over 2 probes" in inspect_text(tmp_path / "x")
    (tmp_path / "x" / "report.html").unlink()
    page = rewrite_report(tmp_path / "x").read_text()
    assert "hpc_hess.slq(operator, steps=6, probes=2, seed=3" in page
    with pytest.raises(ConfigError, match="start that program again"):
        run(load_config(tmp_path / "x" / "config.toml"), world)


def test_a_causal_lm_streams_as_without(tmp_path: Path) -> None:
    batches = [{"input_ids": toy_tokens(2)}, {"input_ids": toy_tokens(1)}]

    def of() -> Any:
        return hpc_hess.hessian(toy_model("qwen2").double(), batches, method="exact", compile="off")

    assert (spectrum(of(), tmp_path) == spectrum(of(), None)).all()
    data = json.loads((tmp_path / "result.json").read_text())["data"]
    assert data["batches"] == 2
    assert data["tokens"] > 0


@pytest.mark.parametrize(("ranks", "how"), [(1, "fsdp"), (2, "fsdp"), (2, "ddp")])
def test_a_killed_run_goes_on_bitwise(ranks: int, how: str, tmp_path: Path) -> None:
    out = tmp_path / "x"
    right = run_ranks(_on_rank, ranks, how, None, False)
    processes, pipes = start_ranks(_on_rank, ranks, how, out, True)
    for process in processes:
        process.join(60)
        assert process.exitcode is not None
    for pipe in pipes:
        pipe.close()
    assert -signal.SIGKILL in [process.exitcode for process in processes]
    assert 1 <= steps_kept(out) < STEPS
    for found in run_ranks(_on_rank, ranks, how, out, False):
        assert (found == right[0]).all()
    assert '"event": "resume"' in (out / "events.jsonl").read_text()
    assert (spectrum(operator(), out) == right[0]).all()  # one process finds the same model and batches


@pytest.mark.parametrize("own", [False, True])
def test_a_signal_stops_it_between_steps(own: bool, tmp_path: Path) -> None:
    heard: list[int] = []

    def hear(number: int, frame: FrameType | None) -> None:
        heard.append(number)

    before = signal.signal(signal.SIGUSR1, hear) if own else signal.getsignal(signal.SIGUSR1)
    try:
        of = operator(Counted(tmp_path, signal.SIGUSR1))
        weights = copy.deepcopy(of._module.state_dict())
        with pytest.raises(StoppedError, match="after committing step . of probe 1: a signal asked for it; the same call"):
            spectrum(of, tmp_path)
        assert heard == [signal.SIGUSR1] * own
        assert all(torch.equal(weights[name], value) for name, value in of._module.state_dict().items())
        assert 1 <= steps_kept(tmp_path) < STEPS
        assert (spectrum(of, tmp_path) == spectrum(operator(), None)).all()
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_an_interrupt_leaves_what_was_committed(tmp_path: Path) -> None:
    of = operator(Counted(tmp_path, signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores the signal
    try:
        with pytest.raises(KeyboardInterrupt):
            spectrum(of, tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    assert 1 <= steps_kept(tmp_path) < STEPS
    assert (spectrum(of, tmp_path) == spectrum(operator(), None)).all()


def test_resume_false_puts_the_old_run_aside(tmp_path: Path) -> None:
    spectrum(operator(), tmp_path / "x", probes=1)
    spectrum(operator(), tmp_path / "x", probes=1, seed=4, resume=False)
    assert (tmp_path / "x.before-1" / "result.json").exists()
    assert json.loads((tmp_path / "x" / "result.json").read_text())["probes"][0]["seed"] == 4


def test_runs_of_others_are_refused(tmp_path: Path) -> None:
    model, _, batches = case("squared")
    spectrum(hpc_hess.hessian(model, batches, Counted()), tmp_path, probes=1)
    with pytest.raises(StoreError, match=r"lanczos.seed = 3, not 5: choose another out, or"):
        spectrum(hpc_hess.hessian(model, batches, Counted()), tmp_path, seed=5)
    with pytest.raises(StoreError, match=r"problem.loss = 'Counted', not 'squared"):
        spectrum(hpc_hess.hessian(model, batches, squared), tmp_path)
    with pytest.raises(StoreError, match="operator.scheme"):
        spectrum(hpc_hess.hessian(model, batches, Counted(), scheme="forward"), tmp_path)
    with pytest.raises(StoreError, match="another data"):
        spectrum(hpc_hess.hessian(model, batches[:-1], Counted()), tmp_path)
    of = hpc_hess.hessian(model, batches, Counted())
    with torch.no_grad():
        model.head.bias.add_(1.0)
    with pytest.raises(ConfigError, match="have changed since"):
        spectrum(of, tmp_path)
    with pytest.raises(StoreError, match="another model"):
        spectrum(hpc_hess.hessian(model, batches, Counted()), tmp_path)
    assert sorted(os.listdir(tmp_path / "figures"))  # of the first run, which is whole


def test_operators_that_are_not_of_a_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"operators that hessian\(\) returned"):
        spectrum(hpc_hess.sketched(operator(), 16), tmp_path)
    half = hpc_hess.hessian(toy_model("qwen2").bfloat16(), [{"input_ids": toy_tokens(1)}], method="exact", compile="off")
    with pytest.raises(ConfigError, match="half precision"):
        spectrum(half, tmp_path)
    assert list(tmp_path.iterdir()) == []
