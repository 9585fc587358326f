"""Where a model comes from: its own code, configurations that cannot be built or run, what a run is bound to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hpc_hess.config import ModelSection, make_config
from hpc_hess.errors import ModelError, StoreError
from hpc_hess.model.sharded.skeleton import build_skeleton
from hpc_hess.model.sources.source import resolve_source
from hpc_hess.parallel.world import World
from tests.support.base_model import HIGHEST_B, LOSS_B, LOWEST_B, config_b, edit_config, save_b, settings_b, tokens_b
from tests.support.spawn import run_ranks
from tests.support.stored_models import double, go, load, loss_of, own_model, rewrite, save_biased, save_wide, scaled

# -- A5: own code ------------------------------------------------------------------------------------------------------

AUTO_MAP = {"AutoConfig": "configuration_llama.LlamaConfig", "AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"}


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize(
    "auto_map", [AUTO_MAP, {k: f"someone/repo--{v}" for k, v in AUTO_MAP.items()}, {"AutoTokenizer": ["x.Y", None]}]
)
def test_a5_transformers_own_class_is_taken_where_it_knows_the_type(
    auto_map: dict[str, Any], trusted: bool, tmp_path: Path
) -> None:
    save_b(tmp_path)
    edit_config(tmp_path, auto_map=auto_map)
    module, _, source = load(tmp_path, trust_remote_code=trusted)
    assert type(module).__module__ == "transformers.models.llama.modeling_llama"
    assert bool(source.findings) == ("AutoConfig" in auto_map)
    assert loss_of(tmp_path, trust_remote_code=trusted) == pytest.approx(LOSS_B, abs=1e-6)


def test_a5_unknown_types_ask_for_trust_and_name_what_is_missing(tmp_path: Path) -> None:
    own_model(tmp_path)
    with pytest.raises(ModelError, match=r"model\.trust_remote_code = true"):
        load(tmp_path)
    assert loss_of(tmp_path, trust_remote_code=True) == pytest.approx(LOSS_B, abs=1e-6)
    (tmp_path / "modeling_mine.py").unlink()
    for trusted in (False, True):
        with pytest.raises(ModelError, match=r"modeling_mine\.py, which auto_map names for AutoModel.*, is missing"):
            load(tmp_path, trust_remote_code=trusted)
    edit_config(tmp_path, auto_map={k: f"someone/repo--{v}" for k, v in AUTO_MAP.items()})
    with pytest.raises(ModelError, match="lies in another repository, someone/repo"):
        load(tmp_path, trust_remote_code=True)
    edit_config(tmp_path, auto_map={"AutoConfig": "configuration_mine.MineConfig", "AutoModel": "x.Y"})
    with pytest.raises(ModelError, match="none for AutoModelForCausalLM"):
        load(tmp_path, trust_remote_code=True)


def test_a5_outdated_code_is_named(tmp_path: Path) -> None:
    own_model(tmp_path, "mine2")
    file = tmp_path / "modeling_mine.py"
    text = file.read_text()
    file.write_text("from transformers.utils import no_such_function_any_more\n" + text)
    with pytest.raises(ModelError, match=r"modeling_mine\.py\) was written for another version of transformers"):
        load(tmp_path, trust_remote_code=True)
    file.write_text(text + "    def __init__(self, config):\n        raise AttributeError('no rope_scaling')\n")
    with pytest.raises(ModelError, match=r"modeling_mine\.py\) failed, .*no rope_scaling"):
        load(tmp_path, trust_remote_code=True)


# -- A6: configurations that cannot be built or run --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"pad_token_id": 96}, "pad_token_id = 96, vocab_size = 96"),
        ({"num_attention_heads": 3, "head_dim": None}, "num_attention_heads = 3"),
        ({"num_hidden_layers": -1}, "num_hidden_layers = -1"),
        ({"vocab_size": -4}, "vocab_size = -4"),
        ({"hidden_act": "foo"}, "hidden_act = 'foo'"),
        ({"hidden_size": "16"}, "hidden_size = '16'"),
        ({"rope_parameters": {"rope_type": "nope", "rope_theta": 1.0}}, "rope_parameters = "),
        ({"num_attention_heads": 0}, "num_attention_heads = 0"),
        ({"dtype": "floaty"}, "dtype = 'floaty'"),
        ({"model_type": None}, "model_type"),
        ({"model_type": "no_such_type"}, "model_type = 'no_such_type'"),
        ({"head_dim": 7}, "head_dim = 7"),
    ],
)
def test_a6_a_configuration_that_cannot_be_built_is_one_sentence(
    changes: dict[str, Any], named: str, tmp_path: Path
) -> None:
    config_b().save_pretrained(tmp_path)
    edit_config(tmp_path, **changes)
    section = ModelSection(source=str(tmp_path))
    with pytest.raises(ModelError) as caught:
        build_skeleton(resolve_source(section), section)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a6_a_configuration_that_cannot_be_run_is_one_sentence(tmp_path: Path, world: World) -> None:
    config_b(num_key_value_heads=3).save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match=r"cannot compute a forward pass.*num_attention_heads = 2, num_key_value_heads = 3"):
        go(tmp_path / "model", tmp_path, world)


# -- A8: what a run is bound to ----------------------------------------------------------------------------------------


def test_a8_a_tensor_changed_in_the_middle_is_another_model(tmp_path: Path, world: World) -> None:
    save_wide(tmp_path / "model")
    go(tmp_path / "model", tmp_path, world, lanczos__steps=2, operator__check=False)
    double(tmp_path / "model")
    with pytest.raises(StoreError, match=r"another model \(model_fingerprint differs\)"):
        go(tmp_path / "model", tmp_path, world, lanczos__steps=2, operator__check=False, lanczos__probes=2)


def test_a8_every_tensor_counts_also_where_they_are_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hpc_hess.model.sources import fingerprint

    monkeypatch.setattr(fingerprint, "_READ", 1 << 18)
    save_wide(tmp_path)
    first = resolve_source(ModelSection(source=str(tmp_path))).fingerprint
    weights = load_file(tmp_path / "model.safetensors")
    seen = set()
    for name in weights:
        save_file(weights | {name: weights[name] * 2}, tmp_path / "model.safetensors", metadata={"format": "pt"})
        seen.add(resolve_source(ModelSection(source=str(tmp_path))).fingerprint)
    assert len(seen | {first}) == len(weights) + 1
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert resolve_source(ModelSection(source=str(tmp_path))).fingerprint == first


def test_a8_own_code_belongs_to_the_model(tmp_path: Path) -> None:
    own_model(tmp_path, "mine3")
    before = resolve_source(ModelSection(source=str(tmp_path), trust_remote_code=True)).fingerprint
    (tmp_path / "unrelated.py").write_text("x = 1\n")
    assert resolve_source(ModelSection(source=str(tmp_path), trust_remote_code=True)).fingerprint == before
    (tmp_path / "part.py").write_text("SCALE = 2\n")
    assert resolve_source(ModelSection(source=str(tmp_path), trust_remote_code=True)).fingerprint != before


def test_a8_runs_of_the_earlier_fingerprint_go_on(tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run directory holds what the earlier version wrote: the sha256 over the ends of the files, without a kind."""
    from hpc_hess.studies import opening as program

    save_wide(tmp_path / "model")
    section = ModelSection(source=str(tmp_path / "model"))
    earlier = resolve_source(section).fingerprint._earlier()
    assert len(earlier) == 64
    identity = program._identity
    monkeypatch.setattr(program, "_identity", lambda *a: identity(*a) | {"model_fingerprint": earlier})
    go(tmp_path / "model", tmp_path, world, lanczos__steps=2, operator__check=False)
    monkeypatch.setattr(program, "_identity", identity)
    result = go(tmp_path / "model", tmp_path, world, lanczos__steps=2, operator__check=False, lanczos__probes=2)
    assert len(result["probes"]) == 2
    double(tmp_path / "model", "lm_head.weight")  # at an end of the file: the earlier kind sees it too
    with pytest.raises(StoreError, match="another model"):
        go(tmp_path / "model", tmp_path, world, lanczos__steps=2, operator__check=False, lanczos__probes=3)


def test_a8_a_query_with_another_model_is_refused(tmp_path: Path, world: World) -> None:
    from hpc_hess.commands.attribute.work import Query, build, query

    save_wide(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    double(tmp_path / "two")
    tokens = tokens_b(tmp_path / "tokens.npy")

    def settings(name: str) -> Any:
        values = settings_b(tmp_path / name, tokens, tmp_path / "run")
        return make_config(values | {"sketch": {"dimension": 256}})

    assert build(settings("one"), world) == 0
    assert query(settings("one"), world, Query(data=f"tokens:{tokens}")) == 0
    best = json.loads((tmp_path / "run" / "attribution.json").read_text())["top"][0]
    assert best["cosine"] == pytest.approx(1.0, abs=1e-5)
    with pytest.raises(StoreError, match="model_fingerprint"):
        query(settings("two"), world, Query(data=f"tokens:{tokens}"))


def test_b_itself_still_gives_its_numbers(tmp_path: Path, world: World) -> None:
    save_b(tmp_path / "model")
    result = go(tmp_path / "model", tmp_path, world)
    assert result["loss"] == pytest.approx(LOSS_B, abs=2e-6)
    assert result["lambda_min"] == pytest.approx(LOWEST_B, rel=1e-3)
    assert result["lambda_max"] == pytest.approx(HIGHEST_B, rel=1e-3)
    assert [f["verdict"] for f in result["intake"] if f["check"].startswith("weights")] == ["passed", "passed"]


# -- on two ranks ------------------------------------------------------------------------------------------------------


def loaded_on_ranks(world: World, values: dict[str, Any]) -> tuple[str, list[str]]:
    """Load the problem; return what was refused, and the checks that found something."""
    from hpc_hess.console.progress import make_progress
    from hpc_hess.session.problem import load_problem

    world.make_mesh(1)
    try:
        with make_progress(world.rank == 0, 1) as progress:
            problem = load_problem(make_config(values), world, progress)
            loss, _ = problem.gradient()
    except ModelError as error:
        return str(error), []
    return f"{loss:.5f}", [f.check for f in problem.intake.findings]


def test_two_ranks_refuse_and_accept_as_one_does(tmp_path: Path) -> None:
    tokens = tokens_b(tmp_path / "tokens.npy")
    for name in ("fp8", "biased", "good"):
        save_b(tmp_path / name) if name != "biased" else save_biased(tmp_path / name)
    rewrite(tmp_path / "fp8", lambda old: scaled(old, torch.float8_e4m3fn, "_scale"))
    edit_config(tmp_path / "biased", attention_bias=False, mlp_bias=False)
    config_b(num_key_value_heads=3).save_pretrained(tmp_path / "unrunnable")
    expected = {
        "fp8": "stored as float8_e4m3fn",
        "biased": "does not take",
        "unrunnable": "cannot compute a forward pass",
        "good": f"{LOSS_B:.5f}",
    }
    for name, text in expected.items():
        answers = run_ranks(loaded_on_ranks, 2, settings_b(tmp_path / name, tokens, tmp_path / "run"))
        assert all(text in answer for answer, _ in answers), (name, answers)
    assert answers[0] == answers[1]
    assert "weights.unused" in answers[0][1]
