"""A run in TensorBoard, Weights & Biases and MLflow: a small class each, that takes the points which are not there yet."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

_PROJECT = "hpc-hess"  # of Weights & Biases, and experiment of MLflow, where their own variables name none


class Watched(NamedTuple):
    """What a tracker is told of a run at first. ``run_id`` is the same for every start that goes on with it."""

    out: Path
    run_id: str
    config: dict[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        """The configuration as numbers and texts by section.key."""
        return {
            key: value if isinstance(value, int | float | str) else str(value)
            for key, value in flat(self.config, keep=lambda value: True).items()
        }


class Point(NamedTuple):
    """Values at a step of a curve; ``number`` counts the points of all curves from 0, ``time`` is the wall clock's."""

    number: int
    curve: str
    step: int
    time: float
    values: dict[str, float]


class Tracker(Protocol):
    """One run in a tracker. It is sent every point of the run at each start; any method may raise anything."""

    place: str  # where to look at it

    def add(self, point: Point) -> None:
        """Take a point, unless an earlier start has sent it."""

    def finish(self, values: Mapping[str, float], files: list[Path]) -> None:
        """Take the scalars of the result, and the figures and pages of the run."""

    def close(self, *, finished: bool) -> None:
        """Send what was kept back; ``finished`` : the run will not go on."""


def flat(tree: Mapping[str, Any], keep: Callable[[Any], bool], within: str = "", by: str = ".") -> dict[str, Any]:
    """Return the leaves of nested dictionaries that are to be kept, by their joined names."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{within}{by}{key}" if within else key
        if isinstance(value, Mapping):
            found |= flat(value, keep, name, by)
        elif keep(value):
            found[name] = value
    return found


class TensorBoard:
    """Event files in RUN/tensorboard. Each start writes all points; a reader drops those of the start before."""

    def __init__(self, run: Watched) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self.place = str(run.out / "tensorboard")
        self._writer = SummaryWriter(self.place, purge_step=0, flush_secs=10)
        _, begin, self._end = hparams(run.settings, {})
        self._write(begin)

    def _write(self, summary: Any) -> None:
        self._writer.file_writer.add_summary(summary, 0)  # type: ignore[attr-defined]

    def add(self, point: Point) -> None:
        """Write a scalar for each value, at the time when it was measured."""
        for name, value in point.values.items():
            self._writer.add_scalar(f"{point.curve}/{name}", value, point.step, point.time)

    def finish(self, values: Mapping[str, float], files: list[Path]) -> None:
        """Write the scalars and the figures."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        for name, value in values.items():
            self._writer.add_scalar(f"result/{name}", value, 0)
        for file in files:
            if file.suffix == ".png":
                data = file.read_bytes()
                width, height = (int.from_bytes(data[k : k + 4]) for k in (16, 20))  # of the header of every PNG
                image = Summary.Image(width=width, height=height, colorspace=4, encoded_image_string=data)
                self._write(Summary(value=[Summary.Value(tag=f"figures/{file.stem}", image=image)]))
        self._write(self._end)

    def close(self, *, finished: bool) -> None:
        """Flush the file and close it."""
        del finished
        self._writer.close()


class Wandb:
    """A run of Weights & Biases, under the id of the run. WANDB_MODE, WANDB_PROJECT and its other variables count."""

    def __init__(self, run: Watched) -> None:
        import wandb

        self._wandb = wandb
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            id=run.run_id,
            name=os.environ.get("WANDB_NAME", run.out.name),
            dir=os.environ.get("WANDB_DIR", str(run.out)),
            config=run.config,
            resume="allow",
            settings=wandb.Settings(console="off", silent=True),
        )
        self.place = self._run.url or self._run.dir
        self._there = self._run.step  # 0 without a server: the directory of each start holds the whole run
        self._curves: set[str] = set()

    def add(self, point: Point) -> None:
        """Log a point against the step of its own curve."""
        if point.curve not in self._curves:
            self._curves.add(point.curve)
            self._run.define_metric(f"{point.curve}/*", step_metric=f"{point.curve}/step")
        if point.number >= self._there:
            values = {f"{point.curve}/{name}": value for name, value in point.values.items()}
            self._run.log({f"{point.curve}/step": point.step, **values}, step=point.number)

    def finish(self, values: Mapping[str, float], files: list[Path]) -> None:
        """Put the scalars and the figures into the summary."""
        self._run.summary.update({f"result/{name}": value for name, value in values.items()})
        for file in files:
            if file.suffix == ".png":
                self._run.summary[f"figures/{file.stem}"] = self._wandb.Image(str(file))

    def close(self, *, finished: bool) -> None:
        """Wait until everything is sent, or written where WANDB_MODE is offline."""
        if not finished:
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if finished else 1)


class Mlflow:
    """A run of MLflow, found again by a tag. MLFLOW_TRACKING_URI counts; without it, files in RUN/mlruns."""

    def __init__(self, run: Watched) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self.place = os.environ.get("MLFLOW_TRACKING_URI", "")
        if not self.place:  # files need no database; later versions of MLflow want to be told that they are meant
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            self.place = (run.out / "mlruns").resolve().as_uri()
        self._metric, self._client = Metric, MlflowClient(self.place)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        earlier = self._client.search_runs([number], f"tags.hpc_hess_run = '{run.run_id}'")
        self._steps: dict[str, set[int]] = {}  # of each metric, those that are there
        self._goes_on = bool(earlier)
        if earlier:
            self._run = earlier[0].info.run_id
            self._client.update_run(self._run, "RUNNING")
            return
        self._run = self._client.create_run(number, tags={"hpc_hess_run": run.run_id}, run_name=run.out.name).info.run_id
        params = [Param(key, str(value)) for key, value in run.settings.items()]
        for start in range(0, len(params), 100):  # as many as a call takes
            self._client.log_batch(self._run, params=params[start : start + 100])

    def add(self, point: Point) -> None:
        """Log those values of a point that are not there."""
        self._log({f"{point.curve}/{name}": value for name, value in point.values.items()}, point.step, point.time)

    def _log(self, values: Mapping[str, float], step: int, at: float) -> None:
        allowed = {re.sub(r"[^\w\-. :/]", "_", name): value for name, value in values.items()}
        new = {name: value for name, value in allowed.items() if step not in self._known(name)}
        metrics = [self._metric(name, value, int(1000 * at), step) for name, value in new.items()]
        for start in range(0, len(metrics), 1000):  # as many as a call takes
            self._client.log_batch(self._run, metrics=metrics[start : start + 1000])
        for name in new:
            self._known(name).add(step)

    def _known(self, name: str) -> set[int]:
        if name not in self._steps:
            history = self._client.get_metric_history(self._run, name) if self._goes_on else []
            self._steps[name] = {metric.step for metric in history}
        return self._steps[name]

    def finish(self, values: Mapping[str, float], files: list[Path]) -> None:
        """Log the scalars, and the files as artifacts."""
        self._log({f"result/{name}": value for name, value in values.items()}, 0, time.time())
        for file in files:
            self._client.log_artifact(self._run, str(file), "figures" if file.suffix == ".png" else None)

    def close(self, *, finished: bool) -> None:
        """Say how the run stands."""
        self._client.set_terminated(self._run, "FINISHED" if finished else "KILLED")


TRACKERS: dict[str, Callable[[Watched], Tracker]] = {"tensorboard": TensorBoard, "wandb": Wandb, "mlflow": Mlflow}
