"""Fine-tuning over the sharded model, its checkpoints, and spectra compared over them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from hpc_hess import cli
from hpc_hess.commands.arguments import Training, parse_steps
from hpc_hess.commands.dynamics.work import OUTLIER, dynamics, plan, ratios
from hpc_hess.commands.finetune.work import batch_rows, checkpoint, finetune
from hpc_hess.config import Config, make_config
from hpc_hess.console.progress import Progress
from hpc_hess.errors import ConfigError, ModelError, NumericsError, StoreError
from hpc_hess.model.data.data import load_samples
from hpc_hess.model.sharded.precision import honest_casts
from hpc_hess.model.sources.source import resolve_source
from hpc_hess.parallel.world import World
from hpc_hess.session.model_files import save_model
from hpc_hess.session.problem import load_problem
from tests.support.launching import environment, wait_until
from tests.support.spawn import run_ranks
from tests.support.toys import ONLY, toy_directory

pytestmark = pytest.mark.slow


def settings(toy: Path, *overrides: str) -> Config:
    values: dict[str, Any] = {
        "model": {"source": str(toy / "model"), "master_dtype": "float64", "compute_dtype": "float64"},
        "data": {"source": f"tokens:{toy / 'tokens.npy'}", "sequence_length": 12, "sequences": 4, "micro_batch": 2},
        "operator": {"method": "exact"},
        "lanczos": {"steps": 6},
        "run": {"grace_s": 0.0, "report": False},
    }
    return make_config(values, list(overrides))


def short(out: Path, **changes: Any) -> Training:
    return replace(Training(out, steps=6, learning_rate=0.5, batch=3, save_at=(0, 2)), **changes)


def losses(out: Path) -> np.ndarray:
    lines = [json.loads(line) for line in (out / "training.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(len(lines)))  # each step once, in order
    return np.array([line["loss"] for line in lines])


def weights(config: Config, source: Path, world: World) -> dict[str, torch.Tensor]:
    """The parameters that the program reads from a directory, by name; on several ranks this rank's parts."""
    config = config.model_copy(update={"model": config.model.model_copy(update={"source": str(source)})})
    model = load_problem(config, world, Progress(0)).model
    names = [piece.parameter.name for piece in model.shard.pieces]
    return {name: part.clone() for name, part in zip(names, model.local_parameters, strict=True)}


@pytest.fixture(scope="module")
def trained(world: World, toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained")
    assert finetune(settings(toy), world, short(out)) == 0
    return out


# -- training ----------------------------------------------------------------------------------------------------------


def plain_loss(module: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with honest_casts(torch.float64):  # transformers' norms and softmax are in float32
        logits = module(input_ids=ids).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def plain_model(path: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, attn_implementation="eager").eval()


def token_ids(config: Config) -> torch.Tensor:
    return load_samples(config.data, config.model, resolve_source(config.model)).input_ids


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_it_is_what_a_plain_loop_computes(world: World, toy: Path, tmp_path: Path, optimizer: str) -> None:
    rate = {"sgd": 0.5, "adamw": 1e-2}[optimizer]
    assert finetune(settings(toy), world, short(tmp_path, learning_rate=rate, optimizer=optimizer)) == 0
    module, ids = plain_model(toy / "model"), token_ids(settings(toy))
    kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[optimizer]
    steps, seen = kind(module.parameters(), lr=rate), []
    for step in range(6):
        loss = plain_loss(module, ids[batch_rows(4, 3, step, 0)])
        steps.zero_grad()
        loss.backward()
        steps.step()
        seen.append(loss.item())
    assert losses(tmp_path) == pytest.approx(seen, abs=1e-11)
    assert losses(tmp_path)[-2:].mean() < losses(tmp_path)[:2].mean() - 0.01
    wanted = dict(module.named_parameters())
    for name, found in plain_model(checkpoint(tmp_path, 6)).named_parameters():
        assert torch.allclose(found, wanted[name], rtol=0, atol=1e-9), name


def test_every_sample_comes_as_often() -> None:
    rows = [row for step in range(9) for row in batch_rows(6, 4, step, 5)]
    assert [sorted(rows[k : k + 6]) for k in range(0, 36, 6)] == [list(range(6))] * 6
    assert rows[:6] != rows[6:12]
    assert batch_rows(3, 8, 0, 0)[:3] == batch_rows(3, 3, 0, 0)  # a batch may be longer than the data


def test_the_first_checkpoint_is_the_model(world: World, toy: Path, trained: Path) -> None:
    before, after = (weights(settings(toy), path, world) for path in (toy / "model", checkpoint(trained, 0)))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    last = weights(settings(toy), checkpoint(trained, 6), world)
    assert not any(torch.equal(before[name], last[name]) for name in before)


def saved_and_read(world: World, toy: Path, source: Path, out: Path) -> list[str]:
    """Names of parameters that differ after a model was written and read again, on these ranks."""
    config = make_config(
        {
            "model": {"source": str(source), "attention": "eager"},
            "data": {"source": f"tokens:{toy / 'tokens.npy'}", "sequence_length": 12, "sequences": 4},
        }
    )
    world.make_mesh(1)
    model = load_problem(config, world, Progress(0)).model
    model.write_parameters(model.read_parameters().mul_(-1.0))  # zeros become -0.0
    save_model(out, model, resolve_source(config.model), world)
    wanted = {p.parameter.name: x.clone() for p, x in zip(model.shard.pieces, model.local_parameters, strict=True)}
    found = weights(config, out, world)
    bits = torch.int32
    return [name for name in wanted if not torch.equal(wanted[name].view(bits), found[name].view(bits))]


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gpt_oss"])
def test_what_is_written_is_read_back_bitwise(toy: Path, tmp_path: Path, name: str, ranks: int) -> None:
    toy_directory(name, tmp_path / "model")
    assert run_ranks(saved_and_read, ranks, toy, tmp_path / "model", tmp_path / "out") == [[]] * ranks
    before, after = plain_model(tmp_path / "model").state_dict(), plain_model(tmp_path / "out").state_dict()
    assert all(torch.equal(-before[key] if before[key].is_floating_point() else before[key], after[key]) for key in before)
    assert not list(tmp_path.glob("*.part"))


def on_ranks(world: World, config: Config, training: Training) -> int:
    return finetune(config, world, training)


def test_on_two_ranks_and_on_one_again(world: World, toy: Path, tmp_path: Path, trained: Path) -> None:
    assert run_ranks(on_ranks, 2, settings(toy), short(tmp_path / "two")) == [0, 0]
    assert losses(tmp_path / "two") == pytest.approx(losses(trained), abs=1e-11)
    # AdamW on two ranks, which go on as one: the moments follow
    training = short(tmp_path / "adamw", optimizer="adamw", learning_rate=1e-2)
    assert run_ranks(on_ranks, 2, settings(toy), replace(training, steps=3, save_at=())) == [0, 0]
    assert finetune(settings(toy), world, training) == 0
    whole = replace(training, out=tmp_path / "whole")
    assert finetune(settings(toy), world, whole) == 0
    assert losses(training.out) == pytest.approx(losses(whole.out), abs=1e-11)


def start_training(toy: Path, out: Path) -> subprocess.Popen[bytes]:
    """200 steps of AdamW in a process of its own."""
    config = out.with_suffix(".toml")
    config.write_text(settings(toy).to_toml())
    command = [
        sys.executable,
        "-m",
        "hpc_hess",
        "finetune",
        str(config),
        "--steps",
        "200",
        "--batch",
        "3",
        "--out",
        out,
        "--learning-rate",
        "1e-3",
        "--optimizer",
        "adamw",
        "--save-at",
        "40",
    ]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def uninterrupted(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    assert start_training(toy, out).wait() == 0
    return out


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR1])
def test_interrupted_anywhere_it_ends_at_the_same_weights(
    toy: Path, tmp_path: Path, number: int, uninterrupted: Path
) -> None:
    out = tmp_path / "out"
    first = start_training(toy, out)
    wait_until(checkpoint(out, 40).exists, "the first checkpoint")
    os.kill(first.pid, number)
    assert first.wait() == {signal.SIGKILL: -signal.SIGKILL, signal.SIGUSR1: 75}[signal.Signals(number)]
    assert not checkpoint(out, 200).exists()
    assert start_training(toy, out).wait() == 0
    assert losses(out).tolist() == losses(uninterrupted).tolist()
    for step, file in ((40, "model.safetensors"), (200, "model.safetensors"), (200, "optimizer.state")):
        assert (checkpoint(out, step) / file).read_bytes() == (checkpoint(uninterrupted, step) / file).read_bytes()


def test_a_point_asked_for_later_is_filled_in(world: World, toy: Path, tmp_path: Path, trained: Path) -> None:
    assert finetune(settings(toy), world, short(tmp_path, save_at=(2,))) == 0
    before = losses(tmp_path)
    assert finetune(settings(toy), world, short(tmp_path, save_at=(2, 4))) == 0
    assert checkpoint(tmp_path, 4).exists()
    assert losses(tmp_path).tolist() == before.tolist()
    assert finetune(settings(toy), world, short(tmp_path, save_at=(2, 4))) == 0  # nothing is left to do
    files = [checkpoint(path, 6) / "model.safetensors" for path in (tmp_path, trained)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_what_a_training_refuses(world: World, toy: Path, tmp_path: Path, trained: Path) -> None:
    with pytest.raises(ConfigError, match=r"--save-at 9 is not within 0 to 6"):
        short(tmp_path, save_at=(9,))
    with pytest.raises(ConfigError, match="--batch 0 is not valid"):
        short(tmp_path, batch=0)
    with pytest.raises(ConfigError, match="--learning-rate -1 is not valid"):
        short(tmp_path, learning_rate=-1)
    with pytest.raises(ConfigError, match="should be steps such as"):
        parse_steps("1,b")
    with pytest.raises(StoreError, match=r"holds a training with learning_rate = 0\.5, not 0\.25: choose another --out"):
        finetune(settings(toy), world, short(trained, learning_rate=0.25))
    with pytest.raises(StoreError, match="data_fingerprint"):
        finetune(settings(toy, "data.sequences=3"), world, short(trained, save_at=(1,)))
    with pytest.raises(NumericsError, match=r"in step \d+ the loss of sample \d .* --learning-rate 1e\+200 is too large"):
        finetune(settings(toy), world, short(tmp_path / "diverges", learning_rate=1e200))


# -- dynamics ----------------------------------------------------------------------------------------------------------


def dense(path: Path, ids: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Eigenvalues, eigenvectors and gradient of the model's loss in the parameters ONLY, by double backward."""
    from fnmatch import fnmatchcase

    module = plain_model(path)
    chosen = [p for name, p in sorted(module.named_parameters()) if any(fnmatchcase(name, glob) for glob in ONLY)]
    parts = torch.autograd.grad(plain_loss(module, ids), chosen, create_graph=True)
    flat = torch.cat([part.flatten() for part in parts])
    rows = torch.autograd.grad(flat, chosen, torch.eye(len(flat), dtype=flat.dtype), is_grads_batched=True)
    hessian = torch.cat([row.reshape(len(flat), -1) for row in rows], 1).numpy()
    return *np.linalg.eigh((hessian + hessian.T) / 2), flat.detach().numpy()


def study(toy: Path, *overrides: str) -> Config:
    only = f"parameters.include={json.dumps(ONLY)}"
    return settings(toy, only, "analysis.eigenpairs=4", "analysis.tolerance=1e-8", *overrides)


def record(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "dynamics.json").read_text()))


@pytest.fixture(scope="module")
def compared(world: World, toy: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compared")
    models = [str(checkpoint(trained, step)) for step in (0, 6)]
    assert dynamics(study(toy, "run.report=true"), world, models=models, sequences=[], out=out) == 0
    return out


def test_ratios_outliers_and_gradient_mass_are_those_of_the_dense_hessian(toy: Path, trained: Path, compared: Path) -> None:
    ids = token_ids(settings(toy))
    runs = record(compared)["runs"]
    assert [run["step"] for run in runs] == [0, 6]
    for run in runs:
        values, vectors, gradient = dense(checkpoint(trained, run["step"]), ids)
        down = values[::-1]
        assert run["r_neg"] == pytest.approx(-values[0] / values[-1], rel=1e-6)
        assert run["r_n"] == pytest.approx((down[1:4] / down[0]).tolist(), rel=1e-6)
        assert run["loss"] == pytest.approx(plain_loss(plain_model(checkpoint(trained, run["step"])), ids).item(), rel=1e-9)
        counts = {"": int((values > OUTLIER * values[-1]).sum()), "negative_": int((values < -OUTLIER * values[-1]).sum())}
        for sign, true in counts.items():
            assert run[f"{sign}outliers"] == min(true, 4)
            assert run[f"{sign}outliers_known"] == (true < 4)
            ends = np.arange(len(values))[-min(true, 4) :] if not sign else np.arange(min(true, 4))
            mass = ((vectors[:, ends[: min(true, 4)]].T @ gradient) ** 2).sum() / (gradient @ gradient)
            assert run[f"{sign}gradient_share"] == pytest.approx(mass, rel=1e-5, abs=1e-12)
    assert sum(p["gradient_share"] for p in runs[1]["eigenvalues"]) < 1
    assert record(compared)["notes"] == []


def test_the_page_shows_them(compared: Path) -> None:
    page = (compared / "dynamics.html").read_text()
    for run in record(compared)["runs"]:
        assert f'href="{run["name"]}/report.html"' in page
        assert (compared / run["name"] / "report.html").exists()
    assert page.count("data:image/svg+xml;base64,") == 5
    assert "http" not in page.replace("http-equiv", "")
    assert all((compared / "figures" / f"{name}.png").stat().st_size > 5000 for name in ("r_neg", "r_n", "densities"))


def test_finished_runs_are_not_computed_again(world: World, toy: Path, trained: Path, compared: Path) -> None:
    before = {path: path.read_text() for path in compared.glob("*/events.jsonl")}
    old = record(compared)
    models = [str(checkpoint(trained, step)) for step in (0, 2, 6)]
    assert dynamics(study(toy), world, models=models, sequences=[], out=compared) == 0
    assert {path: path.read_text() for path in before} == before
    new = record(compared)["runs"]
    assert [run["step"] for run in new] == [0, 2, 6]
    assert [new[0], new[2]] == old["runs"]


def study_on_ranks(world: World, config: Config, models: list[str], sequences: list[int], out: Path) -> int:
    return dynamics(config, world, models=models, sequences=sequences, out=out)


def test_sample_sizes_on_two_ranks(world: World, toy: Path, tmp_path: Path) -> None:
    config = study(toy, "analysis.eigenpairs=0", "analysis.tolerance=1e-3", "analysis.which=largest")
    models = [str(toy / "model")]
    assert run_ranks(study_on_ranks, 2, config, models, [2, 4], tmp_path / "two") == [0, 0]
    assert study_on_ranks(world, config, models, [2, 4], tmp_path / "one") == 0
    two, one = record(tmp_path / "two"), record(tmp_path / "one")
    assert [run["name"] for run in one["runs"]] == ["model-2-sequences", "model-4-sequences"]
    assert [len(run["r_n"]) for run in one["runs"]] == [7, 7]
    assert one["notes"][0] == "The configuration asks for no eigenpairs: analysis.eigenpairs = 8 was set."
    for a, b in zip(two["runs"], one["runs"], strict=True):
        assert a["step"] is None
        assert a["r_neg"] == pytest.approx(b["r_neg"], rel=1e-4)
        assert a["r_n"][:3] == pytest.approx(b["r_n"][:3], rel=1e-3)


def test_a_study_stops_in_time_and_goes_on(world: World, toy: Path, trained: Path, tmp_path: Path) -> None:
    models = [str(checkpoint(trained, 2))]
    assert dynamics(study(toy, "run.time_limit=00:00:00"), world, models=models, sequences=[], out=tmp_path) == 75
    assert not (tmp_path / "dynamics.json").exists()
    assert dynamics(study(toy), world, models=models, sequences=[], out=tmp_path) == 0


def test_ratios_of_one_sign_only() -> None:
    def of(*values: float) -> dict[str, Any]:
        pairs = [{"value": v, "gradient_share": 0.1} for v in values]
        return ratios({"eigenpairs": {"pairs": pairs}, "lambda_max": max(values), "lambda_min": min(values)})

    above = of(10.0, 3.0, 2.0, 0.1)
    assert (above["r_neg"], above["outliers"], above["outliers_known"]) == (0.0, 2, True)  # 20 % itself is none
    assert above["gradient_share"] == pytest.approx(0.2)
    below = of(-10.0, -3.0)
    assert (below["r_neg"], below["r_n"], below["outliers"], below["negative_outliers"]) == (None, [], None, None)


def test_what_a_study_refuses(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, model = study(toy), str(toy / "model")
    with pytest.raises(ConfigError, match="there is no model to study"):
        plan(config, [], [], tmp_path)
    with pytest.raises(ModelError, match="no such model: .*/nowhere is neither"):
        plan(config, [model, str(toy / "nowhere")], [], tmp_path)
    with pytest.raises(ConfigError, match="each model and each number once"):
        plan(config, [model, model], [], tmp_path)
    with pytest.raises(ConfigError, match="the same directory twice"):
        plan(config, [model, f"{model}/"], [], tmp_path)
    with pytest.raises(ConfigError, match="--sequences 0 is not valid"):
        plan(config, [model], [0], tmp_path)
    (tmp_path / "a" / "last").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    for place in (tmp_path / "a" / "last", tmp_path / "b" / "last"):
        toy_directory("llama", place)
    points = plan(config, [str(tmp_path / "a" / "last"), str(tmp_path / "b" / "last")], [2, 3], tmp_path)
    assert [p.name for p in points] == [f"{m}-last-{n}-sequences" for m in "ab" for n in (2, 3)]
    with pytest.raises(SystemExit) as caught:
        cli.main(["dynamics", "config.toml", "--out", str(tmp_path), "--models"])
    assert caught.value.code == 2
    assert "--models: expected at least one argument" in capsys.readouterr().err
