"""The run in this process: results against the dense oracle, resume, and every kind of bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpc_hess.commands.run.work import run
from hpc_hess.config import make_config
from hpc_hess.errors import ConfigError, DataError, HpcHessError, LayoutError, ModelError, NumericsError, StoreError
from hpc_hess.parallel.world import World
from hpc_hess.storage.reader import read_store
from tests.support.dense import dense_hessian
from tests.support.toys import toy_directory, toy_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama on disk and a file of token ids."""
    folder = tmp_path_factory.mktemp("toy")
    toy_directory("llama", folder / "model")
    tokens = np.random.default_rng(0).integers(3, 96, size=300)
    np.save(folder / "tokens.npy", tokens)
    return folder


def settings(toy: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """A small run; ``changes`` are section__key=value."""
    values: dict[str, Any] = {
        "model": {"source": str(toy / "model")},
        "data": {"source": f"tokens:{toy / 'tokens.npy'}", "sequence_length": 12, "sequences": 4},
        "lanczos": {"steps": 6, "probes": 2},
        "run": {"out": str(out), "report": False},
    }
    for name, value in changes.items():
        section, key = name.split("__")
        values.setdefault(section, {})[key] = value
    return values


def test_eigenvalues_match_the_dense_hessian(world: World, toy: Path, tmp_path: Path) -> None:
    """Extreme eigenvalues to 1e-6 of |lambda|max with float64 masters, through the whole program."""
    from transformers import AutoModelForCausalLM

    from hpc_hess.model.data.data import load_samples, micro_batches
    from hpc_hess.model.sharded.loss import CausalLMObjective
    from hpc_hess.model.sources.source import resolve_source

    only = ["model.layers.0.*layernorm.weight", "model.norm.weight", "model.layers.1.self_attn.k_proj.weight"]
    config = make_config(
        settings(
            toy,
            tmp_path / "run",
            model__master_dtype="float64",
            model__compute_dtype="float64",
            lanczos__steps=60,
            lanczos__probes=1,
            parameters__include=only,
        )
    )
    assert run(config, world) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())

    module = AutoModelForCausalLM.from_pretrained(toy / "model", dtype=torch.float64, attn_implementation="eager")
    names = {n for n, _ in module.named_parameters() if any(__import__("fnmatch").fnmatchcase(n, p) for p in only)}
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in names)
    samples = load_samples(config.data, config.model, resolve_source(config.model))
    objective = CausalLMObjective(micro_batches(samples, 0, 1, 1), samples.num_tokens, torch.device("cpu"))

    class Selected(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = [module]

        def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
            return [(n, p) for n, p in module.named_parameters() if n in names]

        def parameters(self, recurse: bool = True) -> Any:
            return iter(p for _, p in self.named_parameters())

        def forward(self, **kwargs: Any) -> Any:
            return module(**kwargs)

    dense = torch.linalg.eigvalsh(dense_hessian(Selected(), objective)).numpy()
    assert result["num_params"] == len(dense)
    scale = np.abs(dense).max()
    assert abs(result["lambda_max"] - dense[-1]) < 1e-6 * scale
    assert abs(result["lambda_min"] - dense[0]) < 1e-6 * scale


def test_stable_keys_and_files(world: World, toy: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run(make_config(settings(toy, out, run__report=True)), world) == 0
    result = json.loads((out / "result.json").read_text())
    assert {
        "format",
        "num_params",
        "world_size",
        "model",
        "data",
        "operator",
        "steps",
        "probes",
        "lambda_max",
        "lambda_min",
        "trace",
        "errors",
        "timing",
        "memory",
    } <= result.keys()
    assert {"seed", "alpha", "beta", "ritz_values", "ritz_weights", "ritz_residuals"} <= result["probes"][0].keys()
    assert {"gradient_s", "hvp_s", "lanczos_s", "checkpoint_s"} <= result["timing"].keys()
    assert len(result["probes"]) == 2
    assert result["trace"]["stderr"] > 0
    assert all((out / name).exists() for name in ("config.toml", "krylov.h5", "events.jsonl", "report.html"))
    assert any((out / "figures").glob("*.png"))
    assert any((out / "figures").glob("*.svg"))


@pytest.mark.parametrize("reorthogonalise", ["full", 3, "none"])
def test_stopped_and_resumed_is_bitwise_the_same(world: World, toy: Path, tmp_path: Path, reorthogonalise: Any) -> None:
    """USR1 in the middle commits and exits with 75; the resumed run has the alpha and beta of an unbroken one."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    options = {"lanczos__reorthogonalise": reorthogonalise}
    assert run(make_config(settings(toy, whole, **options)), world) == 0
    config = make_config(settings(toy, broken, **options))
    codes = []
    for stop_after in (3, 4):
        with _signal_at_event(broken, stop_after):
            codes.append(run(config, world))
    codes.append(run(config, world))
    assert codes == [75, 75, 0]
    a, b = (json.loads((p / "result.json").read_text())["probes"] for p in (whole, broken))
    assert [p["alpha"] for p in a] == [p["alpha"] for p in b]
    assert [p["beta"] for p in a] == [p["beta"] for p in b]


PLACES = {
    "on disk": ["lanczos__basis_memory=disk"],
    "a ring on disk": ["lanczos__basis_memory=disk", "lanczos__reorthogonalise=3"],
    "bfloat16": ["lanczos__basis_dtype=bfloat16"],
    "bfloat16 on disk": ["lanczos__basis_dtype=bfloat16", "lanczos__basis_memory=disk"],
    "in lock-step on disk": ["lanczos__basis_memory=disk", "operator__method=exact", "lanczos__lock_step=2"],
}


@pytest.mark.parametrize("name", PLACES)
def test_where_the_basis_lies_does_not_change_a_bit(world: World, toy: Path, tmp_path: Path, name: str) -> None:
    """Two probes, stopped after four steps and resumed where the basis is, against a run with it in memory."""
    changes: dict[str, Any] = {"store__keep_basis": True}
    for text in PLACES[name]:
        key, value = text.split("=")
        changes[key] = int(value) if value.isdigit() else value
    config = make_config(settings(toy, tmp_path / "run", **changes))
    with _signal_at_event(tmp_path / "run", 4):
        assert run(config, world) == 75
    assert run(config, world) == 0
    changes["lanczos__basis_memory"] = "device"
    assert run(make_config(settings(toy, tmp_path / "memory", **changes)), world) == 0
    a, b = (json.loads((tmp_path / p / "result.json").read_text()) for p in ("run", "memory"))
    assert a["probes"] == b["probes"]
    assert a["errors"].get("ritz") == b["errors"].get("ritz")
    with read_store(tmp_path / "run") as view:
        assert view.verify() == []
        assert view.schema.dtype == ("bfloat16" if "bfloat16" in name else "float32")
        rows = [view.row(1, row) for row in view.probes[1].rows]
    assert all(row.dtype == np.float32 and abs(float(np.linalg.norm(row)) - 1) < 1e-3 for row in rows)
    changes["lanczos__basis_dtype"] = "master" if "bfloat16" in name else "bfloat16"
    with pytest.raises(StoreError, match=r"lanczos\.basis_dtype = '\w+', not"):
        run(make_config(settings(toy, tmp_path / "run", **changes)), world)


class _signal_at_event:  # noqa: N801
    """Sends this process USR1 once events.jsonl has a given number of steps more than at entry."""

    def __init__(self, run_dir: Path, steps: int) -> None:
        self.path, self.steps = run_dir / "events.jsonl", steps

    def __enter__(self) -> None:
        import threading

        self._stop = threading.Event()
        start = self._count()

        def watch() -> None:
            while not self._stop.wait(0.002):
                if self._count() - start >= self.steps:
                    os.kill(os.getpid(), signal.SIGUSR1)
                    return

        self._thread = threading.Thread(target=watch)
        self._thread.start()

    def _count(self) -> int:
        return self.path.read_text().count('"event": "step"') if self.path.exists() else 0

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()


def test_more_probes_go_on_from_a_finished_run(world: World, toy: Path, tmp_path: Path) -> None:
    out, fresh = tmp_path / "run", tmp_path / "fresh"
    assert run(make_config(settings(toy, out, lanczos__probes=1)), world) == 0
    assert run(make_config(settings(toy, out, lanczos__probes=2)), world) == 0
    assert run(make_config(settings(toy, fresh, lanczos__probes=2)), world) == 0
    grown, straight = (json.loads((p / "result.json").read_text()) for p in (out, fresh))
    assert [p["alpha"] for p in grown["probes"]] == [p["alpha"] for p in straight["probes"]]


BAD: list[tuple[dict[str, Any], type[HpcHessError], str]] = [
    ({"model__source": "/nowhere/model"}, ModelError, "/nowhere/model"),
    ({"model__source": "meta-llama/Llama-3-8B"}, ModelError, "download"),
    ({"data__source": "text:/nowhere.txt"}, DataError, "/nowhere.txt"),
    ({"data__source": "nonsense"}, DataError, "text:"),
    ({"data__sequence_length": 4096}, DataError, "longer"),
    ({"parameters__include": ["nothing.*"]}, LayoutError, "matches no parameter"),
    ({"parameters__exclude": ["*"]}, LayoutError, "leaves no parameter"),
    ({"parallel__replicate": 3}, ConfigError, "does not divide"),
    ({"run__resume": "must"}, StoreError, "no run to go on with"),
    ({"store__driver": "mpio"}, StoreError, "mpirun"),
    ({"operator__step": 1e-30}, NumericsError, "operator.step"),
]


@pytest.mark.parametrize(("changes", "kind", "words"), BAD, ids=lambda x: next(iter(x)) if isinstance(x, dict) else None)
def test_bad_input(
    world: World, toy: Path, tmp_path: Path, changes: dict[str, Any], kind: type[HpcHessError], words: str
) -> None:
    with pytest.raises(kind, match=words) as caught:
        run(make_config(settings(toy, tmp_path / "run", **changes)), world)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "result.json").exists()


def test_vocabulary_mismatch_names_both_numbers(world: World, toy: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "big.npy", np.full(100, 5000))
    with pytest.raises(DataError, match=r"5000.*96|96.*5000"):
        run(make_config(settings(toy, tmp_path / "run", data__source=f"tokens:{tmp_path / 'big.npy'}")), world)


def test_empty_data(world: World, toy: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "empty.npy", np.zeros(0, np.int64))
    with pytest.raises(DataError, match="empty|no tokens|no rows"):
        run(make_config(settings(toy, tmp_path / "run", data__source=f"tokens:{tmp_path / 'empty.npy'}")), world)


def test_nan_weights_name_the_first_sample(world: World, tmp_path: Path) -> None:
    model = toy_model("llama_untied")
    with torch.no_grad():
        model.get_submodule("model.embed_tokens").weight[7] = float("nan")
    model.save_pretrained(tmp_path / "model")
    tokens = np.full(48, 5)
    tokens[30] = 7  # sample 2 of length 12 alone reads that row
    np.save(tmp_path / "tokens.npy", tokens)
    with pytest.raises(NumericsError, match="loss of sample 2 is not finite"):
        run(make_config(settings(tmp_path, tmp_path / "run")), world)


def test_basis_that_does_not_fit_says_what_would(world: World, toy: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Krylov basis needs .* [GM]B .*(lanczos\.steps|reorthogonalise|ranks)"):
        run(make_config(settings(toy, tmp_path / "run", lanczos__steps=50_000_000)), world)


def test_another_config_is_refused_and_nothing_is_overwritten(world: World, toy: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run(make_config(settings(toy, out, lanczos__probes=1)), world) == 0
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != "run.lock"}
    with pytest.raises(StoreError, match=r"lanczos\.seed = 0, not 5"):
        run(make_config(settings(toy, out, lanczos__probes=1, lanczos__seed=5)), world)
    tokens = np.load(toy / "tokens.npy")
    np.save(tmp_path / "other.npy", tokens[::-1])
    with pytest.raises(StoreError, match=r"data"):
        run(make_config(settings(toy, out, lanczos__probes=1, data__source=f"tokens:{tmp_path / 'other.npy'}")), world)
    assert before == {p: p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != "run.lock"}


def test_another_model_in_the_same_place_is_refused(world: World, tmp_path: Path) -> None:
    toy_directory("llama", tmp_path / "model")
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(3, 96, size=300))
    config = make_config(settings(tmp_path, tmp_path / "run", lanczos__probes=1, lanczos__steps=2))
    assert run(config, world) == 0
    before = (tmp_path / "run" / "krylov.h5").read_bytes()
    weights = tmp_path / "model" / "model-00002-of-00002.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(StoreError, match=r"another model \(model_fingerprint differs\)"):
        run(config, world)
    assert (tmp_path / "run" / "krylov.h5").read_bytes() == before


def test_exit_codes_without_traceback(toy: Path, tmp_path: Path) -> None:
    """The real command: one sentence on stderr, exit code 2."""
    path = tmp_path / "config.toml"
    path.write_text('[lanczos]\nstep = 3\n[model]\nsource = "x"\n')
    done = subprocess.run([sys.executable, "-m", "hpc_hess", "run", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip() == "hpc-hess: error: unknown configuration key 'lanczos.step': did you mean 'lanczos.steps'?"


def test_a_job_without_scontrol_is_told_that_its_end_is_not_known(
    world: World, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run(make_config(settings(toy, tmp_path / "run", lanczos__probes=1, lanczos__steps=2)), world) == 0
    (said,) = [line for line in capsys.readouterr().out.splitlines() if "Slurm" in line]
    assert "when Slurm ends job 17 (scontrol is not found, SLURM_JOB_END_TIME is not set)" in said
    assert "set run.time_limit" in said
    limited = settings(toy, tmp_path / "limited", lanczos__probes=1, lanczos__steps=2, run__time_limit="01:00:00")
    assert run(make_config(limited), world) == 0
    assert "Slurm" not in capsys.readouterr().out
