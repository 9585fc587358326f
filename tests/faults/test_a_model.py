"""A7, A9, A10, A11: models that see their targets, write their weights, hold scalars, or share weights between layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hpc_hess.config import make_config
from hpc_hess.errors import ModelError
from hpc_hess.intake.forward import causal_remedy, check_causal
from hpc_hess.parallel.world import World
from hpc_hess.studies.opening import _identity
from tests.support.base_model import fill_b, ids_b, save_b, tokens_b
from tests.support.own_code import SCALED, save_own
from tests.support.problems import assert_right, dense_product, problem_of, products, settings_of
from tests.support.spawn import run_ranks
from tests.support.toys import toy_directory

pytestmark = pytest.mark.slow


def _answers(settings: dict[str, Any], ranks: int) -> list[dict[str, Any]]:
    return [products(World.alone(), settings)] if ranks == 1 else run_ranks(products, ranks, settings)


def _save(config: Any, path: Path, spread: float = 0.1) -> Any:
    from transformers import AutoModelForCausalLM

    model = fill_b(AutoModelForCausalLM.from_config(config, attn_implementation="eager"), spread=spread)
    model.save_pretrained(path)
    return model


def _bert(**changes: Any) -> Any:
    from transformers import BertConfig

    return BertConfig(
        vocab_size=96,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        **changes,
    )


def _zamba() -> Any:
    from transformers import ZambaConfig

    return ZambaConfig(
        vocab_size=96,
        hidden_size=16,
        attention_hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=6,
        num_attention_heads=2,
        num_key_value_heads=2,
        attn_layer_period=3,
        attn_layer_offset=1,
        n_mamba_heads=2,
        mamba_d_state=4,
        mamba_dt_rank=2,
        pad_token_id=0,
    )


def _refused(world: World, settings: dict[str, Any]) -> str:
    try:
        problem_of(world, settings)
    except ModelError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_model_that_sees_its_targets_is_refused(ranks: int, tmp_path: Path) -> None:
    _save(_bert(), tmp_path / "model")
    settings = settings_of(tmp_path / "model", tokens_b(tmp_path / "t.npy"))
    said = [_refused(World.alone(), settings)] if ranks == 1 else run_ranks(_refused, ranks, settings)
    assert all("is not a causal language model" in text and "is_decoder" in text for text in said), said


@pytest.mark.parametrize("beginning", [0, 1, 6, 12])
def test_every_way_of_seeing_ahead_is_seen(beginning: int) -> None:
    """All of the row sees all of it, or its beginning sees itself, as of models with a prefix."""
    table = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(3, 15)[None]

    def logits(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        seen = torch.ones(12, 12).tril()
        seen[:beginning, :beginning] = 1
        return seen @ table[ids[0]]

    def check() -> str:
        first = logits(ids, torch.ones_like(ids))
        return check_causal(logits, ids, first, torch.float32, World.alone(), "Model", "take another").verdict

    if beginning <= 1:
        assert check() == "passed"
    else:
        with pytest.raises(ModelError, match="tokens see their targets; take another"):
            check()


def test_the_sentence_names_the_switch_of_the_configuration() -> None:
    from transformers import BertConfig, LlamaConfig, XLNetConfig

    assert causal_remedy(BertConfig()).startswith('set "is_decoder": true in config.json')
    assert causal_remedy(XLNetConfig()).startswith('set "attn_type": "uni" in config.json')
    assert causal_remedy(LlamaConfig()) == causal_remedy(BertConfig(is_decoder=True))


@pytest.mark.parametrize(("toy", "same", "other"), [("llama", "sdpa", "eager"), ("gpt_oss", "eager", None)])
def test_a_run_is_bound_to_the_attention_that_auto_chose(toy: str, same: str, other: str | None, tmp_path: Path) -> None:
    """So directories of earlier runs, whose default was sdpa, go on."""
    toy_directory(toy, tmp_path / "model")

    def bound(attention: str) -> str:
        settings = settings_of(tmp_path / "model", tokens_b(tmp_path / "t.npy"), model__attention=attention)
        config = make_config(settings)
        return json.loads(_identity(config, problem_of(World.alone(), settings))["config"])["model"]["attention"]

    assert bound("auto") == bound(same) == same
    if other is not None:
        assert bound(other) == other


def test_its_decoder_variant_passes(tmp_path: Path) -> None:
    model = _save(_bert(is_decoder=True), tmp_path / "model")
    [found] = _answers(settings_of(tmp_path / "model", tokens_b(tmp_path / "t.npy")), 1)
    assert_right([found], *dense_product(model, ids_b()))
    assert {"check": "model.causal", "verdict": "passed"}.items() <= found["intake"][-1].items()


@pytest.mark.parametrize("ranks", [1, 2])
def test_weights_that_a_forward_pass_rewrites_are_put_back(ranks: int, tmp_path: Path) -> None:
    from transformers import RwkvConfig, RwkvForCausalLM

    config = RwkvConfig(
        vocab_size=96,
        context_length=64,
        hidden_size=8,
        attention_hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=4,
        rescale_every=3,
    )
    _save(config, tmp_path / "model", 0.3)
    right = RwkvForCausalLM.from_pretrained(tmp_path / "model", rescale_every=0, attn_implementation="eager")
    found = _answers(settings_of(tmp_path / "model", tokens_b(tmp_path / "t.npy"), operator__step=1e-4), ranks)
    assert_right(found, *dense_product(right.eval(), ids_b()))
    [finding] = [f for f in found[0]["intake"] if f["check"] == "model.writes"]
    assert finding["verdict"] == "noted"
    assert "rescale_every = 0" in finding["text"]


WRITING = SCALED.replace(
    "        out = super().forward(*args, **kwargs)\n",
    "        with torch.no_grad():\n            self.factor.mul_(0.5)\n        out = super().forward(*args, **kwargs)\n",
)


def test_a_model_that_writes_a_buffer_is_refused_by_name(tmp_path: Path) -> None:
    assert WRITING != SCALED
    save_own(tmp_path / "model", WRITING)
    settings = settings_of(tmp_path / "model", tokens_b(tmp_path / "t.npy"), model__trust_remote_code=True)
    with pytest.raises(ModelError, match="writes 'factor' in its forward pass"):
        problem_of(World.alone(), settings)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_scalars_and_empty_tensors(ranks: int, shape: tuple[int, ...], tmp_path: Path) -> None:
    model = save_own(tmp_path / "model", SCALED, shape=shape)
    settings = settings_of(tmp_path / "model", tokens_b(tmp_path / "t.npy"), model__trust_remote_code=True)
    assert_right(_answers(settings, ranks), *dense_product(model, ids_b()))


@pytest.mark.parametrize("ranks", [1, 2])
def test_layers_that_share_weights(ranks: int, tmp_path: Path) -> None:
    model = _save(_zamba(), tmp_path / "model")
    names = [name for name, _ in model.named_parameters()]
    assert sum("shared_transf" in name for name in names) == 9, "its two attention layers share their weights"
    found = _answers(settings_of(tmp_path / "model", tokens_b(tmp_path / "t.npy")), ranks)
    assert_right(found, *dense_product(model, ids_b()))


def test_a_good_model_is_neither_refused_nor_changed(tmp_path: Path) -> None:
    model = save_b(tmp_path / "model")
    problem = problem_of(World.alone(), settings_of(tmp_path / "model", tokens_b(tmp_path / "t.npy")))
    assert {f.verdict for f in problem.intake.findings if f.check.startswith("model.")} == {"passed"}
    stored = dict(model.named_parameters())
    for name, parameter in problem.model.module.named_parameters():
        assert torch.equal(parameter.detach().float(), stored[name].detach().float())
