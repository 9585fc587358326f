"""Whole models with attention in small chunks, in fp64, against double backward through their own code."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hpc_hess.curvature.exact.exact import ExactHessian
from hpc_hess.model.blocks import attention_chunks, eager, splice
from hpc_hess.model.blocks.per_example import ExampleGradients
from hpc_hess.model.sharded.shard import whole_model
from tests.support.exact_case import error, micro_batches, objective, reference, vectors, widened
from tests.support.toys import TOYS, _build, _llama_like, toy_model

_LATENT = {"q_lora_rank": 12, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 8}
MORE = {
    "mistral": lambda: _build("mistral", "MistralConfig", **_llama_like(num_attention_heads=4, sliding_window=4)),
    "deepseek_v3": lambda: _build(
        "deepseek_v3",
        "DeepseekV3Config",
        **_llama_like(num_key_value_heads=2, first_k_dense_replace=1, head_dim=4, **_LATENT, **_EXPERTS),
    ),
    "bloom": lambda: _build("bloom", "BloomConfig", hidden_size=16, n_layer=2, n_head=2),
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(attention_chunks.CHUNK_ENTRIES, "cpu", 1)
    monkeypatch.setattr(attention_chunks, "_LEAST_ROWS", 3)
    for name, config in MORE.items():
        monkeypatch.setitem(TOYS, name, config)


def _case(name: str, attention: str) -> Any:
    untouched = toy_model(name, dtype=torch.float64)
    for module in (model := toy_model(name, dtype=torch.float64, attention=attention), untouched):
        module.config._experts_implementation = "eager"
    return whole_model(model), objective(micro_batches()), untouched


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        ("llama", "sdpa"),
        ("llama", "eager"),
        ("mistral", "sdpa"),
        ("mistral", "eager"),
        ("gemma2", "eager"),
        ("gpt_oss", "eager"),
        ("deepseek_v3", "sdpa"),
        ("deepseek_v3", "eager"),
    ],
)
def test_products_equal_double_backward(name: str, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, loss, untouched = _case(name, attention)
    ours, calls = eager._ours, []
    monkeypatch.setattr(eager, "_ours", lambda *args, **more: calls.append(0) or ours(*args, **more))
    with widened():
        hessian = ExactHessian(model, loss)
        u, v = vectors(model, 2)
        expected = reference(untouched, model, loss, v)
        assert error(hessian.matvec(v), expected) < 1e-12
        assert error(hessian.matmat([u, v])[1], expected) < 1e-12
    assert bool(calls) == (attention == "eager")
    assert not [note for note in hessian.notes if "is its own" in note or "written out" in note]


def test_a_function_of_another_kind_is_kept_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.gemma2 import modeling_gemma2

    right = modeling_gemma2.eager_attention_forward

    def colder(module: Any, query: torch.Tensor, *args: Any, **more: Any) -> Any:
        return right(module, 1.1 * query, *args, **more)

    monkeypatch.setattr(modeling_gemma2, "eager_attention_forward", colder)
    model, loss, untouched = _case("gemma2", "eager")
    with widened():
        hessian = ExactHessian(model, loss)
        (v,) = vectors(model, 1)
        assert error(hessian.matvec(v), reference(untouched, model, loss, v)) < 1e-12
    assert [note for note in hessian.notes if "attention of Gemma2Attention is its own" in note]


def test_attention_written_out_in_the_model_is_named_where_it_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    model, loss, _ = _case("bloom", "eager")
    assert not [note for note in ExactHessian(model, loss).notes if "written out" in note]
    monkeypatch.setattr(splice, "_LARGE", 100)
    assert [note for note in ExactHessian(model, loss).notes if "written out" in note]


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_gradients_of_examples(name: str) -> None:
    model, _, untouched = _case(name, "eager")
    batch = micro_batches()[1]
    found = torch.zeros(model.space.size, dtype=torch.float64)

    def sink(data: torch.Tensor, starts: Any, lengths: Any) -> None:
        found[starts[0] : starts[0] + lengths[0]] += data

    with widened():
        ExampleGradients(model, batch, None)(batch, sink)
        total = objective([batch]).contribution(untouched, 0).total
        named = dict(untouched.named_parameters())
        grads = torch.autograd.grad(total, [named[p.name] for p in model.layout.parameters], materialize_grads=True)
    expected = torch.cat([g.flatten() for g in grads])
    assert float((found - expected).norm() / expected.norm()) < 1e-12
