"""Studies of a run against the dense matrix: right, restartable to the last bit, the same on any number of ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance

from hpc_hess import api
from hpc_hess.commands.run.work import run
from hpc_hess.config import Config, make_config
from hpc_hess.errors import ConfigError, StoreError
from hpc_hess.model.data.data import load_samples
from hpc_hess.model.sources.source import resolve_source
from hpc_hess.parallel.world import World
from hpc_hess.storage.reader import read_store
from hpc_hess.studies.run_page import write_report
from tests.support.dense import matrix_of
from tests.support.runs import go, on_ranks
from tests.support.spawn import run_ranks
from tests.support.toys import ONLY

pytestmark = pytest.mark.slow

Float = np.ndarray
INCLUDE = [*ONLY, "model.layers.1.self_attn.q_proj.weight"]
HEAD_DIM = 8  # of the toy


STUDIES: dict[str, Any] = {
    "eigenpairs": 2,
    "tolerance": 1e-9,
    "trace": "hutch++",
    "diagonal": "hutchinson",
    "samples": 21,
    "deflated_steps": 8,
    "inverse": "minres",
    "inverse_tolerance": 1e-8,
    "inverse_products": 60,
    "columns": 2,
    "block_diagonal": ["layer", "tensor", "head", "row"],
    "block_samples": 4,
    "block_spectrum": "layer",
    "block_steps": 6,
    "sub_block": ["model.layers.1.self_attn.q_proj.weight[3, :]", "model.norm.weight[:4]"],
}


def settings(toy: Path, out: Path, *overrides: str, **analysis: Any) -> Config:
    values: dict[str, Any] = {
        "model": {"source": str(toy / "model"), "master_dtype": "float64", "compute_dtype": "float64"},
        "parameters": {"include": INCLUDE},
        "operator": {"method": "exact"},
        "data": {"source": f"tokens:{toy / 'tokens.npy'}", "sequence_length": 12, "sequences": 4, "micro_batch": 4},
        "lanczos": {"steps": 12},
        "analysis": analysis or STUDIES,
        "run": {"out": str(out), "grace_s": 0.0, "report": False},
    }
    return make_config(values, list(overrides))


def found(out: Path, study: str) -> dict[str, Any]:
    text = (out / "result.json").read_text()
    return dict(json.loads(text, parse_constant=pytest.fail)["studies"][study])  # NaN is no JSON


@pytest.fixture(scope="module")
def whole(world: World, toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    assert run(settings(toy, out), world) == 0
    return out


@pytest.fixture(scope="module")
def operator(toy: Path) -> api.Operator:
    from transformers import AutoModelForCausalLM

    config = settings(toy, toy)
    module = AutoModelForCausalLM.from_pretrained(toy / "model", dtype=torch.float64, attn_implementation="eager")
    samples = load_samples(config.data, config.model, resolve_source(config.model))
    return api.hessian(module, [{"input_ids": samples.input_ids}], method="exact", include=INCLUDE)


@pytest.fixture(scope="module")
def dense(operator: api.Operator) -> Float:
    return matrix_of(operator)


def row(run_dir: Path, store: str, number: int) -> Float:
    with read_store(run_dir / store) as view:
        assert view.verify() == []
        return view.row(0, number)


def test_trace_and_diagonal(dense: Float, whole: Path) -> None:
    estimate = found(whole, "trace")
    assert abs(estimate["trace"] - np.trace(dense)) < 4 * estimate["trace_stderr"]
    diagonal = found(whole, "diagonal")
    mean, stderr = (row(whole, diagonal["store"], k) for k in (0, 1))
    assert diagonal["norm"] == pytest.approx(np.linalg.norm(mean))
    deviations = np.abs(mean - np.diag(dense)) / stderr
    assert np.mean(deviations < 2) > 0.85
    assert sum(group["sum"] for group in diagonal["groups"].values()) == pytest.approx(mean.sum())
    assert sum(group["entries"] for group in diagonal["groups"].values()) == len(dense)


def test_inverse_on_the_gradient(dense: Float, whole: Path) -> None:
    study = found(whole, "inverse")
    assert study["converged"]
    assert study["damping"] > -np.linalg.eigvalsh(dense)[0]  # as suggested: positive definite
    x = row(whole, study["store"], 0)
    right = (dense + study["damping"] * np.eye(len(dense))) @ x
    assert np.linalg.norm(right) == pytest.approx(study["gradient_norm"], rel=1e-7)
    assert study["self_influence"] == pytest.approx(x @ right, rel=1e-6)


def test_what_is_left_without_the_outliers(dense: Float, whole: Path) -> None:
    study, values = found(whole, "deflated"), np.linalg.eigvalsh(dense)
    taken = np.array(study["outliers"])
    assert np.allclose(taken, np.r_[values[:2], values[-2:]], atol=1e-8 * np.abs(values).max())
    rest = values[2:-2]
    t = np.diag(study["alpha"]) + np.diag(study["beta"][:-1], 1) + np.diag(study["beta"][:-1], -1)
    ritz_values = np.linalg.eigvalsh(t)
    assert rest[0] - 1e-9 <= ritz_values[0]
    assert ritz_values[-1] <= rest[-1] + 1e-9
    assert ritz_values[-1] == pytest.approx(rest[-1], rel=0.05)


def blocks_of(operator: api.Operator, kind: str) -> Float:
    """Number the entries' blocks without the program's own arithmetic: from names and shapes."""
    ids: list[tuple[str, ...]] = []
    for parameter in operator.layout.parameters:
        layer = next((part for part in parameter.name.split(".") if part.isdigit()), parameter.name)
        for index in np.ndindex(parameter.shape):
            key: tuple[str, ...] = (parameter.name,)
            if kind == "layer":
                key = (layer,)
            elif kind == "row" and len(index) > 1:
                key = (parameter.name, str(index[0]))
            elif kind == "head" and "_proj" in parameter.name:
                key = (parameter.name, str(index[0] // HEAD_DIM))
            ids.append(key)
    return np.unique(np.array(["|".join(key) for key in ids]), return_inverse=True)[1]


def test_block_diagonal_products(operator: api.Operator, dense: Float, toy: Path, whole: Path) -> None:
    """Exact where there are few blocks; where they are sampled, within the stated error."""
    study = found(whole, "block_diagonal")
    vectors = np.linalg.eigh(dense)[1]
    assert json.loads((toy / "model" / "config.json").read_text())["head_dim"] == HEAD_DIM
    for kind, sampled in (("layer", False), ("tensor", True), ("head", True), ("row", True)):
        ids = blocks_of(operator, kind)
        assert study["counts"][kind] == ids.max() + 1
        block = np.where(ids[:, None] == ids[None, :], dense, 0.0)
        for direction, v in (("eigenvector λmin", vectors[:, 0]), ("eigenvector λmax", vectors[:, -1])):
            part = next(p for p in study["products"] if (p["blocks"], p["direction"]) == (kind, direction))
            a, b = dense @ v, block @ v
            error = np.linalg.norm(b - a) / np.linalg.norm(a)
            cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
            if sampled:
                assert abs(part["relative_error"] - error) < 4 * part["relative_error_stderr"] + 0.05
                assert part["num_products"] == 4
            else:
                assert part["relative_error"] == pytest.approx(error, abs=1e-6)
                assert part["cosine"] == pytest.approx(cosine, abs=1e-6)


def test_two_samples_tell_no_standard_error(world: World, toy: Path, tmp_path: Path) -> None:
    config = settings(toy, tmp_path, "lanczos.steps=2", "run.report=true", block_diagonal=["row"], block_samples=2)
    assert run(config, world) == 0
    for part in found(tmp_path, "block_diagonal")["products"]:
        assert part["relative_error_stderr"] is part["cosine_stderr"] is None
    assert "± not known" in (tmp_path / "report.html").read_text()


def test_block_spectra(operator: api.Operator, dense: Float, whole: Path) -> None:
    spectrum, ids = found(whole, "block_diagonal")["spectrum"], blocks_of(operator, "layer")
    sizes = [part["size"] for part in spectrum["parts"]]
    assert sorted(sizes) == sorted(np.bincount(ids))
    blocks = {int(n): np.linalg.eigvalsh(dense[np.ix_(ids == k, ids == k)]) for k, n in enumerate(np.bincount(ids))}
    for part in spectrum["parts"]:
        true = blocks[part["size"]]
        assert max(part["values"]) <= true[-1] + 1e-9
        assert min(part["values"]) >= true[0] - 1e-9
        distances = [np.abs(true - value).min() for value in part["values"]]
        assert np.all(np.array(distances) <= np.array(part["residuals"]) + 1e-9)
    # as a quadrature: close to the block-diagonal matrix's own spectrum
    union = np.concatenate(list(blocks.values()))
    values = np.concatenate([part["values"] for part in spectrum["parts"]])
    weights = np.concatenate([np.array(part["weights"]) * part["size"] for part in spectrum["parts"]])
    assert wasserstein_distance(union, values, None, weights) < 0.1 * np.ptp(union)


def test_the_matrix_of_chosen_entries(operator: api.Operator, dense: Float, whole: Path) -> None:
    study = found(whole, "sub_block")
    offsets = {p.name: p.file_offset for p in operator.layout.parameters}
    entries = [
        *(offsets["model.layers.1.self_attn.q_proj.weight"] + 3 * 16 + np.arange(16)),
        *(offsets["model.norm.weight"] + np.arange(4)),
    ]
    matrix = np.load(whole / study["file"])
    np.testing.assert_allclose(matrix, dense[np.ix_(entries, entries)], atol=1e-12)
    np.testing.assert_allclose(api.sub_block(operator, STUDIES["sub_block"]), matrix, atol=1e-12)
    assert study["lambda_max"] == pytest.approx(np.linalg.eigvalsh(matrix)[-1])
    assert study["asymmetry"] < 1e-12


def test_the_report_shows_them(whole: Path) -> None:
    page = write_report(whole).read_text()
    for text in (
        "Outliers taken out",
        "Hutch++",
        "The diagonal, layer by layer",
        "The inverse on the gradient",
        "Block-diagonal approximations",
        "Blocks on their own",
        "The exact matrix of chosen",
    ):
        assert text in page
    for name in ("deflated", "diagonal", "inverse", "block_diagonal", "layers", "sub_block"):
        assert (whole / "figures" / f"{name}.png").stat().st_size > 5_000


def test_stopped_anywhere_and_resumed_is_bitwise_the_same(world: World, toy: Path, tmp_path: Path, whole: Path) -> None:
    out, code, runs = tmp_path / "run", 75, 0
    assert run(settings(toy, out, eigenpairs=2, tolerance=1e-9), world) == 0
    while code == 75:
        code, _ = go(world, settings(toy, out), (17, 33, 48)[runs % 3])
        runs += 1
        assert runs < 60
    assert code == 0
    assert runs > 4
    mine, theirs = (json.loads((path / "result.json").read_text())["studies"] for path in (out, whole))
    assert mine == theirs
    for store, rows in (("studies/diagonal/diagonal", 2), ("studies/inverse/x", 1)):
        for number in range(rows):
            assert row(out, store, number).tobytes() == row(whole, store, number).tobytes()
    assert not list((out / "studies").glob("*/pieces"))  # what they were made from is gone


def test_on_two_and_three_ranks(toy: Path, tmp_path: Path, whole: Path) -> None:
    pairs = {key: STUDIES[key] for key in ("eigenpairs", "tolerance")}
    blocks = {key: value for key, value in STUDIES.items() if key.startswith(("block", "sub"))}
    others = {key: value for key, value in STUDIES.items() if key not in {**pairs, **blocks}}
    for ranks, analysis in ((2, blocks), (3, others)):
        out = tmp_path / f"on_{ranks}"
        assert run_ranks(on_ranks, ranks, settings(toy, out, **pairs, **analysis), timeout_s=400) == [0] * ranks
        for study in ("trace", "diagonal", "inverse") if ranks == 3 else ("block_diagonal", "sub_block"):
            close(found(out, study), found(whole, study))
    assert np.allclose(row(out, "studies/inverse/x", 0), row(whole, "studies/inverse/x", 0), rtol=1e-6, atol=1e-9)


def close(mine: Any, theirs: Any) -> None:
    """Compare findings: numbers to rounding, and all else exactly. Eigenvectors may have the other sign."""
    if isinstance(theirs, dict):
        assert mine.keys() == theirs.keys()
        for key in theirs:
            close(mine[key], theirs[key])
    elif isinstance(theirs, list):
        assert len(mine) == len(theirs)
        for a, b in zip(mine, theirs, strict=True):
            close(a, b)
    elif isinstance(theirs, float):
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-7)
    else:
        assert mine == theirs


def test_the_classes_of_a_language_model(world: World, toy: Path, tmp_path: Path) -> None:
    """The span of the class means by autograd on the model itself, from the definition."""
    from transformers import AutoModelForCausalLM

    out = tmp_path / "classes"
    config = settings(
        toy,
        out,
        "operator.kind=gauss_newton",
        "lanczos.steps=40",
        f"parameters.include={json.dumps(ONLY)}",
        class_groups=2,
        class_steps=120,
    )
    assert run(config, world) == 0
    study = found(out, "class_structure")
    module = AutoModelForCausalLM.from_pretrained(toy / "model", dtype=torch.float64, attn_implementation="eager")
    ids = load_samples(config.data, config.model, resolve_source(config.model)).input_ids
    g = api.hessian(module, [{"input_ids": ids}], method="exact", kind="gauss_newton", include=ONLY)
    matrix = matrix_of(g)
    logits = module(input_ids=ids).logits[:, :-1].flatten(0, 1)
    targets = ids[:, 1:].flatten()
    counts = torch.bincount(targets, minlength=96)
    first, second = counts.argsort(descending=True, stable=True)[:2].tolist()
    assert study["tokens"] == [first, second]
    group = torch.full((96,), 2)
    group[first], group[second] = 0, 1
    p = logits.softmax(-1).detach()
    named = dict(module.named_parameters())
    sums = []
    for c in range(3):
        inside = (group == c).double()
        u = (p @ inside)[:, None] * p - p * inside  # sum over v in c of p_v (p - e_v)
        total = (logits * u * (group[targets] == c)[:, None]).sum()
        gradients = torch.autograd.grad(total, [named[x.name] for x in g.layout.parameters], retain_graph=True)
        sums.append(torch.cat([x.flatten() for x in gradients]).numpy())
    q = np.linalg.qr(np.stack(sums).T)[0]
    outside = np.eye(len(matrix)) - q @ q.T
    assert study["rank"] == 3
    assert study["lambda_max"] == pytest.approx(np.linalg.eigvalsh(matrix)[-1], rel=1e-6)
    assert study["lambda_max_without"] == pytest.approx(np.linalg.eigvalsh(outside @ matrix @ outside)[-1], rel=1e-6)
    assert study["shares"] == pytest.approx([float((group[targets] == c).double().mean()) for c in range(3)])
    write_report(out)
    assert (out / "figures" / "class_structure.png").stat().st_size > 5_000
    with pytest.raises(ConfigError, match=r"groups = 2 takes the Gauss-Newton matrix apart: set operator.kind"):
        settings(toy, out, class_groups=2)


def test_what_does_not_go_together(world: World, toy: Path, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"holds this study with .*samples.* remove that directory"):
        run(settings(toy, whole, "analysis.samples=30"), world)
    with pytest.raises(ConfigError, match=r"set studies\.eigenpairs\.count"):
        run(settings(toy, tmp_path / "a", deflated_steps=3), world)
    with pytest.raises(ConfigError, match=r"no parameter among those included is called 'nothing'"):
        run(settings(toy, tmp_path / "c", sub_block=["nothing[0]"]), world)
    assert not (tmp_path / "c" / "krylov.h5").exists()  # said before anything is computed
    with pytest.raises(ConfigError, match="knows no projection of attention heads"):
        run(settings(toy, tmp_path / "b", 'parameters.include=["model.norm.weight"]', block_diagonal=["head"]), world)


def test_spectra_of_blocks_alone(world: World, toy: Path, tmp_path: Path, whole: Path) -> None:
    """Without products to compare, only the spectra are computed and shown."""
    out = tmp_path / "run"
    assert run(settings(toy, out, eigenpairs=2, tolerance=1e-9, block_spectrum="layer", block_steps=6), world) == 0
    study = found(out, "block_diagonal")
    assert study["products"] == []
    assert study["spectrum"]["parts"] == found(whole, "block_diagonal")["spectrum"]["parts"]
    write_report(out)
    assert (out / "figures" / "layers.png").exists()
    assert not (out / "figures" / "block_diagonal.png").exists()
