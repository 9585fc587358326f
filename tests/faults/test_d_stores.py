"""Runs and stores: what a resume needs, zero vectors, damaged files and their remedies, locks, signals, a full disk."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import h5py
import numpy as np
import pytest
import torch

from hpc_hess.commands.dynamics import work as dynamics_module
from hpc_hess.commands.dynamics.work import dynamics
from hpc_hess.commands.run.screen import inspect_run
from hpc_hess.commands.run.work import run
from hpc_hess.config import Config, load_config, make_config
from hpc_hess.errors import ConfigError, StoreError
from hpc_hess.linalg.lanczos import Lanczos, Window
from hpc_hess.linalg.operator import FunctionOperator
from hpc_hess.linalg.probes import normals
from hpc_hess.parallel.basis import Basis
from hpc_hess.parallel.layout import Layout
from hpc_hess.parallel.vector import Vector, VectorSpace
from hpc_hess.parallel.world import World
from hpc_hess.planning.sweep import measured
from hpc_hess.storage import events as events_module
from hpc_hess.storage import examples
from hpc_hess.storage.events import EventLog, append_lines, read_events
from hpc_hess.storage.journal import Member
from hpc_hess.storage.lock import NAME, RunLock
from hpc_hess.storage.opening import put_aside
from hpc_hess.storage.reader import read_store
from hpc_hess.storage.run_files import write_aside
from hpc_hess.studies import runner as studies
from hpc_hess.studies.run_page import rewrite_report
from tests.support.fuzz_store import stopped_after
from tests.support.spawn import run_ranks, start_ranks
from tests.support.store_toys import create, fill, reopen, unseal

ALONE = World.alone()
TOY = Path(__file__).resolve().parents[2] / "launch" / "configs" / "toy.toml"


@pytest.fixture(autouse=True, scope="module")
def speed() -> Iterator[None]:
    """How fast this machine is takes a second to measure and concerns nothing here."""
    with mock.patch("hpc_hess.commands.run.work._limits", return_value=[1e9, 1e9]):
        yield


def settings(toy: Path, out: Path, *overrides: str) -> Config:
    """A run of seconds in double precision, over a few of the parameters."""
    only = ["model.layers.0.*layernorm.weight", "model.norm.weight", "model.layers.1.self_attn.k_proj.weight"]
    return make_config(
        {
            "model": {"source": str(toy / "model"), "master_dtype": "float64", "compute_dtype": "float64"},
            "parameters": {"include": only},
            "operator": {"step": 1e-3, "check": False},
            "data": {"source": f"tokens:{toy / 'tokens.npy'}", "sequence_length": 12, "sequences": 4, "micro_batch": 4},
            "lanczos": {"steps": 4},
            "run": {"out": str(out), "report": False},
        },
        list(overrides),
    )


def result_of(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "result.json").read_text()))


@pytest.fixture(scope="module")
def finished(world: World, toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with eigenpairs and a study, to be copied."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert run(settings(toy, out, *MORE), world) == 0
    return out


MORE = ["analysis.eigenpairs=1", "analysis.tolerance=1e-2", "analysis.trace=hutchinson", "analysis.samples=6"]


# -- D1: the window ----------------------------------------------------------------------------------------------------


def matrix_operator(size: int = 24) -> FunctionOperator:
    space = VectorSpace(World.alone(), Layout({"a": (size,)}), torch.float64)
    a = normals(3, 0, 0, size * size, dtype=torch.float64).reshape(size, size)
    a = a + a.T
    return FunctionOperator(space, lambda v: Vector(space, a @ v.data))


def test_every_resume_is_the_unbroken_process() -> None:
    """All 432 of (1 to 8 steps, rule, stop): only what a resume says that it needs is there, in the rows that it has."""
    operator, tried = matrix_operator(), 0
    for steps in range(1, 9):
        for rule in ("full", "none", *range(1, 11)):
            window = Window(rule, steps)
            whole = Lanczos(operator, Basis(operator.space, window.rows), steps, rule)
            whole.start(operator.space.wrap(normals(1, 0, 0, 24, dtype=torch.float64)))
            held: list[torch.Tensor] = []
            for stop in range(steps):
                held.append(whole.basis[stop].data.clone())  # v_stop, in memory for as long as the window
                again = Lanczos(operator, Basis(operator.space, window.rows), steps, rule)
                again.resume(whole.alpha, whole.beta, ended=False)
                again.basis.rows.fill_(torch.nan)
                for j in again.rows_needed():
                    again.basis[j] = operator.space.wrap(held[j].clone())
                # v_{stop+1} is written while the commit before still counts: in a row which that one does not need
                needed = {j % window.rows for j in again.rows_needed()}
                assert stop + 1 == steps or (stop + 1) % window.rows not in needed
                while not again.finished:
                    again.step()
                whole.step()
                tried += 1
                ends = (steps, rule, stop)
                assert (again.alpha[: stop + 1], again.beta[: stop + 1]) == (whole.alpha, whole.beta), ends
            assert (again.alpha, again.beta) == (whole.alpha, whole.beta)
    assert tried == 432


@pytest.mark.parametrize(
    ("rule", "steps", "alpha", "beta"), [('"none"', 2, None, 8.48607073), ("4", 4, -3.203595893601005, 7.1346697374252015)]
)
def test_a_run_that_was_stopped_before_its_last_step(
    world: World, tmp_path: Path, rule: str, steps: int, alpha: float | None, beta: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(TOY.parents[2])
    config = load_config(
        TOY,
        [
            f"lanczos.steps={steps}",
            f"lanczos.reorthogonalise={rule}",
            "lanczos.probes=1",
            "run.report=false",
            f"run.out={tmp_path / 'run'}",
            "operator.check=false",
        ],
    )
    assert stopped_after(config, world, steps - 1) == 75
    assert run(config, world) == 0
    probe = result_of(tmp_path / "run")["probes"][0]
    # float32 sums differ between processors by 2e-7
    assert probe["beta"][-1] == pytest.approx(beta, rel=1e-5)
    assert alpha is None or probe["alpha"][-1] == pytest.approx(alpha, rel=1e-5)


def test_a_study_of_scaling_counts_the_vectors_of_a_step(finished: Path, tmp_path: Path) -> None:
    out = copied(finished, tmp_path)
    text = (out / "config.toml").read_text()
    for rule, counts, rows in (
        ('"full"', [1, 2, 3, 4], 4),
        ('"none"', [0, 0, 0, 0], 3),
        ("1", [1, 2, 2, 2], 3),
        ("3", [1, 2, 3, 3], 4),
    ):
        (out / "config.toml").write_text(text.replace('reorthogonalise = "full"', f"reorthogonalise = {rule}"))
        found = measured(out)
        assert ([count for count, _, _ in found.steps], found.rows) == (counts, rows)


# -- D2: rows of zeros -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("old", [False, True])
def test_a_row_of_zeros_is_a_row(tmp_path: Path, old: bool) -> None:
    """Committed, committed again, read, verified, copied into another layout. ``old``: with a checksum of 0 on disk."""
    nothing = np.empty(0)
    with mock.patch("hpc_hess.storage.checksum.ZERO", 0 if old else (1 << 64) - 1):
        store = create(tmp_path, ALONE, keep_basis=True, probes=1)
        for row in range(2):
            store.write_row(0, row, np.zeros(store._shard.size, np.float32))
            store.commit(0, [Member(nothing, nothing, rows=range(row + 1))]) if not (old and row) else None
        store.close()
    with read_store(tmp_path) as view:
        assert (int(view.probes[0].checksum[0]) == 0) == old
        assert view.verify() == []
        assert not view.row(0, 0).any()
    store = reopen(tmp_path, ALONE)
    store.write_row(0, 2, np.zeros(store._shard.size, np.float32))
    store.commit(0, [Member(nothing, nothing, rows=[0, 2])])
    store.close()
    store = reopen(tmp_path, ALONE, steps=9)  # rebuilt
    assert store.verify_rows(0, [0, 2]) == []
    assert not store.read_row(0, 0).any()
    store.close()
    with h5py.File(next(tmp_path.glob("krylov.ranks/*/*.h5")), "r+") as file:
        file["basis/0"][0, 5] = 1e-30
    with read_store(tmp_path) as view:
        assert view.verify() == ["basis row 0 of probe 0 does not match its checksum"]


def test_more_classes_than_there_are(world: World, toy: Path, tmp_path: Path) -> None:
    """Every token that occurs is a class: there are no others, and their mean, which would be zero, is not computed."""
    out = tmp_path / "run"
    config = settings(
        toy,
        out,
        "operator.kind=gauss_newton",
        "operator.method=exact",
        "operator.step=auto",
        "data.sequences=2",
        "lanczos.steps=3",
        "analysis.class_groups=40",
        "analysis.class_steps=3",
    )
    assert run(config, world) == 0
    found = result_of(out)["studies"]["class_structure"]
    ids = np.load(toy / "tokens.npy")[:24].reshape(2, 12)[:, 1:]
    occur, counts = np.unique(ids, return_counts=True)
    assert len(occur) < 40
    assert sorted(found["tokens"]) == occur.tolist()
    assert sorted(found["shares"]) == pytest.approx(sorted(counts / counts.sum()))
    assert len(found["means"]) == len(occur)


# -- D4: "never", and remedies that are true ---------------------------------------------------------------------------


def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_never_puts_the_old_run_aside(world: World, toy: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run(settings(toy, out), world) == 0
    with (out / "krylov.h5").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(StoreError) as caught:
        run(settings(toy, out), world)
    assert str(caught.value).endswith('start anew in another run.out or with run.resume = "never"')
    assert run(settings(toy, tmp_path / "other"), world) == 0
    before = result_of(out)
    for number, seed in ((1, 1), (2, 2)):
        assert run(settings(toy, out, "run.resume=never", f"lanczos.seed={seed}"), world) == 0
        assert result_of(out)["probes"][0]["alpha"] != before["probes"][0]["alpha"]
        aside = tmp_path / f"run.before-{number}"
        assert result_of(aside) == before
        before = result_of(out)
    assert (tmp_path / "run.before-1" / "krylov.h5").stat().st_size == 1000
    assert len(list(tmp_path.iterdir())) == 4
    # its config.toml goes on with it
    assert load_config(out / "config.toml").run.resume == "auto"
    assert run(load_config(out / "config.toml", ["lanczos.probes=2"]), world) == 0
    assert len(result_of(out)["probes"]) == 2


def test_never_without_a_run_and_where_it_cannot_be_put_aside(
    world: World, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    (out / "notes").mkdir(parents=True)
    assert run(settings(toy, out, "run.resume=never", "lanczos.steps=1"), world) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    # a configuration that is refused leaves the old run where it is
    with pytest.raises(ConfigError):
        run(settings(toy, out, "run.resume=never", "data.source=tokens:nothing.npy"), world)
    monkeypatch.chdir(out / "notes")
    with pytest.raises(StoreError, match="where this program was started, cannot be put aside: choose another run.out"):
        run(settings(toy, out, "run.resume=never", "lanczos.steps=1"), world)
    assert (out / "result.json").exists()


def hold_and_put_aside(world: World, run_dir: str, notes: str) -> str:
    lock = RunLock.acquire(Path(run_dir), world)
    (Path(notes) / "held").touch()
    while not (Path(notes) / "waits").exists():
        time.sleep(0.05)
    aside = put_aside(Path(run_dir))
    lock.release()
    return str(aside)


def test_a_job_that_waits_locks_the_new_directory(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    processes, pipes = start_ranks(hold_and_put_aside, 1, str(run_dir), str(tmp_path))
    try:
        while not (tmp_path / "held").exists():
            assert processes[0].is_alive()
            time.sleep(0.05)
        original = RunLock._take

        def take(self: RunLock, *arguments: Any) -> None:
            (tmp_path / "waits").touch()
            original(self, *arguments)

        with mock.patch.object(RunLock, "_take", take):
            lock = RunLock.acquire(run_dir, ALONE, wait_s=20)
        assert (tmp_path / "run.before-1").is_dir()
        assert os.path.samestat(os.fstat(lock._handle), os.stat(run_dir / NAME))
        lock.release()
    finally:
        for process, pipe in zip(processes, pipes, strict=True):
            process.join(10)
            process.kill()
            pipe.close()


def cut(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "rank file": lambda out: next(out.glob("krylov.ranks/*/*.h5")).unlink(),
    "search": lambda out: cut(out / "eigenpairs" / "krylov.h5"),
    "search's rank file": lambda out: next(out.glob("eigenpairs/krylov.ranks/*/*.h5")).unlink(),
    "study": lambda out: (out / "studies" / "trace" / "found.json").write_text(""),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_the_remedy_in_the_sentence_helps(world: World, toy: Path, tmp_path: Path, finished: Path, name: str) -> None:
    out = copied(finished, tmp_path)
    before = result_of(out)
    (out / "result.json").unlink()  # else there is nothing to compute
    DAMAGES[name](out)
    with pytest.raises(StoreError) as caught:
        run(settings(toy, out, *MORE), world)
    text = str(caught.value)
    again = ""
    if found := re.search(r"restore it from a copy, or remove (/\S+) and start the same command again$", text):
        assert Path(found[1]).parent in (out, out / "studies")
        shutil.rmtree(found[1])
    else:
        assert text.endswith('or start anew in another run.out or with run.resume = "never"'), text
        again = "run.resume=never"
    assert run(settings(toy, out, *MORE, *filter(None, [again])), world) == 0
    mine = result_of(out)
    for key in ("probes", "studies", "eigenpairs"):
        assert mine[key] == before[key], key


# -- D5, D14: events ---------------------------------------------------------------------------------------------------


def test_an_event_after_a_torn_line(world: World, toy: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert stopped_after(settings(toy, out), world, 2) == 75
    os.truncate(out / "events.jsonl", (out / "events.jsonl").stat().st_size - 5)
    assert run(settings(toy, out), world) == 0
    lines = (out / "events.jsonl").read_text().splitlines()
    whole = [line for line in lines if line.endswith("}")]
    assert len(whole) == len(lines) - 1
    assert [json.loads(line)["event"] for line in whole] == ["gradient", "start", "step", "resume", "step", "step"]
    assert len(measured(out).steps) == 3
    # as a run of before left it: glued to the torn line
    (out / "events.jsonl").write_text("\n".join(lines).replace('"h\n', '"h') + "\n[1]\n")
    assert len(measured(out).steps) >= 2
    assert rewrite_report(out).exists()
    (out / "events.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"events\.jsonl holds no step of a run: leave this directory out"):
        measured(out)


def page_full(path: Path) -> Path:
    """Fill a file's last page, so that the next byte needs a new one, then the disk."""
    size = path.stat().st_size
    append_lines(path, [json.dumps("x" * (-size % 4096 - 3 + 4096))])
    assert path.stat().st_size % 4096 == 0
    return fill(path.parents[1])


def event_on_a_full_disk(world: World, run_dir: str) -> str:
    out, log = Path(run_dir), EventLog(Path(run_dir), world)
    log.write({"event": "start", "probe": 0})
    if world.rank == 0:
        page_full(out / "events.jsonl")
    world.barrier("full")
    with pytest.raises(StoreError) as caught:
        log.write({"event": "resume", "probe": 0})
    return str(caught.value)


def test_a_full_disk_is_said_on_all_ranks(small_disk: Path) -> None:
    (small_disk / "run").mkdir()
    first, second = run_ranks(event_on_a_full_disk, 2, str(small_disk / "run"))
    assert first == second
    assert "is full (write an event): free some space and start the same command again" in first
    assert [e["event"] for e in read_events(small_disk / "run")] == ["start"]
    assert (small_disk / "run" / "events.jsonl").read_bytes().endswith(b"\n")


def test_a_step_whose_event_finds_no_room_is_not_lost(world: World, toy: Path, tmp_path: Path, small_disk: Path) -> None:
    out, fillers = small_disk / "run", []

    def append(path: Path, lines: list[str]) -> None:
        if '"step": 2' in lines[0]:
            fillers.append(page_full(path))
        append_lines(path, lines)

    with mock.patch.object(events_module, "append_lines", append), pytest.raises(StoreError, match="is full"):
        run(settings(toy, out), world)
    with read_store(out) as view:
        assert view.state.step == 2
    fillers[0].unlink()
    assert run(settings(toy, out), world) == 0
    assert run(settings(toy, tmp_path / "whole"), world) == 0
    assert result_of(out)["probes"] == result_of(tmp_path / "whole")["probes"]


# -- D7: what h5py raises ----------------------------------------------------------------------------------------------


def without(name: str) -> Callable[[Path], None]:
    def damage(out: Path) -> None:
        with h5py.File(out / "krylov.h5", "r+") as file:
            del file[name]

    return damage


def group_instead(out: Path) -> None:
    with h5py.File(out / "krylov.h5", "r+") as file:
        del file["probes/0/alpha"]
        file.create_group("probes/0/alpha")


def attribute(name: str, value: Any) -> Callable[[Path], None]:
    def damage(out: Path) -> None:
        with h5py.File(out / "krylov.h5", "r+") as file:
            del file.attrs[name]
            if value is not None:
                file.attrs[name] = value

    return damage


def other_name(out: Path) -> None:
    with h5py.File(out / "krylov.h5", "r+") as file:
        names = file["layout/name"][...]
        file["layout/name"][0] = names[1]


SPOILT: dict[str, Callable[[Path], object]] = {
    **{
        f"no {name}": without(name)
        for name in ("layout/name", "probes/0", "probes/0/basis", "probes/0/checksum", "commit", "extra", "attributes")
    },
    "a group": group_instead,
    "no rows": attribute("rows", None),
    "text": attribute("rows", "many"),
    "more rows": attribute("rows", 9),
    "another name": other_name,
    "no version": attribute("format_version", None),
    "version in words": attribute("format_version", "two"),
}


@pytest.mark.parametrize("sealed", [True, False], ids=["sealed", "of an earlier version"])
@pytest.mark.parametrize("name", SPOILT)
def test_a_damaged_store_is_a_sentence(
    world: World, toy: Path, tmp_path: Path, finished: Path, name: str, sealed: bool
) -> None:
    out = copied(finished, tmp_path)
    if not sealed:
        unseal(out / "krylov.h5")
    SPOILT[name](out)
    for command in (lambda: inspect_run(out, verify=True), lambda: run(settings(toy, out, *MORE), world)):
        try:
            assert command() == (2 if "basis" in name and command.__code__.co_names[0] == "inspect_run" else 0)
        except StoreError as error:
            assert "krylov.h5" in str(error)  # noqa: PT017
        else:
            assert name == "no probes/0/basis"
            assert not sealed


def test_damaged_sketches(tmp_path: Path) -> None:
    tokens = np.arange(12).reshape(3, 4)
    examples.prepare(tmp_path, tokens, 8, {"seed": 0}).close()
    path = tmp_path / examples.NAME
    with h5py.File(path, "r+") as file:
        del file["digest"]
    with pytest.raises(StoreError, match=r"sketches\.h5 cannot be used .*: restore it from a copy, or remove it and start"):
        examples.prepare(tmp_path, tokens, 8, {"seed": 0})
    path.unlink()
    with examples.prepare(tmp_path, tokens, 8, {"seed": 0}) as file:
        assert len(file) == 3


# -- D13: locks and signals --------------------------------------------------------------------------------------------

TRY = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"


def test_result_and_report_are_written_under_the_lock(world: World, toy: Path, tmp_path: Path) -> None:
    out, free = tmp_path / "run", {}

    def attempted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Path, *arguments: Any) -> Any:
            done = subprocess.run([sys.executable, "-S", "-c", TRY, str(out / NAME)], stderr=subprocess.DEVNULL, check=False)
            free[f"{name} {path.name}"] = done.returncode == 0
            return function(path, *arguments)

        return call

    from hpc_hess.studies import run_page as page

    with (
        mock.patch("hpc_hess.studies.opening.write_aside", attempted("write", write_aside)),
        mock.patch("hpc_hess.studies.whole_run.write_aside", attempted("write", write_aside)),
        mock.patch.object(page, "write_report", attempted("report", page.write_report)),
    ):
        assert run(settings(toy, out, "run.report=true"), world) == 0
    assert free == {"write config.toml": False, "write result.json": False, "report run": False}
    assert subprocess.run([sys.executable, "-S", "-c", TRY, str(out / NAME)], check=False).returncode == 0


def test_a_job_that_waited_finds_what_the_other_one_left(world: World, toy: Path, tmp_path: Path, finished: Path) -> None:
    out = tmp_path / "run"
    original = RunLock.acquire.__func__  # type: ignore[attr-defined]

    def acquire(cls: type[RunLock], run_dir: Path, *arguments: Any, **options: Any) -> RunLock:
        if run_dir == out and not out.exists():
            copied(finished, tmp_path)  # another job's, which was at work when this one looked first
        return original(cls, run_dir, *arguments, **options)

    with mock.patch.object(RunLock, "acquire", classmethod(acquire)):
        assert run(settings(toy, out, *MORE), world) == 0
    assert result_of(out)["probes"] == result_of(finished)["probes"]


def test_a_signal_between_two_models_is_heeded(world: World, toy: Path, tmp_path: Path) -> None:
    models = [str(shutil.copytree(toy / "model", tmp_path / name)) for name in ("first", "second")]
    config = settings(toy, tmp_path / "unused", "analysis.eigenpairs=1", "analysis.most_products=2", "lanczos.steps=2")
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # as the command line sets it
    try:
        with mock.patch.object(dynamics_module, "release_memory", side_effect=lambda: os.kill(os.getpid(), signal.SIGUSR1)):
            assert dynamics(config, world, models=models, sequences=[], out=tmp_path / "out") == 75
        assert (tmp_path / "out" / "first" / "result.json").exists()
        assert not (tmp_path / "out" / "second").exists()
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
        assert dynamics(config, world, models=models, sequences=[], out=tmp_path / "out") == 0
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert len(json.loads((tmp_path / "out" / "dynamics.json").read_text())["runs"]) == 2


# -- G6: on disk before what it replaces is removed --------------------------------------------------------------------


class Calls:
    """Notes fsync, renaming and the removal of pieces, in their order."""

    def __init__(self) -> None:
        self.made: list[str] = []

    def __enter__(self) -> Calls:
        fsync, replace, remove = os.fsync, os.replace, studies.remove

        def named(handle: int) -> None:
            self.made.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{handle}')).name}")
            fsync(handle)

        def renamed(source: Path, target: Path) -> None:
            self.made.append(f"rename {Path(target).name}")
            replace(source, target)

        def removed(path: Path) -> None:
            self.made.append(f"remove {path.name}")
            remove(path)

        self._patches = [
            mock.patch("os.fsync", named),
            mock.patch("os.replace", renamed),
            mock.patch.object(studies, "remove", removed),
        ]
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(self, *exc: object) -> None:
        for patch in self._patches:
            patch.stop()


def test_a_file_and_its_directory_are_on_disk(tmp_path: Path) -> None:
    with Calls() as calls:
        write_aside(tmp_path / "x.json", "{}")
    assert calls.made == ["fsync x.json.part", "rename x.json", f"fsync {tmp_path.name}"]


def test_pieces_of_a_study_are_removed_once_what_was_found_is_on_disk(world: World, toy: Path, tmp_path: Path) -> None:
    with Calls() as calls:
        assert run(settings(toy, tmp_path / "run", "lanczos.steps=1", "analysis.block_diagonal=['tensor']"), world) == 0
    end = calls.made.index("remove pieces")
    assert calls.made[end - 3 : end] == ["fsync found.json.part", "rename found.json", "fsync block_diagonal"]
    arrays = [call for call in calls.made[:end] if call.endswith(".npy")]
    for call in arrays:
        if call.startswith("rename"):
            assert f"fsync {call.split()[1].removesuffix('.npy')}.part.npy" in arrays
