"""run.track: what TensorBoard, Weights & Biases and MLflow hold of a run that is stopped, killed and gone on with."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from hpc_hess.commands.run import tracking
from hpc_hess.commands.run.trackers import Point, Watched
from hpc_hess.commands.run.work import run
from hpc_hess.config import Config, make_config
from hpc_hess.errors import ConfigError
from hpc_hess.parallel.world import World
from hpc_hess.storage import events
from hpc_hess.storage.events import read_events
from hpc_hess.storage.run_files import step_events
from tests.support.launching import SHORT, TOY, complete, running, steps_done, wait_until

pytestmark = pytest.mark.slow

Curves = dict[str, list[tuple[int, float]]]  # (step, value) of each name


def needs(package: str) -> Any:
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"needs {package}")


def settings(toy: Path, out: Path, *trackers: str, report: bool = False, **lanczos: int) -> Config:
    return make_config(
        {
            "model": {"source": str(toy / "model")},
            "data": {"source": f"tokens:{toy / 'tokens.npy'}", "sequence_length": 12, "sequences": 4},
            "lanczos": {"steps": 5, "probes": 2, **lanczos},
            "studies": {"diagonal": {"method": "hutchinson", "samples": 6}},
            "run": {"out": str(out), "report": report, "track": list(trackers)},
        }
    )


def stopped(world: World, config: Config) -> int:
    """Run until three steps are written, then send a signal; return the exit code."""
    original, count = events.append_lines, [0]

    def append_lines(path: Path, lines: list[str]) -> None:
        original(path, lines)
        count[0] += sum('"event": "step"' in line for line in lines)
        if count[0] == 3:
            os.kill(os.getpid(), signal.SIGUSR1)

    with mock.patch.object(events, "append_lines", append_lines):
        return run(config, world)


def tensorboard_of(out: Path) -> tuple[Curves, Any]:
    """Read the event files back as TensorBoard does."""
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    read = EventAccumulator(str(out / "tensorboard"), {SCALARS: 0}).Reload()
    return {name: [(e.step, e.value) for e in read.Scalars(name)] for name in read.Tags()["scalars"]}, read


def assert_whole(curves: Curves, out: Path, *, finished: bool = True) -> None:
    """Compare every curve with events.jsonl: each step once, in order, with its values."""
    steps = step_events(read_events(out))
    for probe in {event["probe"] for event in steps}:
        for key in ("alpha", "beta", "ritz_min", "ritz_max", "peak_bytes", "hvp_s", "lanczos_s", "checkpoint_s"):
            wanted = [event for event in steps if event["probe"] == probe]
            found = curves[f"probe {probe + 1}/{key}"]
            assert [step for step, _ in found] == [event["step"] for event in wanted], key
            if key in ("alpha", "beta", "ritz_min", "ritz_max"):
                assert [value for _, value in found] == pytest.approx([event[key] for event in wanted], rel=1e-5)
    assert [step for step, _ in curves["gradient/loss"]] == [0]
    if finished:
        result = json.loads((out / "result.json").read_text())
        for name, value in [("lambda_max", result["lambda_max"]), ("trace/mean", result["trace"]["mean"])]:
            assert curves[f"result/{name}"] == [(0, pytest.approx(value, rel=1e-6))]


@needs("tensorboard")
def test_tensorboard_of_a_run_that_was_stopped(world: World, toy: Path, tmp_path: Path) -> None:
    config = settings(toy, tmp_path / "run", "tensorboard", report=True)
    assert stopped(world, config) == 75
    curves, _ = tensorboard_of(tmp_path / "run")
    assert_whole(curves, tmp_path / "run", finished=False)
    assert len(curves["probe 1/alpha"]) == 3
    for _ in range(2):  # the second is finished already
        assert run(config, world) == 0
        curves, read = tensorboard_of(tmp_path / "run")
        assert_whole(curves, tmp_path / "run")
        assert len(curves["probe 1/alpha"]) == len(curves["probe 2/alpha"]) == 5
        products = [
            (event["name"], event["product"]) for event in read_events(tmp_path / "run") if event["event"] == "study"
        ]
        (name,) = {name for name, _ in products}
        assert [step for step, _ in curves[f"studies/{name}/hvp_s"]] == [number for _, number in products]
        (figure,) = read.Images("figures/convergence")
        assert figure.encoded_image_string == (tmp_path / "run" / "figures" / "convergence.png").read_bytes()
        assert (figure.width, figure.height) > (400, 400)
        assert b"lanczos.steps" in read.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    assert run(settings(toy, tmp_path / "run", "tensorboard", probes=3), world) == 0
    curves, _ = tensorboard_of(tmp_path / "run")
    assert_whole(curves, tmp_path / "run")
    assert len(curves["probe 3/alpha"]) == 5


@needs("tensorboard")
@pytest.mark.parametrize("ranks", [1, 2])
def test_tensorboard_of_a_run_that_was_killed(ranks: int, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ["torchrun.sh", "-n", str(ranks), TOY, *SHORT, "--set", "lanczos.steps=40", "--set", f"run.out={out}"]
    arguments += ["--set", 'run.track=["tensorboard"]']
    with running(*arguments, PYTHON=sys.executable):
        wait_until(lambda: steps_done(out) >= 4, "four steps")
    assert steps_done(out) < 40
    code, text = complete(*arguments, PYTHON=sys.executable)
    assert code == 0, text
    assert text.count("tensorboard: ") == 1
    curves, _ = tensorboard_of(out)
    assert_whole(curves, out)
    assert len(curves["probe 1/alpha"]) == 40
    # of rank 0 alone: a file for each start
    assert len(list((out / "tensorboard").iterdir())) == 2


def records_of(file: Path) -> Iterator[Any]:
    """Yield the records of a transaction log of wandb: blocks of 32 KiB as LevelDB writes them, after seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, held = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        held += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(held)
            held = b""


def offline_wandb(out: Path) -> list[tuple[Curves, dict[str, Any]]]:
    """Return of every start its history, and its id, configuration and summary."""

    def named(items: Any) -> dict[str, Any]:
        return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}

    starts = []
    for file in sorted((out / "wandb").glob("offline-run-*/*.wandb")):
        curves, about = Curves(), dict[str, Any](summary={})
        for record in records_of(file):
            if record.WhichOneof("record_type") == "run":
                about |= {"id": record.run.run_id, "config": named(record.run.config.update)}
            about["summary"] |= named(record.summary.update)
            row = named(record.history.item)
            for name, value in row.items():
                if isinstance(value, int | float) and not name.startswith("_"):
                    curves.setdefault(name, []).append((row.get(f"{name.rpartition('/')[0]}/step", 0), value))
        starts.append((curves, about))
    return starts


@needs("wandb")
def test_wandb_without_a_network(world: World, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = settings(toy, tmp_path / "run", "wandb", report=True)
    assert stopped(world, config) == 75
    assert run(config, world) == 0
    (first, about), (second, about_second) = offline_wandb(tmp_path / "run")
    assert about["id"] == about_second["id"]
    assert about["config"]["lanczos"]["steps"] == 5
    assert first["probe 1/alpha"] == second["probe 1/alpha"][: len(first["probe 1/alpha"])]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    summary = about_second["summary"]
    assert summary["result/lambda_max"] == pytest.approx(result["lambda_max"])
    assert summary["figures/convergence"]["_type"] == "image-file"
    assert_whole(
        second | {f"result/{k}": [(0, summary[f"result/{k}"])] for k in ("lambda_max", "trace/mean")}, tmp_path / "run"
    )


@needs("mlflow")
def test_mlflow_in_files(world: World, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config, out = settings(toy, tmp_path / "run", "mlflow", report=True), tmp_path / "run"
    assert stopped(world, config) == 75
    client = MlflowClient((out / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("hpc-hess")
    assert [each.info.status for each in client.search_runs([experiment.experiment_id])] == ["KILLED"]
    for _ in range(2):  # the second is finished already
        assert run(config, world) == 0
        (tracked,) = client.search_runs([experiment.experiment_id])
        assert tracked.info.status == "FINISHED"
        assert tracked.data.params["lanczos.steps"] == "5"
        histories = {name: client.get_metric_history(tracked.info.run_id, name) for name in tracked.data.metrics}
        assert_whole({name: [(m.step, m.value) for m in history] for name, history in histories.items()}, out)
        assert {file.path for file in client.list_artifacts(tracked.info.run_id)} == {
            "figures",
            "report.html",
            "result.json",
        }


# -- trackers that are not there, that fail, that hang -----------------------------------------------------------------


def test_a_tracker_that_is_not_installed(world: World, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'names wandb, which is not installed: pip install "hpc-hess\[wandb\]"'):
        run(settings(toy, tmp_path / "run", "wandb"), world)
    assert not (tmp_path / "run").exists()


class Fake:
    """A tracker that does ``act`` before it takes a point or the end."""

    def __init__(self, run: Watched) -> None:
        self.place, self.taken = str(run.out), list[Any]()
        self.act()

    def act(self) -> None: ...

    def add(self, point: Point) -> None:
        self.act()
        self.taken.append(point)

    def finish(self, values: Mapping[str, float], files: list[Path]) -> None:
        self.act()

    def close(self, *, finished: bool) -> None:
        self.act()


def tracked_by(act: Callable[[Fake], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tracking.TRACKERS, "wandb", type("Acting", (Fake,), {"act": act}))
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: object())


@pytest.mark.parametrize("after", [0, 4])
def test_a_tracker_that_fails_is_named_and_the_run_goes_on(
    after: int, world: World, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def act(tracker: Fake) -> None:
        if len(tracker.taken) >= after:
            raise SystemExit("the server says no\nand more")

    tracked_by(act, monkeypatch)
    assert run(settings(toy, tmp_path / "run", "wandb"), world) == 0
    said = capsys.readouterr().out
    assert said.count("wandb is sent nothing more of this run, which goes on: the server says no\n") == 1
    assert len(step_events(read_events(tmp_path / "run"))) == 10


def test_a_tracker_that_hangs_does_not_hold_the_run_up(
    world: World, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    release = threading.Event()
    tracked_by(lambda tracker: release.wait() and None, monkeypatch)
    monkeypatch.setattr(tracking, "_MOST_S", 0.2)
    try:
        assert run(settings(toy, tmp_path / "run", "wandb"), world) == 0
        assert "wandb did not take everything in time: the run does not wait for it" in capsys.readouterr().out
    finally:
        release.set()


def test_what_a_run_is_does_not_depend_on_its_trackers(toy: Path, tmp_path: Path) -> None:
    assert settings(toy, tmp_path).identity() == settings(toy, tmp_path, "wandb", "mlflow").identity()
