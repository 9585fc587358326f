"""Studies, timers, and laws on runs whose cost is known."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch

from hpc_hess.errors import ConfigError
from hpc_hess.parallel.timers import Timers
from hpc_hess.planning.laws import MEMORY_TERMS, TIME_TERMS, fit, fitted_and_predicted, memories, times
from hpc_hess.planning.sweep import Measured, points, read_study

STUDY = """
config = "base.toml"
out = "runs/study"
[set]
"lanczos.steps" = 6
[sweep]
ranks = [1, 2]
"model.source" = ["a/small/config.json", "b.gguf"]
[per_rank]
"data.sequences" = 3
"""


def test_points_of_a_study(tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text(STUDY)
    found = points(read_study(path))
    assert [p.name for p in found] == [
        "000_1-ranks_source-small",
        "001_1-ranks_source-b.gguf",
        "002_2-ranks_source-small",
        "003_2-ranks_source-b.gguf",
    ]
    assert found[2].ranks == 2
    assert found[2].overrides == [
        "lanczos.steps=6",
        'model.source="a/small/config.json"',
        "data.sequences=6",
        'run.out="runs/study/002_2-ranks_source-small"',
    ]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("config = ", "is not TOML"),
        ('config = "a"\nout = "b"', "sweep: field required"),
        ('config = "a"\nout = "b"\nnodes = 3\n[sweep]\nranks = [1]', "nodes: extra inputs are not permitted"),
        ('config = "a"\nout = "b"\n[sweep]\nranks = [0]', "should be numbers of ranks"),
    ],
)
def test_studies_that_cannot_be(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "study.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=complaint):
        read_study(path)
    with pytest.raises(ConfigError, match="cannot read the study"):
        read_study(tmp_path / "nothing.toml")


_TIME = np.array([3e-13, 2e-9, 4e-10, 0.02, 1e-3, 5e-10])
_MEMORY = np.array([24.0, 4.0, 1.5, 4e4, 1e8])


def run(p: int, ranks: int, tokens: int, noise: float = 0.0, seed: int = 0) -> Measured:
    rng = np.random.default_rng(seed)
    m = 4
    shared = np.array([p * tokens, p / ranks, m * p * (ranks - 1) / ranks, m]) @ _TIME[:4]
    steps = [
        (r, shared * (1 + noise * rng.standard_normal()), float(np.array([2 + r, (1 + r) * p / ranks]) @ _TIME[4:]))
        for r in range(1, 9)
    ]
    rows = 8 if tokens < 1000 else 20
    memory = np.array([p / ranks, rows * p / ranks, p, tokens // m, 1]) @ _MEMORY
    return Measured(f"{p}-{ranks}", "hessian", p, ranks, tokens * ranks, m, tokens // m, rows, 1, int(memory), steps)


def test_laws_are_found_again_and_predict_the_largest() -> None:
    runs = [run(p, r, t) for p in (10**7, 3 * 10**7, 10**8, 10**9) for r in (1, 2, 4) for t in (256, 2048)]
    law = fit(TIME_TERMS, times(runs))
    assert law.coefficients == pytest.approx(_TIME, rel=1e-6)
    assert np.all((law.low <= _TIME * 1.0001) & (law.high >= _TIME * 0.9999))
    assert fit(MEMORY_TERMS, memories(runs)).coefficients == pytest.approx(_MEMORY, rel=1e-4)
    small, large = fitted_and_predicted(runs)
    assert {r.num_params for r in large} == {10**9}
    truth = times(large)
    assert truth.design @ fit(TIME_TERMS, times(small)).coefficients == pytest.approx(truth.values, rel=1e-6)


def test_noise_widens_the_intervals_and_nothing_is_negative() -> None:
    runs = [run(p, r, t, 0.1, seed=p + r + t) for p in (10**7, 10**8) for r in (1, 2, 4) for t in (256, 2048)]
    law = fit(TIME_TERMS, times(runs))
    assert np.all(law.coefficients >= 0)
    assert law.high[0] > law.coefficients[0] > law.low[0] > 0
    assert np.median(np.abs(law.predicted / law.measured - 1)) < 0.15
    with pytest.raises(ConfigError, match="nothing smaller to fit"):
        fitted_and_predicted([run(10**7, 2, 256)])


def test_phases_do_not_count_what_is_inside_them() -> None:
    timers = Timers(torch.device("cpu"))
    timers.begin()
    began = time.perf_counter()
    with timers.phase("outer"):
        time.sleep(0.02)
        with timers.phase("inner"):
            time.sleep(0.05)
        with timers.phase("outer"):
            time.sleep(0.01)
    whole_s = time.perf_counter() - began
    seconds = timers.take()
    assert seconds["inner"] >= 0.049
    assert seconds["outer"] >= 0.029
    assert sum(seconds.values()) <= whole_s
    with timers.phase("outer"):  # outside a step
        pass
    assert timers.take() == {}
