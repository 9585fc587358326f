"""Attribution, sketch-check and the search for an intrinsic dimension: whole commands on a toy."""

from __future__ import annotations

import json
import math
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpc_hess import cli
from hpc_hess.commands.attribute import work as attribution
from hpc_hess.commands.intrinsic_dimension.rule import DoublingRule
from hpc_hess.commands.intrinsic_dimension.work import Search, intrinsic_dimension
from hpc_hess.commands.run.work import run
from hpc_hess.commands.sketch_check.work import Comparison, sketch_check
from hpc_hess.config import Config, make_config
from hpc_hess.console.progress import Progress
from hpc_hess.errors import ConfigError, StoreError
from hpc_hess.linalg import probes
from hpc_hess.model.blocks.per_example import ExampleGradients
from hpc_hess.model.data.data import one_example
from hpc_hess.parallel.world import World
from hpc_hess.planning.planner import Planner
from hpc_hess.session.operators import exact_operator
from hpc_hess.session.problem import load_problem
from hpc_hess.sketch.comparison import bits_for, correlation, eigenvalue_error
from hpc_hess.sketch.influence import fisher_preconditioned
from hpc_hess.sketch.sketch import SketchedOperator
from hpc_hess.storage import examples as stored
from hpc_hess.storage.examples import Examples
from hpc_hess.studies.run_page import write_report
from tests.support.dense import matrix_of
from tests.support.spawn import run_ranks
from tests.support.toys import toy_directory

pytestmark = pytest.mark.slow


def settings(toy: Path, out: Path, *overrides: str) -> Config:
    values: dict[str, Any] = {
        "model": {"source": str(toy / "model"), "master_dtype": "float64", "compute_dtype": "float64"},
        "data": {"source": f"tokens:{toy / 'tokens.npy'}", "sequence_length": 12, "sequences": 7, "micro_batch": 4},
        "operator": {"method": "exact", "check": False},
        "sketch": {"dimension": 256},
        "run": {"out": str(out)},
    }
    return make_config(values, list(overrides))


def gradients(config: Config, world: World) -> np.ndarray:
    """Every example's gradient, whole: (n, N)."""
    problem = load_problem(config, world, Progress(0))
    each = ExampleGradients(problem.model, one_example(problem.samples, 0), None)
    rows = []
    for index in range(len(problem.samples)):
        whole = torch.zeros(problem.model.space.size, dtype=torch.float64)

        def sink(data: torch.Tensor, starts: Any, lengths: Any, whole: torch.Tensor = whole) -> None:
            whole[starts[0] : starts[0] + lengths[0]] += data

        each(one_example(problem.samples, index), sink)
        rows.append(whole.numpy())
    return np.stack(rows)


def test_a_build_holds_sketches_of_the_gradients_goes_on_and_grows(
    world: World, toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(toy, tmp_path / "run", "data.sequences=5")
    writes: list[int] = []
    original = Examples.write

    def dies(self: Examples, rows: Any, *values: Any) -> None:
        if writes:
            raise KeyboardInterrupt  # a kill between two writes
        writes.append(len(rows))
        original(self, rows, *values)

    monkeypatch.setattr(attribution, "_WRITE_EVERY_S", -1.0)  # after every example
    monkeypatch.setattr(Examples, "write", dies)
    with pytest.raises(KeyboardInterrupt):
        attribution.build(config, world)
    monkeypatch.setattr(Examples, "write", original)
    with Examples(tmp_path / "run/sketches.h5") as kept:
        assert kept.done.tolist() == [True, False, False, False, False]
    assert attribution.build(config, world) == 0
    longer = settings(toy, tmp_path / "run")
    assert attribution.build(longer, world) == 0
    assert attribution.build(longer, world) == 0
    shown = capsys.readouterr().out
    assert "going on after 1 of 5" in shown
    assert "going on after 5 of 7" in shown
    assert "all 7 examples" in shown
    assert cli.main(["inspect", str(tmp_path / "run")]) == 0
    assert "7 of 7 examples, AFFD to 256 numbers" in capsys.readouterr().out
    whole = gradients(longer, world)
    with Examples(tmp_path / "run/sketches.h5") as found:
        assert found.done.all()
        for row, sketch in enumerate(found.sketches):
            assert abs(np.linalg.norm(sketch) / np.linalg.norm(whole[row]) - 1) < 0.35
        assert correlation(whole @ whole.T, found.sketches @ found.sketches.T) > 0.97
        assert found.losses.min() > 1
    with pytest.raises(StoreError, match="holds sketches with"):
        attribution.build(settings(toy, tmp_path / "run", "sketch.seed=1"), world)
    np.save(tmp_path / "other.npy", np.random.default_rng(5).integers(3, 96, size=300))
    with pytest.raises(StoreError, match="other examples"):
        attribution.build(settings(toy, tmp_path / "run", f"data.source=tokens:{tmp_path / 'other.npy'}"), world)


def test_sketches_of_something_else_are_left_alone(world: World, toy: Path, tmp_path: Path) -> None:
    config = settings(toy, tmp_path / "run")
    (tmp_path / "run").mkdir()
    stored.prepare(tmp_path / "run", np.ones((2, 3), np.int64), 4, {}).close()
    with Examples(tmp_path / "run/sketches.h5", write=True) as file:
        file.write([0], np.ones((1, 4)), [1.0])
    before = (tmp_path / "run/sketches.h5").read_bytes()
    with pytest.raises(StoreError, match="holds sketches with"):
        attribution.build(config, world)
    assert (tmp_path / "run/sketches.h5").read_bytes() == before


def test_a_full_disk_is_named_and_what_is_written_stays(world: World, toy: Path, tmp_path: Path) -> None:
    disk = tmp_path / "small"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        attribution.build(settings(toy, disk / "run", "sketch.dimension=32768", "data.sequences=2"), world)
        before = (disk / "run/sketches.h5").read_bytes()
        with pytest.raises(StoreError, match="full"):
            attribution.build(settings(toy, disk / "run", "sketch.dimension=32768"), world)
        with pytest.raises(StoreError, match="full"):
            attribution.build(settings(toy, disk / "other", "sketch.dimension=65536"), world)
        assert (disk / "run/sketches.h5").read_bytes() == before
        assert not (disk / "other/sketches.h5").exists()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def _build(world: World, config: Config) -> int:
    return attribution.build(config, world)


def test_sketches_do_not_depend_on_the_number_of_ranks(world: World, toy: Path, tmp_path: Path) -> None:
    assert attribution.build(settings(toy, tmp_path / "1"), world) == 0
    with Examples(tmp_path / "1/sketches.h5") as one:
        alone, losses = one.sketches, one.losses
    for ranks in (2, 3):
        assert run_ranks(_build, ranks, settings(toy, tmp_path / str(ranks))) == [0] * ranks
        with Examples(tmp_path / f"{ranks}/sketches.h5") as many:
            assert np.allclose(many.sketches, alone, atol=1e-6 * np.abs(alone).max())
            assert np.allclose(many.losses, losses)


@pytest.mark.parametrize("precondition", ["none", "fisher", "gauss_newton", "hessian"])
def test_a_query_of_an_example_finds_it(
    world: World, toy: Path, tmp_path: Path, precondition: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(toy, tmp_path)
    attribution.build(config, world)
    np.save(tmp_path / "query.npy", np.load(toy / "tokens.npy")[36:48])  # example 3
    asked = attribution.Query(
        data=f"tokens:{tmp_path / 'query.npy'}",
        top=3,
        precondition=precondition,  # type: ignore[arg-type]
        damping=10.0 if precondition == "hessian" else None,
    )
    assert attribution.query(config, world, asked) == 0
    record = json.loads((tmp_path / "attribution.json").read_text())
    assert record["top"][0]["id"] == 3
    assert record["top"][0]["cosine"] == pytest.approx(1.0)
    assert len(record["top"]) == len(record["bottom"]) == 3
    shown = capsys.readouterr().out
    assert "for it" in shown
    assert "attribution.html" in shown
    assert "blockquote" in (tmp_path / "attribution.html").read_text()


def test_fisher_preconditioning_by_either_formula() -> None:
    rng = np.random.default_rng(0)
    for n, dimension in ((5, 8), (9, 4)):
        s, q = rng.normal(size=(n, dimension)), rng.normal(size=(2, dimension))
        dense = np.linalg.solve(s.T @ s / n + 0.3 * np.eye(dimension), q.T).T
        assert np.allclose(fisher_preconditioned(q, s, 0.3), dense)


def test_bad_questions_are_one_sentence(toy: Path, tmp_path: Path, world: World, capsys: pytest.CaptureFixture[str]) -> None:
    for values in ({}, {"text": "a", "data": "b"}, {"text": "a", "top": 0}, {"text": "a", "damping": -1.0}):
        with pytest.raises(ConfigError):
            attribution.Query(**values)  # type: ignore[arg-type]
    with pytest.raises(StoreError, match="attribute build"):
        attribution.query(settings(toy, tmp_path), world, attribution.Query(text="words"))
    with pytest.raises(ConfigError, match="power of two"):
        attribution.build(settings(toy, tmp_path, "sketch.dimension=100"), world)
    with pytest.raises(ConfigError, match="--kinds"):
        Comparison(kinds=("jl",))
    with pytest.raises(ConfigError, match="--largest"):
        Search(smallest=8, largest=4)
    for metric, target in (("accuracy", 100.5), ("loss", 0.1), ("loss", math.nan)):
        with pytest.raises(ConfigError, match="out of reach"):
            Search(metric=metric, target=target)  # type: ignore[arg-type]
    with pytest.raises(SystemExit):
        cli.main(["attribute"])
    assert "PART" in capsys.readouterr().err


def test_sketch_check_compares_and_goes_on(
    world: World, toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, asked = settings(toy, tmp_path / "run"), Comparison(("affd", "qk"), (6, 12), 2)
    assert sketch_check(config, world, asked) == 0
    path = tmp_path / "run/sketch_check.json"
    first = json.loads(path.read_text())
    whole = gradients(config, world)
    assert np.allclose([row["exact"] for row in first["rows"]], whole[2:] @ whole[:2].T)
    found = {(s["kind"], s["bits"]): s["r"] for s in first["found"]["sketches"]}
    assert found["affd", 12] > 0.97
    assert "layers.0" in str(first["found"]["layers"])
    layers = [row["layers"] for row in first["rows"]]
    assert np.allclose(np.sum([list(row.values()) for row in layers], axis=1), whole[2:] @ whole[:2].T)
    path.write_text(json.dumps({**first, "rows": first["rows"][:3]}))  # stopped after three examples
    assert sketch_check(config, world, asked) == 0
    again = json.loads(path.read_text())
    assert [row["scores"] for row in again["rows"]] == [row["scores"] for row in first["rows"]]
    assert "2^12" in capsys.readouterr().out
    assert (tmp_path / "run/sketch_check.html").exists()
    with pytest.raises(StoreError, match="queries"):
        sketch_check(config, world, replace(asked, queries=3))


def _check(world: World, config: Config) -> int:
    return sketch_check(config, world, Comparison(("affd",), (6,), 2))


def test_sketch_check_on_two_ranks(world: World, toy: Path, tmp_path: Path) -> None:
    _check(world, settings(toy, tmp_path / "1"))
    assert run_ranks(_check, 2, settings(toy, tmp_path / "2")) == [0, 0]
    one, two = (json.loads((tmp_path / f"{k}/sketch_check.json").read_text())["rows"] for k in (1, 2))
    for a, b in zip(one, two, strict=True):
        assert np.allclose(a["scores"]["affd 6"], b["scores"]["affd 6"])
        assert np.allclose(a["exact"], b["exact"])


def test_what_comparisons_say() -> None:
    assert bits_for({256: 0.9, 512: 0.96, 1024: 0.94, 2048: 0.97, 4096: 0.99}, 0.95) == 2048
    assert bits_for({256: 0.9}, 0.95) is None
    assert eigenvalue_error([4, 2], [2, 1], rescale=True) == pytest.approx(0)
    assert eigenvalue_error([4, 2], [2, 1]) == pytest.approx(0.5)


def test_the_doubling_rule() -> None:
    rule = DoublingRule(threshold=10.0, delta=0.5, dimension=4, largest=16, before=0.0)
    assert [rule.decide(m) for m in (2.0, 2.1, 4.0, 4.2)] == ["go on", "double", "go on", "double"]
    assert rule.dimension == 16
    assert rule.decide(4.3) == "failed"
    assert rule.decide(10.0) == "found"


@pytest.fixture(scope="module")
def pattern(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy, and tokens that repeat: a task that training a few directions solves in part."""
    folder = tmp_path_factory.mktemp("pattern")
    toy_directory("llama", folder / "model")
    cycle = np.tile(np.arange(5, 11), 60)
    noise = np.random.default_rng(0).integers(3, 96, size=360)
    np.save(folder / "tokens.npy", np.where(np.random.default_rng(1).random(360) < 0.1, noise, cycle))
    return folder


SEARCH = Search(
    smallest=1,
    largest=64,
    every=10,
    delta=0.02,
    share=0.5,
    baseline_steps=30,
    baseline_rate=0.02,
    learning_rate=0.05,
    batch=8,
    held_out=6,
    metric="loss",
)


def test_an_intrinsic_dimension_is_found_and_checked(
    world: World, pattern: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(pattern, tmp_path / "run", "data.sequences=24")
    assert intrinsic_dimension(config, world, SEARCH) == 0
    path = tmp_path / "run/intrinsic_dimension.json"
    record = json.loads(path.read_text())
    assert record["dimension"] in {2**k for k in range(7)}
    assert record["search"][-1][2] >= record["threshold"] > record["start"]
    dimensions = [d for _, d, _ in record["search"]]
    assert dimensions == sorted(dimensions)
    assert record["half_reached"] is not None or record["dimension"] == 1
    shown = capsys.readouterr().out
    assert "intrinsic dimension" in shown
    assert (tmp_path / "run/intrinsic_dimension.html").exists()
    assert intrinsic_dimension(config, world, SEARCH) == 0  # nothing left to do
    assert json.loads(path.read_text()) == record
    with pytest.raises(StoreError, match="delta"):
        intrinsic_dimension(config, world, replace(SEARCH, delta=0.5))


@pytest.mark.parametrize("target", [None, -1.0])
def test_an_interrupted_search_goes_on_to_the_same_end(
    world: World, pattern: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: float | None
) -> None:
    """In ordinary training, or (where a target is given) in a subspace. Out of reach: every dimension is tried."""
    search = replace(SEARCH, target=target, share=1.0, every=5, verify=False, largest=2 if target is None else 8)
    whole = settings(pattern, tmp_path / "whole", "data.sequences=24")
    assert intrinsic_dimension(whole, world, search) == 0
    parts = settings(pattern, tmp_path / "parts", "data.sequences=24")
    from hpc_hess.session.stopping import Stopper

    calls = 0

    def agreed(self: Any, next_step_s: float) -> str:
        nonlocal calls
        calls += 1
        return "a test asks for it" if calls == 13 else ""

    monkeypatch.setattr(Stopper, "agreed", agreed)
    assert intrinsic_dimension(parts, world, search) == 75
    assert intrinsic_dimension(parts, world, search) == 0
    one, other = (json.loads((tmp_path / f"{name}/intrinsic_dimension.json").read_text()) for name in ("whole", "parts"))
    assert one["failed"]
    assert one["baseline"] == other["baseline"]
    assert len(one["baseline"]) == (6 if target is None else 0)
    assert one["search"] == other["search"]
    assert sorted(path.name for path in (tmp_path / "parts").glob("*[0-9]-*")) == []


def test_a_task_without_gain_is_refused(world: World, pattern: Path, tmp_path: Path) -> None:
    search = replace(SEARCH, baseline_rate=10.0, baseline_steps=2)
    with pytest.raises(ConfigError, match="gain nothing"):
        intrinsic_dimension(settings(pattern, tmp_path / "run", "data.sequences=24"), world, search)


def _search(world: World, config: Config) -> int:
    return intrinsic_dimension(config, world, replace(SEARCH, target=-1.0, every=3, verify=False, largest=2))


def test_a_search_on_two_ranks_is_that_on_one(world: World, pattern: Path, tmp_path: Path) -> None:
    _search(world, settings(pattern, tmp_path / "1", "data.sequences=24"))
    assert run_ranks(_search, 2, settings(pattern, tmp_path / "2", "data.sequences=24")) == [0, 0]
    one, two = (json.loads((tmp_path / f"{k}/intrinsic_dimension.json").read_text())["search"] for k in (1, 2))
    assert np.allclose(one, two, atol=1e-8)


# -- spectra in sketch space -------------------------------------------------------------------------------------------


def _spectrum(world: World, config: Config) -> int:
    return run(config, world)


SKETCHED = ["operator.sketched=true", "lanczos.steps=8", "sketch.dimension=64", "analysis.eigenpairs=1", "run.report=false"]


@pytest.fixture(scope="module")
def spectrum(world: World, toy: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("sketched") / "run"
    assert run(settings(toy, out, *SKETCHED), world) == 0
    write_report(out)
    return dict(json.loads((out / "result.json").read_text()))


def test_a_sketched_run_is_lanczos_on_the_dense_sketched_hessian(
    world: World, toy: Path, tmp_path: Path, spectrum: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(toy, tmp_path / "run", *SKETCHED)
    problem = load_problem(config, world, Progress(0))
    operator = SketchedOperator(exact_operator(config, problem), problem.sketch)  # type: ignore[arg-type]
    dense = torch.from_numpy(matrix_of(operator))
    assert torch.allclose(dense, dense.T)
    values = torch.linalg.eigvalsh(dense)
    pair = max(spectrum["eigenpairs"]["pairs"], key=lambda p: p["value"])
    assert pair["value"] == pytest.approx(float(values[-1]), rel=1e-3)
    v = probes.signs(0, 0, 0, 64, dtype=torch.float64) / 8  # the start vector
    assert spectrum["probes"][0]["alpha"][0] == pytest.approx(float(v @ dense @ v), rel=1e-9)
    assert spectrum["num_params"] == 64
    assert spectrum["num_params_model"] == problem.model.space.size
    assert "AFFD to 64 dimensions" in spectrum["operator"]["computes"]
    with pytest.raises(ConfigError, match="sub_block is a study of parameters"):
        settings(toy, tmp_path, *SKETCHED, 'analysis.sub_block=["x"]')
    with pytest.raises(ConfigError, match="cannot be planned"):
        Planner(config, 1, "h100", 1 << 30)


def test_a_sketched_run_on_two_ranks_and_with_another_sketch(
    world: World, toy: Path, tmp_path: Path, spectrum: dict[str, Any]
) -> None:
    assert run_ranks(_spectrum, 2, settings(toy, tmp_path / "2", *SKETCHED)) == [0, 0]
    two = json.loads((tmp_path / "2/result.json").read_text())
    for key in ("alpha", "beta"):
        assert np.allclose(two["probes"][0][key], spectrum["probes"][0][key], rtol=1e-8)
    with pytest.raises(StoreError, match="seed"):
        run(settings(toy, tmp_path / "2", *SKETCHED, "sketch.seed=1"), world)
    assert run(settings(toy, tmp_path / "2", *SKETCHED, "lanczos.probes=2"), world) == 0  # goes on, on one rank
