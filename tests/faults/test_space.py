"""Disk space is given back: by a run when its probes are finished, whatever instant it is killed at, and by ``clean``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpc_hess.commands.clean import clean
from hpc_hess.commands.run.screen import inspect_run
from hpc_hess.commands.run.work import run
from hpc_hess.config import Config, make_config
from hpc_hess.errors import ConfigError, StoreError
from hpc_hess.parallel.world import World
from hpc_hess.storage import build, disk, opening, store
from hpc_hess.storage.disk import allocated
from hpc_hess.storage.lock import RunLock
from hpc_hess.storage.reader import read_store
from tests.support.base_model import command, result_of, save_b, settings_b, tokens_b, write_config
from tests.support.launching import complete
from tests.support.runs import go

pytestmark = pytest.mark.slow

STEPS, ROW = 12, 6992 * 4  # bytes of a row of B
DRIVERS = ["files", "mpio"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("b")
    save_b(folder / "model")
    tokens_b(folder / "tokens.npy")
    return folder


def settings(place: Path, out: Path, **changes: Any) -> Config:
    options: dict[str, Any] = {"operator__check": False, "lanczos__steps": STEPS, "run__grace_s": 0.0}
    return make_config(settings_b(place / "model", place / "tokens.npy", out, **(options | changes)))


def probes_of(out: Path) -> list[dict[str, Any]]:
    """Return a run's probes, without their errors: these count the products of all probes in."""
    return [{key: value for key, value in probe.items() if key != "ritz_errors"} for probe in result_of(out)["probes"]]


@pytest.fixture(scope="module")
def whole(place: Path, world: World, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The two probes of an unbroken run that keeps its basis."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert run(settings(place, out, lanczos__probes=2, store__keep_basis=True), world) == 0
    with read_store(out) as view:
        assert [len(probe.rows) for probe in view.probes] == [STEPS, STEPS]
        assert view.verify() == []
    assert allocated(out) > 2 * STEPS * ROW
    return probes_of(out)


@pytest.fixture(params=DRIVERS)
def driver(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Either driver, in one process: the one file then needs no MPI."""
    monkeypatch.setattr(store, "choose_driver", lambda *args: request.param)
    return str(request.param)


def rows_left(out: Path) -> tuple[int, int]:
    """Return how many rows a store has, and the bytes on disk of the files that hold them."""
    with read_store(out) as view:
        assert view.verify() == []
        return view.schema.rows, allocated(out / "krylov.ranks") + (out / "krylov.h5").stat().st_blocks * 512


def is_free(out: Path) -> bool:
    rows, count = rows_left(out)
    return rows == 0 and count < 250_000  # the numbers and the headers


def test_a_finished_run_leaves_no_basis_and_takes_more_probes(
    place: Path, world: World, tmp_path: Path, whole: list[dict[str, Any]], driver: str
) -> None:
    out = tmp_path / "run"
    assert run(settings(place, out), world) == 0
    assert is_free(out)
    assert probes_of(out) == whole[:1]
    (out / "result.json").unlink()
    assert run(settings(place, out), world) == 0  # a finished run writes its result anew
    assert probes_of(out) == whole[:1]
    assert inspect_run(out, verify=True) == 0
    assert run(settings(place, out, lanczos__probes=2), world) == 0
    assert probes_of(out) == whole
    assert is_free(out)


class KilledError(BaseException):
    """The job ends here."""


def _dies(*args: Any, **options: Any) -> Any:
    raise KilledError


def _dies_after(function: Callable[..., Any]) -> Callable[..., Any]:
    def both(*args: Any, **options: Any) -> Any:
        function(*args, **options)
        raise KilledError

    return both


INSTANTS: dict[str, tuple[Any, str, Any]] = {
    "finished, nothing freed": (store.Store, "free_basis", _dies),
    "the new store is begun": (build, "create_rank_file", _dies),
    "the new store is not in place": (build, "rename_durably", _dies),
    "the new store is in place": (build, "rename_durably", _dies_after(build.rename_durably)),
    "the old rows are not removed": (opening, "sweep", _dies),
}


@pytest.mark.parametrize("instant", INSTANTS)
def test_killed_between_the_last_step_and_the_end(
    place: Path, world: World, tmp_path: Path, whole: list[dict[str, Any]], instant: str
) -> None:
    out = tmp_path / "run"
    where, name, dies = INSTANTS[instant]
    with go_to_the_end(where, name, dies), pytest.raises(KilledError):
        run(settings(place, out), world)
    assert run(settings(place, out), world) == 0
    assert probes_of(out) == whole[:1]
    assert is_free(out)


def go_to_the_end(where: Any, name: str, dies: Any) -> pytest.MonkeyPatch:
    """Let ``name`` die once the last step is committed: other parts of a run use the same functions."""
    patch, free = pytest.MonkeyPatch(), store.Store.free_basis

    def begin(self: store.Store) -> None:
        patch.setattr(where, name, dies)
        (dies if name == "free_basis" else free)(self)

    patch.setattr(store.Store, "free_basis", begin)

    class _Block:
        def __enter__(self) -> None:
            return None

        def __exit__(self, *exc: object) -> None:
            patch.undo()

    return _Block()  # type: ignore[return-value]


def test_a_disk_without_room(
    place: Path, world: World, tmp_path: Path, whole: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without room for the small store the basis stays, and the result is written; without room for a basis: a sentence."""
    out = tmp_path / "run"

    def no_room(*args: Any, **options: Any) -> Any:
        raise StoreError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(store, "rebuild", no_room)
        assert run(settings(place, out), world) == 0
    assert probes_of(out) == whole[:1]
    assert rows_left(out)[0] == STEPS
    assert run(settings(place, out), world) == 0
    assert is_free(out)
    before = (out / "krylov.h5").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(disk, "free_bytes", lambda path: 100_000)
        with pytest.raises(StoreError, match=r"basis needs .* has 100.0 kB free .*: lower lanczos.steps") as caught:
            run(settings(place, out, lanczos__probes=2), world)
    assert "\n" not in str(caught.value)
    assert (out / "krylov.h5").read_bytes() == before
    assert run(settings(place, out, lanczos__probes=2), world) == 0
    assert probes_of(out) == whole


def test_keep_basis(
    place: Path, world: World, tmp_path: Path, whole: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert run(settings(place, out, lanczos__reorthogonalise=3, store__keep_basis=True), world) == 0
    said = capsys.readouterr().out
    assert "store.keep_basis = true keeps the last 4 rows of each probe: lanczos.reorthogonalise = 3" in said
    assert rows_left(out)[0] == 4
    out = tmp_path / "late"
    assert run(settings(place, out), world) == 0
    assert run(settings(place, out, lanczos__probes=2, store__keep_basis=True), world) == 0
    assert "keep_basis = true comes too late for probes that were finished without it" in capsys.readouterr().out
    assert probes_of(out) == whole
    with read_store(out) as view:
        assert [len(probe.rows) for probe in view.probes] == [0, STEPS]
        assert view.verify() == []
    assert run(settings(place, out, lanczos__probes=2), world) == 0  # not any more
    assert is_free(out)


def test_clean_an_unfinished_run(
    place: Path, world: World, tmp_path: Path, whole: list[dict[str, Any]], driver: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows that no step has written yet are freed, and allocated again by the run that goes on."""
    out, config = tmp_path / "run", settings(place, tmp_path / "run")
    assert go(world, config, 45)[0] == 75
    with read_store(out) as view:
        needed = len(view.probes[0].rows)
        assert 0 < needed < STEPS - 3
    (out / "krylov.h5.tmp").write_bytes(bytes(5000))
    before = allocated(out)
    capsys.readouterr()
    assert clean(out, dry=True) == 0
    said = capsys.readouterr().out
    assert allocated(out) == before
    assert "would be freed: rows that hold nothing that is needed" in said
    assert "krylov.h5.tmp" in said
    assert clean(out) == 0
    freed = before - allocated(out)
    assert abs(freed - (STEPS - needed) * ROW) < 2 * ROW
    with read_store(out) as view:
        assert view.verify() == []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk, "free_bytes", lambda path: 2 * ROW)
        with pytest.raises(StoreError, match="the Krylov basis needs .* free"):
            run(config, world)
    assert go(world, config, 12)[0] == 75
    assert allocated(out) > before - 2 * ROW
    assert run(config, world) == 0
    assert probes_of(out) == whole[:1]


def test_clean_a_finished_run(
    place: Path, world: World, tmp_path: Path, whole: list[dict[str, Any]], driver: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out, keeping = (
        tmp_path / "run",
        {"store__keep_basis": True, "analysis__eigenpairs": 1, "analysis__diagonal": "hutchinson", "analysis__samples": 6},
    )
    assert run(settings(place, out, **keeping), world) == 0
    pairs = result_of(out)["eigenpairs"]["pairs"]
    (out / "studies" / "diagonal" / "pieces").mkdir()
    (out / "studies" / "diagonal" / "pieces" / "krylov.h5").write_bytes((out / "krylov.h5").read_bytes())
    capsys.readouterr()
    assert clean(out) == 0
    said = capsys.readouterr().out
    assert "kept: the Krylov basis, by store.keep_basis = true (--basis frees it)" in said
    assert "freed: pieces of a study that has ended (studies/diagonal/pieces/)" in said
    assert rows_left(out)[0] == STEPS
    assert clean(out, basis=True) == 0
    assert is_free(out)
    for name, rows in (("eigenpairs", [pair["row"] for pair in pairs]), ("studies/diagonal/diagonal", [0, 1])):
        with read_store(out / name) as view:
            assert {*rows} <= {*view.probes[0].rows}
            assert view.verify() == []
    assert run(settings(place, out, lanczos__probes=2, **keeping | {"store__keep_basis": False}), world) == 0
    assert probes_of(out) == whole
    assert result_of(out)["eigenpairs"]["pairs"] == pairs


def test_what_clean_does_not_touch(place: Path, world: World, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such run directory"):
        clean(tmp_path / "nowhere")
    (tmp_path / "photos.part").write_text("mine")
    with pytest.raises(ConfigError, match="is not a run directory"):
        clean(tmp_path)
    assert (tmp_path / "photos.part").exists()
    out = tmp_path / "run"
    assert run(settings(place, out), world) == 0
    lock = RunLock.acquire(out, world)
    with pytest.raises(StoreError, match="open already|another job"):
        clean(out)
    lock.release()


@pytest.mark.mpi
def test_over_mpi(place: Path, world: World, tmp_path: Path, whole: list[dict[str, Any]]) -> None:
    out = tmp_path / "run"
    values = settings(place, out, store__driver="mpio").model_dump()
    config = write_config(tmp_path / "config.toml", values)
    code, said = complete("mpirun.sh", "-n", "2", config)
    assert code == 0, said
    assert "of disk space given back" in said
    with read_store(out) as view:
        assert (view.schema.driver, view.schema.rows) == ("mpio", 0)
    code, said = complete("mpirun.sh", "-n", "2", config, "--set", "lanczos.probes=2")
    assert code == 0, said
    assert is_free(out)
    alpha = [probe["alpha"][:4] for probe in result_of(out)["probes"]]
    assert alpha == [pytest.approx(probe["alpha"][:4], rel=1e-2, abs=1e-2) for probe in whole]
    code, said = command("clean", out)
    assert code == 0, said
    assert "0 B freed" in said
    assert json.loads((out / "result.json").read_text())["world_size"] == 2
