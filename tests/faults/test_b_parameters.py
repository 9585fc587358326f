"""B1 to B5: padding rows, frozen and unreached parameters, choices that are not frozen, forwards that write buffers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import hpc_hess
from hpc_hess.commands.check.work import check
from hpc_hess.commands.run.work import run
from hpc_hess.config import make_config
from hpc_hess.errors import NumericsError
from hpc_hess.parallel.world import World
from tests.support.base_model import fill_b, ids_b, model_b, result_of, settings_b, tokens_b
from tests.support.problems import assert_right, dense_product, problem_of, products, settings_of
from tests.support.spawn import run_ranks

pytestmark = pytest.mark.slow


def _save(config: Any, path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model = fill_b(AutoModelForCausalLM.from_config(config, attn_implementation="eager"))
    model.save_pretrained(path)
    return model


def _answers(settings: dict[str, Any], ranks: int) -> list[dict[str, Any]]:
    return [products(World.alone(), settings)] if ranks == 1 else run_ranks(products, ranks, settings)


# -- B1 ------------------------------------------------------------------------------------------------------------------


def _padded() -> tuple[Any, torch.Tensor]:
    """A model whose padding token is in the data, and the data."""
    ids = ids_b().clone()
    ids[0, 3] = ids[1, 7] = ids[2, 0] = 2
    return model_b(pad_token_id=2, eos_token_id=2), ids


def _reference() -> Any:
    model, _ = _padded()
    assert model.model.embed_tokens.padding_idx == 2
    model.model.embed_tokens.padding_idx = None
    return model


@pytest.mark.parametrize("ranks", [1, 2])
def test_padding_row_in_products_of_a_run(ranks: int, tmp_path: Path) -> None:
    model, ids = _padded()
    model.save_pretrained(tmp_path / "model")
    np.save(tmp_path / "t.npy", ids.reshape(-1).numpy())
    found = _answers(settings_of(tmp_path / "model", tmp_path / "t.npy"), ranks)
    assert_right(found, *dense_product(_reference(), ids))


@pytest.mark.parametrize("method", ["exact", "finite_difference"])
def test_padding_row_in_the_interface(method: Any) -> None:
    model, ids = _padded()
    operator = hpc_hess.hessian(model.double(), [{"input_ids": ids}], method=method)
    row = operator.layout.parameters
    [place] = [p for p in row if p.name == "model.embed_tokens.weight"]
    start = place.file_offset + 2 * 16
    u, v = torch.zeros(2, operator.shape[0], dtype=torch.float64)
    u[start : start + 16], v[:] = 1.0, torch.randn(len(v), generator=torch.Generator().manual_seed(0))
    forth, back = float(u @ operator.matvec(v)), float(v @ operator.matvec(u))
    assert abs(forth) > 0.1
    assert forth == pytest.approx(back, rel=1e-5)
    assert model.model.embed_tokens.padding_idx == 2, "the model is the user's"


def test_padding_row_in_gradient_sketches() -> None:
    model, ids = _padded()
    found = hpc_hess.gradient_sketches(model.double(), [{"input_ids": ids}], dimension=256)
    right = hpc_hess.gradient_sketches(_reference().double(), [{"input_ids": ids}], dimension=256)
    assert found == pytest.approx(right, abs=1e-12)


def test_frequencies_do_not_scale_an_embeddings_gradient() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Embedding(6, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    scaled = nn.Sequential(nn.Embedding(6, 3, scale_grad_by_freq=True), nn.Tanh(), nn.Linear(3, 2)).double()
    scaled.load_state_dict(plain.state_dict())
    batch, v = torch.tensor([1, 1, 2, 5]), torch.linspace(-1, 1, 26, dtype=torch.float64)
    loss: Any = lambda module, ids: (module(ids) ** 2).mean()  # noqa: E731
    for method in ("exact", "finite_difference"):
        found, right = (hpc_hess.hessian(m, [batch], loss, method=method).matvec(v) for m in (scaled, plain))  # type: ignore[arg-type]
        assert torch.allclose(found, right, atol=1e-8)


# -- B2 ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["exact", "finite_difference"])
def test_frozen_parameters_are_not_in_the_matrix(method: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    model[0].requires_grad_(False)
    x, y = torch.randn(7, 5).double(), torch.randn(7, 3).double()
    loss: Any = lambda module, batch: ((module(batch[0]) - batch[1]) ** 2).mean()  # noqa: E731
    operator = hpc_hess.hessian(model, [(x, y)], loss, method=method)
    found = torch.stack([operator.matvec(e) for e in torch.eye(operator.shape[0], dtype=torch.float64)])
    last = dict(model[2].named_parameters())

    def of(bias: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return ((torch.tanh(model[0](x)) @ weight.T + bias - y) ** 2).mean()

    blocks = torch.autograd.functional.hessian(of, (last["bias"].detach(), last["weight"].detach()))
    right = torch.cat([torch.cat([b.reshape(n, -1) for b in row], 1) for n, row in zip((3, 18), blocks, strict=True)])  # type: ignore[union-attr]
    assert operator.shape == (21, 21)
    assert torch.allclose(found, right, atol=1e-7)
    assert all(p.grad is None for p in model.parameters())


def test_adapters_in_another_dtype_than_their_base() -> None:
    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(5, 3).bfloat16().requires_grad_(False)
            self.lora_a, self.lora_b = nn.Linear(5, 2, bias=False), nn.Linear(2, 3, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x.bfloat16()).float() + self.lora_b(torch.tanh(self.lora_a(x)))

    torch.manual_seed(0)
    operator = hpc_hess.hessian(
        Adapted(), [torch.randn(4, 5)], lambda m, x: (m(x) ** 2).mean(), method="exact", include=["*lora_*"]
    )
    assert operator.shape == (16, 16)
    assert operator.space.dtype == torch.float32


def _marian() -> Any:
    from transformers import MarianConfig

    return MarianConfig(
        vocab_size=96,
        decoder_vocab_size=96,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )


def _ernie() -> Any:
    from transformers import Ernie4_5_MoeConfig

    return Ernie4_5_MoeConfig(
        vocab_size=96,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        moe_num_experts=4,
        moe_k=2,
        moe_intermediate_size=12,
        moe_layer_start_index=1,
    )


@pytest.mark.parametrize(("config", "frozen"), [(_marian, "embed_positions"), (_ernie, "e_score_correction_bias")])
def test_what_an_architecture_freezes_is_not_counted(config: Any, frozen: str, tmp_path: Path) -> None:
    model = _save(config(), tmp_path / "model")
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    size = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    [found] = _answers(settings_of(tmp_path / "model", tokens_b(tmp_path / "t.npy")), 1)
    assert found["size"] == size < sum(parameter.numel() for parameter in model.parameters())
    assert_right([found], *dense_product(model, ids_b(), names))
    [finding] = [f for f in found["intake"] if f["check"] == "model.frozen"]
    assert finding["verdict"] == "noted"
    assert frozen in finding["text"]


# -- B3 ------------------------------------------------------------------------------------------------------------------


def _bart(path: Path) -> dict[str, Any]:
    from transformers import BartConfig

    _save(
        BartConfig(
            vocab_size=96,
            d_model=16,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        ),
        path / "model",
    )
    return {
        "model": path / "model",
        "tokens": tokens_b(path / "t.npy"),
        "model__attention": "eager",
        "parameters__include": ["*encoder_attn*"],
        "lanczos__steps": 3,
        "lanczos__probes": 2,
    }


def test_a_run_of_parameters_that_the_loss_does_not_reach(tmp_path: Path, world: World) -> None:
    asked = _bart(tmp_path)
    for method in ("finite_difference", "exact"):
        out = tmp_path / method
        run(make_config(settings_b(out=out, operator__method=method, **asked)), world)
        result = json.loads((out / "result.json").read_text(), parse_constant=pytest.fail)
        assert result["lambda_max"] == result["lambda_min"] == result["trace"]["mean"] == 0.0
        [finding] = [f for f in result["intake"] if f["check"] == "model.reached"]
        assert "depends on none of the 2,240 parameters" in finding["text"]
    asked["parameters__include"] = ["*encoder_attn*", "*fc1*"]
    run(make_config(settings_b(out=tmp_path / "some", **asked)), world)
    [finding] = [f for f in result_of(tmp_path / "some")["intake"] if f["check"] == "model.reached"]
    assert "does not depend on 2,240 of" in finding["text"]
    assert "encoder_attn" in finding["text"]


def test_check_of_parameters_that_the_loss_does_not_reach(tmp_path: Path, world: World) -> None:
    out = tmp_path / "out"
    check(make_config(settings_b(out=out, **_bart(tmp_path))), world)
    found = json.loads((out / "check.json").read_text(), parse_constant=pytest.fail)
    assert found["symmetry"] == found["linearity"] == 0.0


def _gemma3(path: Path) -> Any:
    from transformers import Gemma3Config

    text = {
        "vocab_size": 96,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "query_pre_attn_scalar": 8,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "sliding_window": 8,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    config = Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=90,
        boi_token_index=91,
        eoi_token_index=92,
    )
    return _save(config, path)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_vision_tower_under_text(ranks: int, tmp_path: Path) -> None:
    """Exact products stream through the blocks of the text model, although the tower has more: the tower is left out."""
    model = _gemma3(tmp_path / "model")
    names = [name for name, _ in model.named_parameters() if "vision" not in name and "projector" not in name]
    ids = torch.from_numpy(np.random.default_rng(0).integers(3, 90, 30)).view(3, 10)
    np.save(tmp_path / "t.npy", ids.reshape(-1).numpy())
    found = _answers(settings_of(tmp_path / "model", tmp_path / "t.npy"), ranks)
    assert_right(found, *dense_product(model, ids, names))
    assert not any("take the model as a whole" in note for note in found[0]["notes"]), found[0]["notes"]


def test_studies_of_a_composite_model(tmp_path: Path, world: World) -> None:
    """D16: class groups and heads are those of the text configuration."""
    _gemma3(tmp_path / "model")
    np.save(tmp_path / "t.npy", np.random.default_rng(0).integers(3, 90, 30))
    run(
        make_config(
            settings_b(
                tmp_path / "model",
                tmp_path / "t.npy",
                tmp_path / "out",
                model__attention="eager",
                operator__method="exact",
                operator__kind="gauss_newton",
                lanczos__steps=3,
                analysis__class_groups=2,
                analysis__class_steps=2,
                analysis__block_diagonal=["head"],
                analysis__block_steps=2,
            )
        ),
        world,
    )
    result = result_of(tmp_path / "out")
    assert {"class_structure", "block_diagonal"} <= set(result["studies"])
    [note] = [f["text"] for f in result["intake"] if "the language model alone" in f["text"]]
    assert "model.vision_tower (" in note


# -- B5 ------------------------------------------------------------------------------------------------------------------


def _phi3(path: Path) -> Any:
    from transformers import Phi3Config

    config = Phi3Config(
        vocab_size=96,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        original_max_position_embeddings=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [2.0, 3.0, 4.0, 5.0],
            "original_max_position_embeddings": 16,
        },
    )
    return _save(config, path)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_forward_pass_that_writes_buffers(ranks: int, tmp_path: Path) -> None:
    model = _phi3(tmp_path / "model")
    found = _answers(settings_of(tmp_path / "model", tokens_b(tmp_path / "t.npy")), ranks)
    assert_right(found, *dense_product(model, ids_b()))


_ROWS = [list(range(3, 13)), list(range(20, 50)), list(range(60, 72))]


def _padded_rows(world: World, settings: dict[str, Any]) -> tuple[float, list[dict[str, str]]]:
    """Return the loss and the intake of rows of different lengths, as rows = "pad" gives them. Collective: yes."""
    from hpc_hess.model.data.data import make_samples
    from hpc_hess.model.data.documents import Document
    from hpc_hess.session import problem as problems

    with pytest.MonkeyPatch.context() as patch:  # ids need no tokenizer
        rows = [Document(np.array(row)) for row in _ROWS]
        patch.setattr(problems, "load_samples", lambda section, model, source: make_samples(rows, section, 96))
        problem = problem_of(world, settings)
    return problem.gradient.at_theta0()[0], problem.intake.to_json()


def _loss_alone(model: Any) -> float:
    """Return the token-weighted loss of the rows, each computed by itself."""
    total = 0.0
    for row in _ROWS:
        logits = model(input_ids=torch.tensor([row])).logits[0, :-1]
        total += float(nn.functional.cross_entropy(logits, torch.tensor(row[1:]), reduction="sum"))
    return total / sum(len(row) - 1 for row in _ROWS)


@pytest.mark.parametrize("ranks", [1, 2])
def test_rows_of_a_model_that_minds_padding_come_one_by_one(ranks: int, tmp_path: Path) -> None:
    model = _phi3(tmp_path / "model")
    settings = settings_of(
        tmp_path / "model",
        tokens_b(tmp_path / "t.npy"),
        data__micro_batch=4,
        data__sequence_length=32,
        model__master_dtype="float32",
        model__compute_dtype="float32",
    )
    found = [_padded_rows(World.alone(), settings)] if ranks == 1 else run_ranks(_padded_rows, ranks, settings)
    for loss, intake in found:
        assert loss == pytest.approx(_loss_alone(model), rel=1e-6)
        [finding] = [f for f in intake if f["check"] == "model.padding"]
        assert finding["verdict"] == "noted"


def test_rows_of_another_model_stay_padded(tmp_path: Path) -> None:
    model = model_b()
    model.save_pretrained(tmp_path / "model")
    settings = settings_of(tmp_path / "model", tokens_b(tmp_path / "t.npy"), data__micro_batch=4, data__sequence_length=32)
    loss, intake = _padded_rows(World.alone(), settings)
    assert loss == pytest.approx(_loss_alone(model), rel=1e-6)
    [finding] = [f for f in intake if f["check"] == "model.padding"]
    assert finding["verdict"] == "passed"


# -- B4 ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undecided(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A router without topk whose experts are nearly equal."""
    from transformers import AutoModelForCausalLM, PhimoeConfig

    path = tmp_path_factory.mktemp("phimoe")
    config = PhimoeConfig(
        vocab_size=96,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        router_jitter_noise=0.01,
        sliding_window=None,
    )
    model = fill_b(AutoModelForCausalLM.from_config(config, attn_implementation="eager"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate.weight" in name or "router.weight" in name:
                parameter.copy_(parameter[:1] + 3e-4 * torch.randn_like(parameter))
    model.save_pretrained(path / "model")
    np.save(path / "t.npy", np.random.default_rng(0).integers(3, 96, 48))
    return {
        "model": path / "model",
        "tokens": path / "t.npy",
        "model__attention": "eager",
        "data__sequence_length": 12,
        "data__sequences": 4,
        "lanczos__steps": 12,
    }


@pytest.mark.parametrize("checked", [True, False])
def test_choices_that_are_not_frozen_are_named(
    checked: bool, undecided: dict[str, Any], tmp_path: Path, world: World
) -> None:
    """No interval can be given: the right lambda_max is far from what the differences see."""
    with pytest.raises(NumericsError, match='iscrete choices of the model .*set operator.method = "exact"'):
        run(make_config(settings_b(out=tmp_path / "out", operator__check=checked, **undecided)), world)


def test_choices_are_a_caution_where_the_error_is_smaller() -> None:
    from hpc_hess.report.spectrum import warnings

    errors = {"hvp_relative": 0.1, "hvp_relative_is": "measured", "choices_changed": {"topk": 3}}
    [caution] = [text for text in warnings({"errors": errors}) if "Discrete choices" in text]
    assert 'operator.method = "exact"' in caution
    assert not [t for t in warnings({"errors": errors | {"choices_changed": {}}}) if "Discrete choices" in t]


def test_their_exact_products_have_no_such_caution(undecided: dict[str, Any], tmp_path: Path, world: World) -> None:
    from hpc_hess.report.spectrum import warnings

    run(make_config(settings_b(out=tmp_path / "out", operator__method="exact", **undecided)), world)
    result = result_of(tmp_path / "out")
    assert result["errors"]["choices_changed"] is None
    assert not [text for text in warnings(result) if "Discrete choices" in text]


def test_a_model_without_choices_has_no_caution(tmp_path: Path, world: World) -> None:
    from hpc_hess.report.spectrum import warnings

    model_b().save_pretrained(tmp_path / "model")
    out, tokens = tmp_path / "out", tokens_b(tmp_path / "t.npy")
    run(make_config(settings_b(tmp_path / "model", tokens, out, lanczos__steps=3, operator__check=False)), world)
    result = result_of(out)
    assert result["errors"]["choices_changed"] == {}
    assert not [text for text in warnings(result) if "Discrete choices" in text or "symmetric" in text]


def test_an_operator_without_symmetry_is_named() -> None:
    from hpc_hess.report.spectrum import warnings

    assert any("not symmetric" in text for text in warnings({"errors": {"symmetry": 0.23, "hvp_relative": 1e-3}}))
    assert not any("not symmetric" in text for text in warnings({"errors": {"symmetry": 1e-4, "hvp_relative": 1e-3}}))
