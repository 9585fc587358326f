"""Problems of one's own: the examples against dense Hessians, on several ranks, resumed; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.func import functional_call

from hpc_hess.commands.check.work import check
from hpc_hess.commands.run.work import run
from hpc_hess.config import Config, load_config, make_config
from hpc_hess.errors import ConfigError, HpcHessError
from hpc_hess.parallel.world import World
from hpc_hess.session.own_problem import Built, build
from tests.support.runs import go, on_ranks
from tests.support.spawn import run_ranks

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "problems"
DOUBLE = ['model.master_dtype="float64"', 'model.compute_dtype="float64"', "operator.check=false", "run.report=false"]


def example(name: str, out: Path, *overrides: str) -> Config:
    changes = [f'problem.build="{EXAMPLES / name}.py:build"', f'run.out="{out}"', *DOUBLE, *overrides]
    return load_config(EXAMPLES / f"{name}.toml", changes)


def result(out: Path) -> dict[str, Any]:
    return json.loads((out / "result.json").read_text())


def dense(built: Built) -> np.ndarray:
    """Return the Hessian by double backward, over all batches, in the order of the layout: by name."""
    model = built.model.double().eval()
    names = sorted(dict(model.named_parameters()))
    shapes = [dict(model.named_parameters())[n].shape for n in names]
    flat = torch.cat([dict(model.named_parameters())[n].detach().reshape(-1) for n in names])

    class At:
        """The model with other parameters."""

        def __init__(self, v: torch.Tensor) -> None:
            parts = v.split([s.numel() for s in shapes])
            self.values = {n: p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return functional_call(model, self.values, args, kwargs)

    def loss(v: torch.Tensor) -> torch.Tensor:
        found = [built.loss(At(v), _double(batch)) for batch in built.batches]  # type: ignore[misc,arg-type]
        return sum(total for total, _ in found) / sum(weight for _, weight in found)  # type: ignore[return-value]

    return torch.autograd.functional.hessian(loss, flat).numpy()


def _double(batch: Any) -> Any:
    if isinstance(batch, tuple):
        return tuple(t.double() if t.is_floating_point() else t for t in batch)
    return batch


SMALL = {"diffusion": ["problem.width=4", "problem.batches=3"]}


@pytest.mark.parametrize("method", ["finite_difference", "exact"])
def test_the_extreme_eigenvalues_are_those_of_double_backward(method: str, tmp_path: Path, world: World) -> None:
    config = example("diffusion", tmp_path, *SMALL["diffusion"], f'operator.method="{method}"', "lanczos.steps=60")
    text = (
        (EXAMPLES / "diffusion.py").read_text().replace("(t.to(world.device) for t in batch)", "(t.double() for t in batch)")
    )
    (tmp_path / "double.py").write_text(text)
    config = config.model_copy(
        update={"problem": config.problem.model_copy(update={"build": f"{tmp_path / 'double.py'}:build"})}
    )
    assert run(config, world) == 0
    values = np.linalg.eigvalsh(dense(build(config, world)[0]))
    found = result(tmp_path)
    assert found["lambda_max"] == pytest.approx(values[-1], rel=1e-7)
    assert found["lambda_min"] == pytest.approx(values[0], rel=1e-4)
    assert found["data"] == {"batches": 3, "weight": 3 * 4 * 64.0, "fingerprint": found["data"]["fingerprint"]}
    assert found["model"]["source"].endswith("double.py:build")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo", "reward_model", "distillation"])
def test_ranks_give_the_numbers_of_one_process(name: str, tmp_path: Path, world: World) -> None:
    # 6 batches: two ranks of four have one more; the step of differences depends on measured noise
    for method, ranks, tolerance in (("finite_difference", 2, 1e-5), ("exact", 4, 1e-9)):
        changes = [f'operator.method="{method}"', "lanczos.steps=3"]
        assert run(example(name, tmp_path / method, *changes), world) == 0
        alone, out = result(tmp_path / method), tmp_path / f"{method}{ranks}"
        assert run_ranks(on_ranks, ranks, example(name, out, *changes), timeout_s=300) == [0] * ranks
        for key in ("lambda_max", "lambda_min", "loss"):
            assert result(out)[key] == pytest.approx(alone[key], rel=tolerance)


def test_a_run_that_was_stopped_goes_on(tmp_path: Path, world: World) -> None:
    whole, stopped = (example("dpo", tmp_path / name, "lanczos.steps=4") for name in ("whole", "stopped"))
    assert go(world, whole)[0] == 0
    assert go(world, stopped, at=30)[0] == 75
    assert go(world, stopped)[0] == 0
    first, second = (result(tmp_path / name)["probes"] for name in ("whole", "stopped"))
    assert first == second
    assert go(world, stopped) == (0, 0), "it is finished"
    with pytest.raises(HpcHessError, match="holds a run with problem.beta = 0.1, not 0.2"):
        run(example("dpo", tmp_path / "stopped", "lanczos.steps=4", "problem.beta=0.2"), world)


@pytest.mark.slow
def test_its_products_are_checked(tmp_path: Path, world: World) -> None:
    assert check(example("dpo", tmp_path, "lanczos.steps=4"), world) == 0
    assert json.loads((tmp_path / "check.json").read_text())["num_params"] == 22688


@pytest.mark.slow
def test_a_model_that_is_sharded_already(tmp_path: Path, world: World) -> None:
    text = (EXAMPLES / "reward_model.py").read_text()
    text = text.replace(
        "    generator = torch", "    from torch.distributed.fsdp import fully_shard\n"
        "    if world.size > 1:\n"
        "        model.double()\n"
        "        for layer in model.model.layers:\n            fully_shard(layer, mesh=world.mesh)\n"
        "        fully_shard(model, mesh=world.mesh)\n"
        "    generator = torch", 1
    )  # fmt: skip
    (tmp_path / "sharded.py").write_text(text)
    changes = [f'problem.build="{tmp_path / "sharded.py"}:build"', "lanczos.steps=3"]
    for method in ("finite_difference", "exact"):
        found = []
        for ranks in (1, 2):
            out = tmp_path / f"{method}{ranks}"
            config = example("reward_model", out, *changes, f'operator.method="{method}"')
            assert run_ranks(on_ranks, ranks, config) == [0] * ranks
            found.append(result(out)["lambda_max"])
        assert found[0] == pytest.approx(found[1], rel=1e-5 if method == "finite_difference" else 1e-9)


GOOD = """
import torch
def build(world, settings):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    def loss(model, batch):
        return (model(batch) ** 2).sum(), float(len(batch))
    return model, [torch.ones(2, 3)], loss
"""
BAD = {
    "no such file": (None, "there is no file"),
    "does not load": ("import nonsense_of_mine", "cannot load .*ModuleNotFoundError.*line 1"),
    "no function": ("x = 1", "has no function build"),
    "fails": (
        GOOD.replace("    torch.manual_seed", "    1 / 0\n    torch.manual_seed"),
        r"fails: ZeroDivisionError.*\(line 4\)",
    ),
    "one value": (
        GOOD.replace("return model, [torch.ones(2, 3)], loss", "return model"),
        "returns a Linear: it should return",
    ),
    "no model": (GOOD.replace("return model,", "return 'model',"), "the model is a str"),
    "no loss": (GOOD.replace("], loss", "], 3"), "returns a int as the loss"),
    "no batches": (GOOD.replace("[torch.ones(2, 3)]", "[]"), "there are no batches"),
    "the loss fails": (GOOD.replace("torch.ones(2, 3)", "torch.ones(2, 4)"), r"loss\(model, batch\) fails: RuntimeError"),
    "a number": (GOOD.replace(".sum(),", ".sum().item(),"), "float"),
    "cut off": (GOOD.replace(".sum(),", ".sum().detach(),"), "cut off from the parameters"),
    "not finite": (GOOD.replace("torch.ones(2, 3)", "torch.full((2, 3), float('nan'))"), "is nan"),
    "on meta": (GOOD.replace("Linear(3, 1)", "Linear(3, 1, device='meta')"), "on the meta device"),
}


@pytest.mark.parametrize("case", BAD)
def test_one_sentence(case: str, tmp_path: Path, world: World) -> None:
    text, message = BAD[case]
    if text is not None:
        (tmp_path / "mine.py").write_text(text)
    config = make_config({"problem": {"build": f"{tmp_path / 'mine.py'}:build"}, "run": {"out": str(tmp_path / "run")}})
    with pytest.raises(HpcHessError, match=message):
        run(config, world)


def other_weights(world: World, config: Config) -> str:
    try:
        run(config, world)
    except HpcHessError as error:
        return str(error)
    return "no error"


def test_ranks_with_other_weights_are_told(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(GOOD.replace("manual_seed(0)", "manual_seed(world.rank)"))
    config = make_config({"problem": {"build": f"{tmp_path / 'mine.py'}:build"}, "run": {"out": str(tmp_path / "run")}})
    for text in run_ranks(other_weights, 2, config):
        assert "gives ranks 0 and 1 other files, settings or weights" in text


def test_what_does_not_go_together() -> None:
    with pytest.raises(ConfigError, match="leave data.sequences out"):
        make_config({"problem": {"build": "a.py:b"}, "data": {"sequences": 3}})
    with pytest.raises(ConfigError, match="has settings and no build"):
        make_config({"problem": {"beta": 3}})
    with pytest.raises(ConfigError, match="should be FILE.py:FUNCTION"):
        build(make_config({"problem": {"build": "nonsense"}}), World.alone())


def test_commands_that_need_rows_of_tokens_say_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from hpc_hess.cli import main

    (tmp_path / "mine.toml").write_text('[problem]\nbuild = "mine.py:build"\n')
    for command in ("plan", "data"):
        assert main([command, str(tmp_path / "mine.toml")]) == 2
        assert f"hpc-hess {command} needs the [model] and [data]" in capfd.readouterr().err
