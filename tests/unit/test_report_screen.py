import io
import json

import h5py
import numpy as np
import pytest

from hpc_hess.commands.run.screen import inspect_run, inspect_text, print_summary
from hpc_hess.errors import ConfigError, StoreError
from hpc_hess.parallel.layout import Layout
from hpc_hess.parallel.world import World
from hpc_hess.storage.journal import Member
from hpc_hess.storage.store import Store
from tests.support.report_case import lanczos, llm_like, make_result, write_run


def test_summary_names_the_extremes_the_trace_and_the_report(tmp_path):
    stream = io.StringIO()
    result = make_result(llm_like(), 12, 2)
    print_summary(result, "runs/toy", tmp_path / "report.html", stream)
    lines = stream.getvalue().strip().splitlines()
    assert lines[0] == "toy: 2,000 parameters, 512 tokens, 12 steps, 2 probes"
    assert lines[1].startswith("lambda max   893  (")
    assert lines[2].startswith("lambda min   -1396  (")
    assert "±" in lines[3]
    assert any(line.startswith("per step     product 13.4 s, Lanczos 310 ms, checkpoint 600 ms (one gra") for line in lines)
    assert any("at most 3 GiB a rank, 2 ranks" in line for line in lines)
    assert lines[-2] == f"report       {tmp_path / 'report.html'}"
    assert lines[-1] == "no cautions"


def test_summary_of_one_probe_and_of_little_else():
    stream = io.StringIO()
    print_summary(make_result(llm_like(), 3), "runs/toy", None, stream)
    assert "one probe: no error estimate" in stream.getvalue()
    assert "caution      λ min has not converged" in stream.getvalue()
    print_summary({}, "runs/toy", None, stream)
    assert "None" not in stream.getvalue()


@pytest.fixture
def store_dir(tmp_path):
    """An unfinished run: probe 1 complete with 12 steps, probe 2 after 3."""
    layout, world, rng = Layout({"a.weight": (40, 30), "b": (7,)}), World.alone(), np.random.default_rng(0)
    alpha, beta = (np.array(part) for part in lanczos(llm_like(), 12, 0))
    options = {"layout": layout, "shard": layout.shard(0), "world": world, "driver": "files"}
    with Store.create(tmp_path / "run", **options, probes=2, steps=12, rows=12, attributes={}) as store:
        for probe, steps in ((0, 12), (1, 3)):
            for step in range(steps):
                store.write_row(probe, step, rng.standard_normal(1207).astype(np.float32))
                n = step + 1
                store.commit(probe, [Member(alpha[:n], beta[:n], rows=range(n), ended=n == 12)])
    return tmp_path / "run"


def test_inspect_shows_the_state_of_an_unfinished_run(store_dir):
    text = inspect_text(store_dir)
    for expected in (
        "unfinished: 15 of 24 steps",
        "probe 1      12 of 12 steps; Ritz values from -1396 ",
        "probe 2      3 of 12 steps; Ritz values from ",
        "1,207 in 2 tensors",
        "12 rows of float32",
        "krylov.h5",
        "1 rank file",
    ):
        assert expected in text, expected
    assert "result " not in text


def test_inspect_shows_a_group_whose_member_ended_early(tmp_path):
    layout, world = Layout({"b": (7,)}, 1), World.alone()
    alpha, beta = (np.array(part) for part in lanczos(llm_like(), 5, 0))
    with Store.create(
        tmp_path,
        layout=layout,
        shard=layout.shard(0),
        world=world,
        driver="files",
        probes=3,
        steps=12,
        rows=12,
        width=2,
        attributes={},
    ) as store:
        for probe in (0, 1):
            store.write_row(probe, 3, np.ones(7, np.float32))
        store.commit(0, [Member(alpha, beta, rows=[3]), Member(alpha[:2], beta[:2], rows=[3], ended=True)])
    text = inspect_text(tmp_path)
    for expected in (
        "unfinished: 7 of 36 steps",
        "probe 1      5 of 12 steps; Ritz",
        "probe 2      2 of 12 steps, ended early; Ritz",
        "probe 3      not begun",
        "2 bases, reused by each group: 12 rows of float32",
    ):
        assert expected in text, expected
    stream = io.StringIO()
    assert inspect_run(tmp_path, verify=True, stream=stream) == 0
    assert "verified     2 committed basis rows" in stream.getvalue()


def test_inspect_of_a_finished_run_shows_its_result(store_dir):
    write_run(store_dir, make_result(llm_like(), 12, 2))
    text = inspect_text(store_dir)
    assert "eigenvalues in [-1396, 893]" in text
    assert "hessian, finite_difference (central), float32" in text


def test_inspect_without_a_store_shows_the_result(tmp_path):
    text = inspect_text(write_run(tmp_path / "run", make_result(llm_like(), 12)))
    assert "eigenvalues in [-1396, 893]" in text
    assert "events.jsonl" in text


def test_verify_finds_a_changed_entry(store_dir):
    stream = io.StringIO()
    assert inspect_run(store_dir, verify=True, stream=stream) == 0
    assert "verified     3 committed basis rows" in stream.getvalue()
    (rank_file,) = store_dir.glob("krylov.ranks/*/rank-00000.h5")
    with h5py.File(rank_file, "r+") as file:
        file["basis/0"][1, 1000] += 1.0
    stream = io.StringIO()
    assert inspect_run(store_dir, verify=True, stream=stream) == 2
    assert "problem      basis row 1 of probe 1" in stream.getvalue()
    rank_file.unlink()
    assert inspect_run(store_dir, verify=True, stream=stream) == 2
    assert "is missing" in stream.getvalue()


def test_inspect_refuses_what_is_not_a_run(tmp_path):
    with pytest.raises(ConfigError, match="no such run directory"):
        inspect_text(tmp_path / "none")
    with pytest.raises(StoreError, match="no run"):
        inspect_text(tmp_path)
    (tmp_path / "result.json").write_text(json.dumps([1]))
    with pytest.raises(ConfigError, match="JSON object"):
        inspect_text(tmp_path)
