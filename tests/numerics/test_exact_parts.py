"""Gauss-Newton and residual, frozen parameters, and every setting of the sweeps: the same numbers."""

from __future__ import annotations

import pytest
import torch

from hpc_hess.curvature.exact.exact import ExactHessian
from hpc_hess.curvature.exact.gauss_newton import GaussNewton, Residual
from hpc_hess.curvature.exact.streaming import Settings
from hpc_hess.errors import ModelError, NumericsError
from hpc_hess.model.sharded.micro_batch import shifted_targets
from hpc_hess.model.sharded.own_loss import CallableObjective
from hpc_hess.model.sharded.precision import survives
from hpc_hess.model.sharded.shard import whole_model
from tests.support.exact_case import ToyBlock, ToyLM, case, error, micro_batches, objective, reference, vectors, widened
from tests.support.toys import toy_model


def test_gauss_newton_is_the_dense_product_and_positive() -> None:
    torch.manual_seed(0)
    module = ToyLM([ToyBlock(4), ToyBlock(4)], width=4, vocabulary=96).double()
    model, loss = whole_model(module, exclude=["embed*"]), objective(micro_batches(2, 6))
    parameters = [dict(module.named_parameters())[p.name] for p in model.layout.parameters]
    dense = torch.zeros(model.space.size, model.space.size, dtype=torch.float64)
    for batch in loss.micro_batches:
        logits = module(batch.input_ids).logits.flatten(0, 1)
        targets = shifted_targets(batch.labels).flatten()
        for row in logits[targets >= 0]:
            p = torch.softmax(row.detach(), -1)
            # H_L = diag(p) - p p^T = A A^T with A = (I - p 1^T) diag(sqrt(p))
            factor = (torch.eye(len(p)) - p[:, None]) * p.sqrt()
            grads = torch.autograd.grad(row, parameters, factor.T, retain_graph=True, is_grads_batched=True)
            rows = torch.cat([g.flatten(1) for g in grads], 1)
            dense += rows.T @ rows / loss.num_tokens
    gauss_newton = GaussNewton(model, loss)
    eye = [model.space.wrap(row) for row in torch.eye(model.space.size, dtype=torch.float64)]
    matrix = torch.stack([p.data for p in gauss_newton.matmat(eye)])
    assert float((matrix - dense).norm() / dense.norm()) < 1e-13
    eigenvalues = torch.linalg.eigvalsh((matrix + matrix.T) / 2)
    assert float(eigenvalues[0]) > -1e-14 * float(eigenvalues[-1])


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_hessian_is_gauss_newton_plus_residual(name: str) -> None:
    model, loss = case(name)
    (v,) = vectors(model, 1)
    with widened():
        whole, rest = GaussNewton(model, loss).matvec(v), Residual(model, loss).matvec(v)
        both = ExactHessian(model, loss).matvec(v)
    assert v.dot(whole) > 0
    assert rest.norm() > 1e-2 * whole.norm()
    assert error(whole.axpy_(1.0, rest), both.data) < 1e-13


@pytest.mark.parametrize(
    "settings",
    [
        Settings(way="reverse"),
        Settings(lock_step=False),
        Settings(keep_state=True),
        Settings(boundaries_on_host=True),
        Settings(logit_budget=2000, projections="all"),
        Settings(projections="none"),
    ],
    ids=["reverse", "one by one", "keep state", "host", "chunks, all products", "no product"],
)
def test_settings_change_no_number(settings: Settings) -> None:
    model, loss = case("gemma3")
    vs = vectors(model, 3)
    for kind in (ExactHessian, GaussNewton):
        expected = kind(model, loss).matmat(vs)
        found = kind(model, loss, settings=settings).matmat(vs)
        assert max(error(f, e.data) for f, e in zip(found, expected, strict=True)) < 1e-12


@pytest.mark.parametrize("include", [["model.layers.1.*"], ["lm_head*"], ["*embed*"], ["*layers.0.mlp*", "model.norm*"]])
def test_frozen_parameters_are_constants(include: list[str]) -> None:
    model, loss = case("llama_untied", include=include)
    u, v = vectors(model, 2)
    untouched = toy_model("llama_untied", dtype=torch.float64)
    with widened():
        expected = reference(untouched, model, loss, v)
        hessian = ExactHessian(model, loss)
        assert error(hessian.matvec(v), expected) < 1e-13
        assert error(hessian.matmat([u, v])[1], expected) < 1e-13


def test_a_micro_batch_that_predicts_nothing_adds_nothing() -> None:
    model, loss = case("llama")
    batches = [*micro_batches()]
    (v,) = vectors(model, 1)
    expected = ExactHessian(model, loss).matvec(v)
    dummy = micro_batches()[1]
    dummy.labels = torch.full_like(dummy.labels, -100)
    for padded in ([*batches, dummy], [dummy, *batches]):
        assert error(ExactHessian(model, objective(padded)).matvec(v), expected.data) < 1e-14


def test_a_kernel_without_derivatives_is_switched_and_named() -> None:
    model, loss = case("llama")
    (v,) = vectors(model, 1)
    expected = ExactHessian(model, loss).matvec(v)
    model.module.config._attn_implementation = "flash_attention_2"
    hessian = ExactHessian(model, loss)
    assert 'attention computed by "eager" for exact products: "flash_attention_2" lacks derivatives' in hessian.notes
    assert error(hessian.matvec(v), expected.data) < 1e-13
    assert model.module.config._attn_implementation == "flash_attention_2", "the user's setting is left as it was"


class _AttentionDropout(ToyBlock):
    def forward(self, x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        q = self.norm(x)[:, None]
        return x + torch.nn.functional.scaled_dot_product_attention(q, q, q, dropout_p=0.1)[:, 0]


def test_attention_dropout_in_eval_mode_is_refused() -> None:
    model = whole_model(ToyLM([_AttentionDropout(), ToyBlock()]).double())
    with pytest.raises(ModelError, match="attention dropout is on"):
        ExactHessian(model, objective(micro_batches(2, 6)))


def test_fp32_and_bf16_errors() -> None:
    model, loss = case("llama", torch.float32)
    double = toy_model("llama", dtype=torch.float64)
    (v,) = vectors(model, 1)
    with widened():
        expected = reference(double, model, loss, v).float()
    single = error(ExactHessian(model, loss).matvec(v), expected)
    half = error(ExactHessian(model, loss, compute_dtype=torch.bfloat16).matvec(v), expected)
    assert single < 1e-5
    assert 1e-4 < half < 0.1, "tangents in bf16 have bf16's errors, no more"


def test_weights_that_are_bf16_to_begin_with_lose_nothing_in_the_cast() -> None:
    """Other weights are moved by it: what comes out is the product at the rounded ones, to the bit."""
    errors, halves = {}, {}
    for rounded in (False, True):
        module = toy_model("llama_untied")
        if rounded:
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.copy_(parameter.bfloat16())
        model, loss = whole_model(module), objective(micro_batches())
        assert survives(module, torch.bfloat16) == rounded
        vs = vectors(model, 4)
        full = ExactHessian(model, loss).matmat(vs)
        halves[rounded] = ExactHessian(model, loss, compute_dtype=torch.bfloat16).matmat(vs)
        errors[rounded] = sum(error(h, f.data) for h, f in zip(halves[rounded], full, strict=True)) / len(vs)
    assert all(torch.equal(a.data, b.data) for a, b in zip(halves[False], halves[True], strict=True))
    assert 1e-3 < errors[True] < 0.9 * errors[False] < 0.05  # measured: 1.35e-2 and 1.78e-2


@pytest.mark.parametrize("block", [0, 1])
def test_numbers_that_are_not_finite_name_their_block(block: int) -> None:
    model, loss = case("llama", torch.float32)
    hessian = ExactHessian(model, loss)
    with torch.no_grad():
        dict(model.module.named_parameters())[f"model.layers.{block}.mlp.up_proj.weight"][0, 0] = torch.inf
    with pytest.raises(NumericsError, match=f"first in block {block}:"):
        hessian.matvec(vectors(model, 1)[0])


def test_a_loss_of_ones_own_is_refused() -> None:
    model, _ = case("llama")
    own = CallableObjective([0], lambda module, batch: next(module.parameters()).sum(), model.module)
    with pytest.raises(ModelError, match="finite_difference"):
        ExactHessian(model, own)  # type: ignore[arg-type]


def test_kernels_are_restored_and_dropout_is_refused() -> None:
    model, loss = case("gpt2")
    hessian = ExactHessian(model, loss)
    assert "fused" in hessian.notes[0]
    assert model.module.config._attn_implementation == "sdpa"
    assert not any("forward" in m.__dict__ for m in model.module.modules())
    model.module.train()
    with pytest.raises(ModelError, match="eval"):
        ExactHessian(model, loss)
