"""Finite-difference products in float64 against double backward, curvlinops and dense Hessians, and their manners."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import nn

from hpc_hess.curvature.differences import step_size
from hpc_hess.curvature.differences.finite_difference import FiniteDifferenceHessian, Scheme
from hpc_hess.errors import NumericsError
from hpc_hess.linalg.lanczos import Lanczos
from hpc_hess.linalg.probes import normals, signs
from hpc_hess.linalg.quadrature import ritz
from hpc_hess.model.sharded.gradient import Gradient
from hpc_hess.model.sharded.loss import CausalLMObjective, Contribution, Objective
from hpc_hess.model.sharded.own_loss import CallableObjective
from hpc_hess.model.sharded.precision import honest_casts
from hpc_hess.model.sharded.routing import Routing
from hpc_hess.model.sharded.shard import ShardedModel, whole_model
from hpc_hess.parallel.basis import Basis
from hpc_hess.parallel.vector import Vector
from tests.support.dense import dense_hessian, hessian_product
from tests.support.sharded import ragged_objective, ragged_rows
from tests.support.toys import TOYS, toy_config, toy_model
from tests.support.written_out import write_out


@dataclass
class Spy:
    """An objective that counts the micro-batches it was asked for, and calls ``before`` first."""

    inner: Objective
    before: Callable[[int], None] = lambda count: None
    count: int = 0
    num_micro_batches: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_micro_batches = self.inner.num_micro_batches

    def contribution(self, module: nn.Module, index: int) -> Contribution:
        self.count += 1
        self.before(self.count)
        return self.inner.contribution(module, index)


def build(
    name: str, dtype: torch.dtype = torch.float64, routing: Literal["frozen", "free"] = "frozen", rows: int = 3
) -> tuple[ShardedModel, Gradient, Spy]:
    model = whole_model(toy_model(name, dtype=dtype))
    spy = Spy(ragged_objective(rows=rows))
    return model, Gradient(model, spy, Routing(model.module, routing)), spy


def unit(model: ShardedModel, kind: str = "normal") -> Vector:
    draw = normals if kind == "normal" else signs
    v = model.space.wrap(draw(6, 0, 0, model.space.size, dtype=model.space.dtype))
    return v.scale_(1 / v.norm())


def error_of(product: Vector, exact: torch.Tensor) -> float:
    return float((product.data.double() - exact).norm() / exact.norm())


# -- the product against independent ones ----------------------------------------------------------------------------


class _Logits(nn.Module):
    def __init__(self, model: nn.Module, mask: torch.Tensor) -> None:
        super().__init__()
        self.model, self.mask = model, mask

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        with honest_casts(torch.float64):
            logits = self.model(input_ids=ids, attention_mask=self.mask, use_cache=False).logits
        return logits[:, :-1].flatten(0, 1)


def curvlinops_product(name: str, v: torch.Tensor, rows: int = 3) -> torch.Tensor:
    """H v by curvlinops: another derivation, another loss, all rows in one batch."""
    curvlinops = pytest.importorskip("curvlinops")
    model, data = toy_model(name, dtype=torch.float64), ragged_rows(rows)
    write_out(model)
    parameters = list(dict(sorted(model.named_parameters())).values())
    batch = (data.input_ids, data.labels[:, 1:].flatten())
    operator = curvlinops.HessianLinearOperator(
        _Logits(model, data.attention_mask),
        nn.CrossEntropyLoss(ignore_index=-100),
        parameters,
        [batch],
        check_deterministic=False,
    )
    return operator @ v


@pytest.mark.parametrize("name", TOYS)
def test_products_of_every_architecture(name: str) -> None:
    """Central, at the step it chooses and at a fixed one, against double backward and curvlinops: 1e-6 relative."""
    model, gradient, _ = build(name)
    v = unit(model)
    exact = hessian_product(toy_model(name, dtype=torch.float64), ragged_objective(rows=3), v.data)
    other = curvlinops_product(name, v.data)
    assert float((exact - other).norm() / other.norm()) < 1e-12  # two oracles that share nothing but the model
    before = v.data.clone()
    for step in ("auto", 1e-4):
        product = FiniteDifferenceHessian(gradient, "central", step).matvec(v)  # type: ignore[arg-type]
        assert error_of(product, exact) < 1e-6, step
        assert error_of(product, other) < 1e-6, step
    assert torch.equal(v.data, before)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize(("scheme", "bound"), [("forward", 1e-5), ("central", 1e-8), ("fourth", 1e-10)])
@pytest.mark.parametrize("kind", ["normal", "sign"])
def test_each_scheme_reaches_its_accuracy(name: str, scheme: Scheme, bound: float, kind: str) -> None:
    model, gradient, _ = build(name)
    v = unit(model, kind)
    exact = hessian_product(toy_model(name, dtype=torch.float64), ragged_objective(rows=3), v.data)
    assert error_of(FiniteDifferenceHessian(gradient, scheme).matvec(v), exact) < bound


@pytest.mark.parametrize(("scheme", "order"), [("forward", 1), ("central", 2), ("fourth", 4)])
def test_each_scheme_converges_with_its_order(scheme: Scheme, order: int) -> None:
    model, gradient, _ = build("gpt2")
    v = unit(model)
    exact = hessian_product(toy_model("gpt2", dtype=torch.float64), ragged_objective(rows=3), v.data)
    wide, narrow = (error_of(FiniteDifferenceHessian(gradient, scheme, h).matvec(v), exact) for h in (0.08, 0.04))
    assert math.log2(wide / narrow) == pytest.approx(order, abs=0.35)


@pytest.mark.parametrize(("scheme", "bound"), [("forward", 3e-2), ("central", 2e-3), ("fourth", 1e-3)])
def test_float32_at_the_chosen_step(scheme: Scheme, bound: float) -> None:
    """Random and concentrated vectors need steps orders of magnitude apart; both are served."""
    model, gradient, _ = build("llama", torch.float32)
    operator = FiniteDifferenceHessian(gradient, scheme)
    spread = unit(model)
    one = model.space.zeros()
    one.data[model.layout.parameters[1].global_offset : model.layout.parameters[1].global_offset + 3] = 0.5
    for v in (spread, one):
        exact = hessian_product(toy_model("llama", dtype=torch.float64), ragged_objective(rows=3), v.data.double())
        assert error_of(operator.matvec(v), exact) < bound


@pytest.mark.parametrize("scheme", ["forward", "central", "fourth"])
def test_products_are_linear_in_the_length_of_the_vector(scheme: Scheme) -> None:
    """The step is along v / |v|: scaling v scales the product, from tiny to huge."""
    model, gradient, _ = build("gpt2")
    operator = FiniteDifferenceHessian(gradient, scheme, 1e-3)
    v = unit(model)
    base = operator.matvec(v).data
    for factor in (1e-12, 1e9):
        scaled = operator.matvec(model.space.wrap(v.data * factor)).data / factor
        torch.testing.assert_close(scaled, base, rtol=1e-5, atol=float(base.abs().max()) * 1e-5)


class _Bowl(nn.Module):
    """sum c (w - 1)^2 / 2 around w = 1: a gradient without rounding error."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(5))

    def forward(self, c: torch.Tensor) -> torch.Tensor:
        return 0.5 * (c * (self.w - 1).square()).sum()


@pytest.mark.parametrize("scheme", ["forward", "central", "fourth"])
def test_the_realised_step_is_what_is_divided_by(scheme: Scheme) -> None:
    """A step of 2.6 spacings of float32 is stored as 3 (or 2.5, below 1); the product is right all the same."""
    model = whole_model(_Bowl())
    c = torch.tensor([1.0, -2.0, 8.0, 4.0, 0.0])
    gradient = Gradient(model, CallableObjective([c], lambda module, batch: module(batch), model.module))
    v = model.space.zeros()
    v.data[2] = 1.0
    operator = FiniteDifferenceHessian(gradient, scheme, 2.6 * 2.0**-23)
    torch.testing.assert_close(operator.matvec(v).data, torch.tensor([0.0, 0.0, 8.0, 0.0, 0.0]), rtol=1e-6, atol=0)
    assert operator.records[-1].realised == pytest.approx({"forward": 3 / 2.6}.get(scheme, 2.75 / 2.6), rel=1e-6)


# -- eigenvalues against the dense Hessian ---------------------------------------------------------------------------

_SMALLER = {
    "vocab_size": 20,
    "hidden_size": 8,
    "intermediate_size": 10,
    "num_hidden_layers": 1,
    "head_dim": 4,
    "n_embd": 8,
    "n_layer": 1,
    "ffn_dim": 10,
    "word_embed_proj_dim": 8,
    "moe_intermediate_size": 6,
    "shared_expert_intermediate_size": 6,
    "query_pre_attn_scalar": 4,
    "max_position_embeddings": 16,
    "n_positions": 16,
}


def _smaller_config(name: str) -> Any:
    config = toy_config(name)
    settings = {k: v for k, v in config.to_dict().items() if k not in ("layer_types", "mlp_only_layers")}
    return type(config)(**{**settings, **{k: v for k, v in _SMALLER.items() if k in settings}})


def _small_objective() -> CausalLMObjective:
    objective = ragged_objective(rows=3)
    for batch in objective.micro_batches:
        keep = batch.attention_mask == 1
        batch.input_ids = torch.where(keep, batch.input_ids % 17 + 3, 0)
        batch.labels = torch.where(keep, batch.labels % 17 + 3, -100)
    return objective


@pytest.mark.slow
@pytest.mark.parametrize("name", TOYS)
def test_extreme_eigenvalues_against_the_dense_hessian(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = _smaller_config(name)
    monkeypatch.setitem(TOYS, name, lambda: config)
    model = whole_model(toy_model(name, dtype=torch.float64))
    assert 300 < model.space.size < 2500
    gradient = Gradient(model, _small_objective(), Routing(model.module, "frozen"))
    operator = FiniteDifferenceHessian(gradient)
    steps = 60
    lanczos = Lanczos(operator, Basis(model.space, steps), steps)
    lanczos.start(unit(model, "sign"))
    while not lanczos.finished:
        lanczos.step()
    found = ritz(lanczos.alpha, lanczos.beta)
    dense = dense_hessian(toy_model(name, dtype=torch.float64), _small_objective())
    torch.testing.assert_close(dense, dense.T, rtol=0, atol=1e-12)
    one_by_one = hessian_product(toy_model(name, dtype=torch.float64), _small_objective(), unit(model).data)
    torch.testing.assert_close(dense @ unit(model).data, one_by_one, rtol=0, atol=1e-12)
    values = torch.linalg.eigvalsh(dense).numpy()
    largest = np.abs(values).max()
    np.testing.assert_allclose(found.values[[0, 1, -2, -1]], values[[0, 1, -2, -1]], atol=1e-6 * largest, rtol=0)
    assert lanczos.asymmetry < 1e-6 * largest
    # the moments of the quadrature are those of the dense matrix
    v = unit(model, "sign").data
    for power in (1, 2, 3):
        exact = float(v @ torch.linalg.matrix_power(dense, power) @ v)
        assert float(found.weights @ found.values**power) == pytest.approx(exact, abs=1e-7 * largest**power)


# -- manners ---------------------------------------------------------------------------------------------------------


def _bits(model: ShardedModel) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.module.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scheme", ["forward", "central", "fourth"])
def test_theta_0_is_restored_bitwise(scheme: Scheme, dtype: torch.dtype) -> None:
    model, gradient, _ = build("llama", dtype)
    before = _bits(model)
    operator = FiniteDifferenceHessian(gradient, scheme)
    for kind in ("normal", "sign"):
        operator.matvec(unit(model, kind))
        assert all(torch.equal(a, b) for a, b in zip(before, _bits(model), strict=True))
    assert all(p.grad is None for p in model.module.parameters())


@pytest.mark.parametrize("step", ["auto", 1e-3])
@pytest.mark.parametrize("failing", [1, 2, 5, 6])
def test_theta_0_is_restored_when_the_loss_raises(failing: int, step: Any) -> None:
    """In the first and in the second gradient, in the first and in a later micro-batch."""
    model, gradient, spy = build("llama")
    before = _bits(model)
    operator = FiniteDifferenceHessian(gradient, "central", step)
    good = operator.matvec(unit(model)).data
    spy.count = 0
    moved = []

    def fail(count: int) -> None:
        if count == failing:
            moved.append(any(not torch.equal(a, b) for a, b in zip(before, _bits(model), strict=True)))
            raise RuntimeError("out of memory")

    spy.before = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        operator.matvec(unit(model))
    assert moved == [True]  # it did fail away from theta_0
    assert all(torch.equal(a, b) for a, b in zip(before, _bits(model), strict=True))
    assert all(p.grad is None for p in model.module.parameters())
    spy.before = lambda count: None
    assert torch.equal(operator.matvec(unit(model)).data, good)


@pytest.mark.parametrize(("scheme", "gradients"), [("forward", 1), ("central", 2), ("fourth", 4)])
def test_gradients_a_product_costs(scheme: Scheme, gradients: int) -> None:
    """At a given step, and at the chosen one after the calibration."""
    model, gradient, spy = build("llama")
    for step in (1e-3, "auto"):
        operator = FiniteDifferenceHessian(gradient, scheme, step)  # type: ignore[arg-type]
        operator.matvec(unit(model))
        spy.count = 0
        for _ in range(3):
            operator.matvec(unit(model))
        assert spy.count == 3 * gradients * spy.num_micro_batches
        assert [record.gradients for record in operator.records[1:]] == [gradients] * 3
        assert [record.calibration for record in operator.records[1:]] == [0] * 3


def test_the_zero_vector_costs_nothing() -> None:
    model, gradient, spy = build("llama")
    operator = FiniteDifferenceHessian(gradient)
    spy.count = 0
    product = operator.matvec(model.space.zeros())
    assert spy.count == 0
    assert torch.equal(product.data, torch.zeros_like(product.data))


def test_a_nan_loss_names_the_first_sample() -> None:
    model = whole_model(toy_model("llama_untied", dtype=torch.float64))
    objective = ragged_objective(rows=5, micro_batch=2)
    token = int(ragged_rows(5).input_ids[3, 0])
    seen = [row for row in range(5) if token in ragged_rows(5).input_ids[row][ragged_rows(5).attention_mask[row] == 1]]
    with torch.no_grad():
        model.module.get_parameter("model.embed_tokens.weight")[token] = torch.nan
    with pytest.raises(NumericsError, match=f"the loss of sample {seen[0]} is not finite") as caught:
        FiniteDifferenceHessian(Gradient(model, objective))
    assert caught.value.exit_code == 3


def test_a_loss_that_overflows_away_from_theta_0_is_refused_and_theta_0_restored() -> None:
    model, gradient, _ = build("gpt2")
    before = _bits(model)
    operator = FiniteDifferenceHessian(gradient, "central", 1e300)
    with pytest.raises(NumericsError, match="the loss of sample 0 is not finite"):
        operator.matvec(unit(model))
    assert all(torch.equal(a, b) for a, b in zip(before, _bits(model), strict=True))


@pytest.mark.parametrize("scheme", ["forward", "central", "fourth"])
def test_a_step_that_underflows_is_refused(scheme: Scheme) -> None:
    model, gradient, _ = build("llama", torch.float32)
    operator = FiniteDifferenceHessian(gradient, scheme, 1e-12)
    v = model.space.zeros()
    v.data[torch.tensor([bool(x) for x in model.read_parameters().abs() > 0.05])] = 1.0
    with pytest.raises(NumericsError, match=r"a step of 1\.0e-12 is lost .* raise operator\.step"):
        operator.matvec(v)


# -- mixture of experts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_frozen_routing_stays_and_free_routing_is_counted(name: str) -> None:
    """A large step moves tokens to other experts; frozen it may not, and the product stays smooth."""
    model, gradient, _ = build(name, routing="free")
    v = unit(model)
    operator = FiniteDifferenceHessian(gradient, "central", 1e-3)
    operator.matvec(v)
    assert operator.records[-1].flips == 0  # a small step moves none
    operator.step = 6.0
    operator.matvec(v)
    assert operator.records[-1].flips > 0
    _, frozen_gradient, _ = build(name, routing="frozen")
    frozen = FiniteDifferenceHessian(frozen_gradient, "central", 6.0)
    frozen.matvec(v)
    assert frozen.records[-1].flips == 0
    assert frozen_gradient.routing.has_router
    assert not build("llama")[1].routing.has_router


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_a_flip_adds_a_jump_that_freezing_avoids(name: str) -> None:
    """Along the line theta_0 + t v: the frozen gradient is smooth where the free one jumps."""
    v = unit(build(name)[0])
    differences = {}
    for routing in ("free", "frozen"):
        model, gradient, _ = build(name, routing=routing)  # type: ignore[arg-type]
        operator = FiniteDifferenceHessian(gradient, "central", 1e-3)
        points = []
        for t in np.linspace(0, 6, 25):
            model.move_parameters(operator.theta0, v.data, float(t))
            points.append(gradient()[1].data.clone())
        second = [float((a - 2 * b + c).norm()) for a, b, c in zip(points, points[1:], points[2:], strict=False)]
        differences[routing] = max(second)
    assert differences["free"] > 3 * differences["frozen"]


@pytest.mark.parametrize("kind", ["random", "extreme eigenvector", "one norm"])
def test_the_chosen_step_is_near_the_best_one(kind: str) -> None:
    """Their best steps lie three decades apart, and how concentrated a vector is does not tell which is which."""
    reference_model, _, reference_spy = build("llama")
    model = whole_model(toy_model("llama", dtype=torch.float32))
    gradient = Gradient(model, ragged_objective(rows=3), Routing(model.module, "frozen"))
    v = unit(reference_model)
    if kind == "one norm":
        kept = next(p for p in reference_model.shard.pieces if p.parameter.name == "model.norm.weight")
        norm = v.data[kept.start : kept.stop].clone()
        v.data.zero_()[kept.start : kept.stop] = norm
    for _ in range(12 if kind == "extreme eigenvector" else 0):
        v.data = hessian_product(reference_model.module, reference_spy, v.data)
        v.scale_(1 / v.norm())
    v.scale_(1 / v.norm())
    exact = hessian_product(reference_model.module, reference_spy, v.data)
    single = model.space.wrap(v.data.float())

    def error(step: float | Literal["auto"]) -> float:
        return error_of(FiniteDifferenceHessian(gradient, "central", step).matvec(single), exact)

    best = min(error(float(step)) for step in np.logspace(-4.5, 0, 19))
    assert error("auto") < 4 * best


def test_noise_far_above_an_earlier_vectors_is_taken_for_derivatives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured on SmolLM2: ten times too wide the contrast is 5, as if resolved, but the noise 2000 times a random v's."""
    wide = step_size.Differences(3.2e-3, 0.1975, 4.8e7, 1400.0, 5.2)
    narrow = step_size.Differences(1.4e-4, 1.0e-4, 6.2e7, 1400.0, 1.4)
    spread = step_size.Concentration(1.0, 500.0)

    def calibrated(*answers: step_size.Differences, after: step_size.Differences | None = None) -> float:
        controller = step_size.StepController("central", 0.1, torch.float32)
        queue = [*([after] if after else []), *answers]
        monkeypatch.setattr(step_size, "measure", lambda *_: queue.pop(0))
        for _ in range(1 + bool(after)):
            found = controller.calibrate(spread, lambda eps: None, lambda: None)  # type: ignore
        assert not queue
        return found.step

    resolved = step_size.Differences(1.0, 1.17e-4, 4e-4, 0.3, 2.0)
    assert calibrated(wide, narrow, after=resolved) < 3e-4  # 4.5e-4 off the exact product
    assert calibrated(wide) > 2e-3  # nothing to compare with: 4.9e-2 off


class _Quadratic(nn.Module):
    """Curvature 2 on a few parameters near 0, none on the many others, which are stored near 1."""

    def __init__(self) -> None:
        super().__init__()
        self.sharp = nn.Parameter(torch.full((4,), 1e-3))
        self.flat = nn.Parameter(torch.linspace(1.0, 1.9, 40_000))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.sharp - x).square().sum() + self.flat.sum()


@pytest.mark.parametrize("scheme", ["central", "forward"])
def test_a_step_that_storing_would_lose_elsewhere_does_not_inflate_the_product(scheme: Scheme) -> None:
    """Half of |v|^2 lies on entries whose step is below their spacing: dividing by what is left would double H v."""
    model = whole_model(_Quadratic())
    gradient = Gradient(model, CallableObjective([torch.zeros(4)], lambda m, x: m(x), model.module))
    v = model.space.zeros()
    v.data[:40_000] = math.sqrt(0.5 / 40_000)  # "flat" comes first
    v.data[40_000:] = math.sqrt(0.5 / 4)
    eps = 1e-5  # 3.5e-8 on an entry of "flat", where the spacing is 1.2e-7
    operator = FiniteDifferenceHessian(gradient, scheme, eps)
    product = operator.matvec(v)
    assert float(product.data[40_000:].mean()) == pytest.approx(2 * math.sqrt(0.5 / 4), rel=0.02)
    assert operator.records[-1].realised == pytest.approx(1, abs=0.02)
