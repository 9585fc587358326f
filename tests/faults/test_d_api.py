"""D6, D11, H5 and H7 in the Python interface: what a call leaves behind, products that are zero, arguments."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.checkpoint import checkpoint

import hpc_hess
from hpc_hess.errors import ConfigError, HpcHessError, ModelError
from hpc_hess.linalg.operator import diagonal
from hpc_hess.linalg.solve import conjugate_gradients, minres
from hpc_hess.model.sharded.gradient import Gradient
from hpc_hess.model.sharded.loss import CausalLMObjective
from hpc_hess.model.sharded.own_loss import own_objective
from hpc_hess.model.sharded.routing import Routing
from hpc_hess.model.sharded.shard import whole_model
from tests.support.base_model import ids_b, model_b
from tests.support.known_spectra import make_space
from tests.support.toys import toy_model

METHODS = ["finite_difference", "exact"]


def mean_square(module: nn.Module, batch: Any) -> torch.Tensor:
    return mse_loss(module(batch[0]), batch[1])


# -- D6 ------------------------------------------------------------------------------------------------------------------


class Everything(nn.Module):
    """Dropout, running statistics, a list of blocks, one of them patched, hooks, a buffer that the forward writes."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)) for _ in range(2)])
        self.last = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.blocks[1].forward = self.blocks[1].forward  # set on the instance, as some libraries do
        self.blocks[0].eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.last(x)


def state(model: nn.Module) -> dict[str, Any]:
    """Return all that a call might change, by identity and value."""
    found: dict[str, Any] = {}
    for name, m in model.named_modules():
        found[f"{name}.training"] = m.training
        found[f"{name}.attributes"] = {k: v for k, v in m.__dict__.items() if not k.startswith("_") and k != "training"}
        hooks = {k: v for k, v in m.__dict__.items() if k.endswith("hooks") and hasattr(v, "__len__")}
        found[f"{name}.hooks"] = {k: len(v) for k, v in hooks.items()}
    for name, p in model.named_parameters():
        grad = None if p.grad is None else (id(p.grad), p.grad.numpy().tobytes())
        found[name] = p.requires_grad, id(p), p.detach().numpy().tobytes(), grad
    for name, b in model.named_buffers():
        found[name] = id(b), b.numpy().tobytes()
    return found


@pytest.mark.parametrize("training", [True, False])
def test_a_model_is_as_it_was_after_every_call(training: bool) -> None:
    torch.manual_seed(0)
    model = Everything().double()
    model.train(training)
    model.blocks[0].register_forward_hook(lambda module, inputs, output: output * 1.5)
    model.blocks[0][0].bias.grad = torch.ones(4, dtype=torch.float64)
    x, y, classes = torch.randn(8, 4).double(), torch.randn(8, 3).double(), torch.arange(8) % 3
    before = state(model)
    for method in METHODS:
        operator = hpc_hess.hessian(model, [(x, y)], mean_square, method=method, exclude=["last.bias"])  # type: ignore[arg-type]
        assert state(model) == before, method
        hpc_hess.slq(operator, steps=3)
        hpc_hess.sub_block(operator, ["last.weight[0, :]"])
        operator @ np.ones(operator.shape[0])
        hpc_hess.trace(hpc_hess.sketched(operator, 16), method="hutchinson", products=2)
        assert state(model) == before, method
    parts = hpc_hess.decompose(model, [(x, classes)], 3)
    v = torch.ones(parts.hessian.shape[0]).double()
    for part in (parts.hessian, parts.gauss_newton, parts.residual, parts.without_means, parts.within, parts.knocked_out):
        part @ v
    hpc_hess.gradient_sketches(model, [(x, y)], mean_square, dimension=16)
    assert state(model) == before
    with pytest.raises(HpcHessError):
        hpc_hess.hessian(model, [(x, y)], lambda m, b: 1 / 0)
    assert state(model) == before


def test_decompose_leaves_no_wrapper_on_a_vision_transformer() -> None:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    model = ViTForImageClassification(
        ViTConfig(
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=8,
            image_size=4,
            patch_size=2,
            num_channels=1,
            num_labels=4,
        )
    ).double()
    before = state(model)
    x, classes = torch.randn(6, 1, 4, 4).double(), torch.arange(6) % 4
    parts = hpc_hess.decompose(model, [(x, classes)], 4)
    assert state(model) == before
    pickle.dumps(model)
    copy.deepcopy(model)
    v = torch.randn(parts.hessian.shape[0], dtype=torch.float64)
    other = hpc_hess.hessian(model, [(x, classes)], lambda m, b: cross_entropy(m(b[0]).logits, b[1]))
    assert torch.allclose(parts.hessian @ v, other @ v, rtol=1e-5, atol=1e-8)
    assert torch.allclose(parts.gauss_newton @ v + parts.residual @ v, parts.hessian @ v, rtol=1e-9, atol=1e-12)


def test_frozen_routing_is_there_while_a_gradient_is_computed_only() -> None:
    model = toy_model("mixtral", dtype=torch.float64)
    before = state(model)
    for _ in range(3):
        operator = hpc_hess.hessian(model, [ids_b()])
        assert state(model) == before
    operator @ np.ones(operator.shape[0])
    assert state(model) == before
    sharded, routing = whole_model(model), Routing(model, "frozen")
    objective: CausalLMObjective = own_objective([ids_b()], model, torch.device("cpu"))[0]
    gradient = Gradient(sharded, objective, routing)
    gradient.at_theta0()
    assert routing.has_router
    assert state(model) == before
    routing.attach()
    assert all("forward" in block.__dict__ for block in model.model.layers)
    routing.detach()
    assert state(model) == before


def test_a_forward_that_was_replaced_is_the_one_that_counts() -> None:
    """By instance attribute, as steering and some adapters do; and blocks that are recomputed."""
    model = model_b().double()
    block = model.model.layers[0]
    plain = block.forward
    block.forward = lambda *args, **kwargs: 1.5 * plain(*args, **kwargs)
    before = state(model)
    exact, differences = (hpc_hess.hessian(model, [ids_b()], method=m) for m in ("exact", "finite_difference"))  # type: ignore[arg-type]
    v = torch.randn(exact.shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found, expected = exact @ v, differences @ v
    assert float((found - expected).norm()) < 1e-6 * float(expected.norm())
    assert state(model) == before
    with pytest.raises(ModelError, match="forwards were replaced"):
        hpc_hess.hessian(model, [ids_b()], method="exact", kind="fisher")


def test_differences_see_through_reentrant_checkpointing() -> None:
    class Recomputed(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(checkpoint(super().forward, x.clone().requires_grad_(), use_reentrant=True))

    torch.manual_seed(0)
    model, x = Recomputed(3, 2).double(), torch.randn(5, 3).double()
    found = hpc_hess.hessian(model, [x], lambda m, b: m(b).square().mean()) @ np.ones(8)
    plain = nn.Sequential(nn.Linear(3, 2), nn.Tanh()).double()
    plain[0].load_state_dict(model.state_dict())
    expected = hpc_hess.hessian(plain, [x], lambda m, b: m(b).square().mean(), method="exact") @ np.ones(8)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert model.weight.grad is None


def test_differences_do_not_undo_what_was_trained_since() -> None:
    model = nn.Linear(3, 2).double()
    batch = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    operator = hpc_hess.hessian(model, [batch], mean_square)
    with torch.no_grad():
        model.weight += 0.1
    trained = model.weight.detach().clone()
    with pytest.raises(ConfigError, match="have changed since hessian"):
        operator @ np.ones(8)
    assert torch.equal(model.weight, trained)


# -- D11, H5 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_estimate_of_a_zero_matrix_is_zero(method: Any) -> None:
    model = nn.Linear(3, 2).double()
    operator = hpc_hess.hessian(model, [torch.randn(5, 3).double()], lambda m, b: m(b).mean(), method=method)
    scale = 1e-9 if method == "finite_difference" else 0.0
    for estimate in ("xtrace", "hutch++", "hutchinson"):
        found = hpc_hess.trace(operator, method=estimate, products=20)  # type: ignore[arg-type]
        assert abs(found.mean) <= scale
    for estimate in ("xdiag", "hutchinson"):
        mean, error = hpc_hess.diagonal(operator, method=estimate, products=20)  # type: ignore[arg-type]
        assert np.abs(mean).max() <= scale
        assert np.abs(error).max() <= scale
    spectrum = hpc_hess.slq(operator, steps=5, probes=2)
    assert max(abs(spectrum.lambda_max), abs(spectrum.lambda_min), abs(spectrum.trace.mean)) <= scale
    for axis in ("linear", "symlog", "log", "chebyshev"):
        assert np.isfinite(spectrum.density(axis=axis).mean).all()  # type: ignore[arg-type]
    pairs = hpc_hess.eigenpairs(operator, 2, tolerance=1e-3)
    assert np.abs(pairs.values).max() <= scale
    assert hpc_hess.solve(operator, np.ones(8), damping=0.5).x == pytest.approx(2.0)
    assert np.abs(hpc_hess.sub_block(operator, ["*"])).max() <= scale


@pytest.mark.parametrize("method", METHODS)
def test_parameters_that_the_loss_does_not_reach(method: Any) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "idle": nn.Linear(4, 4)}).double()
    batch = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    loss = lambda m, b: mse_loss(torch.tanh(m["used"](b[0])), b[1])  # noqa: E731
    idle = hpc_hess.hessian(model, [batch], loss, method=method, include="idle.*")
    assert np.abs(idle @ np.ones(20)).max() == 0
    assert idle.notes == ["the loss of batch 0 does not depend on any of the parameters"]
    assert hpc_hess.trace(idle).mean == 0
    whole = hpc_hess.hessian(model, [batch], loss, method=method)
    assert whole.notes[-1] == "the loss of batch 0 does not depend on 20 of the 28 parameters"
    used = hpc_hess.hessian(model, [batch], loss, method=method, include="used.*")
    np.testing.assert_allclose((whole @ np.ones(28))[20:], used @ np.ones(8), atol=1e-8)
    assert (hpc_hess.gradient_sketches(model, [batch], loss, dimension=16, include="idle.*") == 0).all()


def test_no_second_derivative_of_a_zero_head() -> None:
    """B with a zero head: the loss does not depend on what is before it, and the matrix there is zero."""
    model = model_b().double()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    for method in METHODS:
        operator = hpc_hess.hessian(model, [ids_b()], method=method, include=["model.layers.0.mlp.*"])  # type: ignore[arg-type]
        assert np.abs(operator @ np.ones(operator.shape[0])).max() == 0
        assert hpc_hess.trace(operator, products=10).mean == 0


@pytest.mark.parametrize("method", METHODS)
def test_a_gradient_that_is_exactly_zero(method: Any) -> None:
    A = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)

    class Quadratic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = nn.Parameter(torch.zeros(2, dtype=torch.float64))

        def forward(self, _: Any) -> torch.Tensor:
            return 0.5 * self.x @ A @ self.x

    operator = hpc_hess.hessian(Quadratic(), [0], lambda m, b: m(b), method=method)
    np.testing.assert_allclose(np.stack([operator @ row for row in np.eye(2)]), A.numpy(), atol=1e-9)


def test_a_captured_parameter_is_seen_where_the_gradient_is_zero() -> None:
    class Captured(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = nn.Parameter(torch.zeros(2, dtype=torch.float64))
            self.kept = [self.x]

        def forward(self, _: Any) -> torch.Tensor:
            return self.kept[0].square().sum()

    with pytest.raises(ModelError, match="reads parameters elsewhere"):
        hpc_hess.hessian(Captured(), [0], lambda m, b: m(b), method="exact")


@pytest.mark.parametrize("products", [30, 60])
def test_an_exhausted_range_gives_the_trace_and_the_diagonal_exactly(products: int) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(200, 1, bias=False).double(), torch.randn(5, 200, dtype=torch.float64)
    operator = hpc_hess.hessian(model, [x], lambda m, b: (m(b) ** 2).mean(), method="exact")
    exact = 2 * (x**2).sum(0) / 5
    found = hpc_hess.trace(operator, products=products)
    assert found.mean == pytest.approx(float(exact.sum()), rel=1e-12)
    assert found.stderr == 0
    mean, error = hpc_hess.diagonal(operator, products=products)
    np.testing.assert_allclose(mean, exact, rtol=1e-10)
    assert np.abs(error).max() == 0


def test_signs_that_a_matrix_loses_are_not_taken_for_zero() -> None:
    model, x = nn.Linear(2, 1, bias=False).double(), torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    operator = hpc_hess.hessian(model, [x], lambda m, b: (m(b) ** 2).mean(), method="exact")  # 2 [[1, -1], [-1, 1]]
    for seed in range(12):
        mean, error = hpc_hess.diagonal(operator, products=16, seed=seed)
        assert np.abs(mean - 2).max() <= 4 * error.max() + 1e-9, seed


# -- H7 ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def operator() -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    return hpc_hess.hessian(model, [(torch.randn(9, 4).double(), torch.randn(9, 2).double())], mean_square, method="exact")


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("trace", {"method": "foo"}, "method = 'foo' is not one of: xtrace, hutch"),
    ("trace", {"products": 1}, "products = 1"),
    ("trace", {"products": 2.5}, "products = 2.5"),
    ("diagonal", {"method": "foo"}, "not one of: xdiag, hutchinson"),
    ("diagonal", {"products": 0}, "products = 0"),
    ("slq", {"steps": 0}, "steps = 0"),
    ("slq", {"probes": 0}, "probes = 0"),
    ("slq", {"seed": -1}, "seed = -1"),
    ("slq", {"distribution": "uniform"}, "rademacher, gaussian"),
    ("slq", {"reorthogonalise": "partial"}, "full, none"),
    ("slq", {"reorthogonalise": 0}, "reorthogonalise = 0"),
    ("eigenpairs", {"count": 0}, "count = 0"),
    ("eigenpairs", {"count": 1, "which": "top"}, "which = 'top' is not one of"),
    ("eigenpairs", {"count": 1, "tolerance": float("nan")}, "tolerance = nan"),
    ("eigenpairs", {"count": True}, "count = True"),
    ("eigenpairs", {"count": 1, "most_products": 0}, "most_products = 0"),
    ("eigenpairs", {"count": 2, "basis_size": 3}, "at least 7"),
    ("solve", {"b": np.ones(37), "damping": 1.0, "method": "lu"}, "method = 'lu' is not one of: minres, cg"),
    ("solve", {"b": np.ones(36), "damping": 1.0}, "37 entries"),
    ("solve", {"b": np.ones(37), "damping": "much"}, "damping = 'much'"),
    ("solve", {"b": np.ones(37), "damping": 1.0, "products": 0}, "products = 0"),
    ("sub_block", {"selections": ["*"], "columns": 0}, "columns = 0"),
    ("sketched", {"dimension": 16, "kind": "foo"}, "kind = 'foo'"),
    ("sketched", {"dimension": 16, "preconditioner": "foo"}, "preconditioner = 'foo'"),
]


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_arguments_that_cannot_be_meant_are_one_sentence(operator: Any, number: int) -> None:
    name, arguments, words = WRONG[number]
    with pytest.raises(ConfigError, match=words):
        getattr(hpc_hess, name)(operator, **arguments)


def test_arguments_of_hessian_and_of_a_density(operator: Any) -> None:
    with pytest.raises(ConfigError, match="axis = 'foo' is not one of: linear, symlog, log, chebyshev"):
        hpc_hess.slq(operator, steps=3).density(axis="foo")  # type: ignore[arg-type]
    model, batch = nn.Linear(3, 2).double(), (torch.randn(5, 3).double(), torch.randn(5, 2).double())
    for arguments, words in (
        ({"scheme": "backward"}, "forward, central, fourth"),
        ({"step": 0.0}, "step = 0.0"),
        ({"step": float("nan")}, "step = nan"),
        ({"loss": 3}, "loss is a int"),
        ({"kind": "foo"}, "kind = 'foo'"),
        ({"include": [3]}, "include"),
    ):
        with pytest.raises(ConfigError, match=words):
            hpc_hess.hessian(model, [batch], **{"loss": mean_square, **arguments})  # type: ignore[arg-type]
    one = hpc_hess.hessian(model, [batch], mean_square, include="weight")  # one pattern, not six letters
    assert one.shape == (6, 6)


def test_every_iterative_result_says_whether_it_converged(operator: Any) -> None:
    b = np.random.default_rng(0).standard_normal(37)
    short = hpc_hess.solve(operator, b, damping=1e-3, products=2)
    x, residuals = short
    assert x is short.x
    assert residuals is short.residuals
    assert not short.converged
    assert "not converged" in repr(short)
    long = hpc_hess.solve(operator, b, damping=1e-3, products=500, tolerance=1e-8)
    assert long.converged
    assert np.linalg.norm(operator @ long.x + 1e-3 * long.x - b) < 2e-8 * np.linalg.norm(b)
    assert not hpc_hess.eigenpairs(operator, 1, most_products=2).converged
    few, all_of_them = hpc_hess.slq(operator, steps=3), hpc_hess.slq(operator, steps=37)
    assert min(few.residuals) > 1e-6
    assert max(all_of_them.residuals) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_singular_system_has_its_least_squares_solution(dtype: torch.dtype) -> None:
    """Where b has a part that the matrix cannot give, residuals end at that part, and x stays bounded."""
    space = make_space(5, dtype)
    matrix = diagonal(space, space.wrap(torch.tensor([1.0, 2, 0, 0, 3], dtype=dtype)))
    found = minres(matrix, space.wrap(torch.ones(5, dtype=dtype)), damping=0.0, tolerance=1e-10, most=30)
    assert found.x.data[[0, 1, 4]].double().numpy() == pytest.approx([1, 1 / 2, 1 / 3], rel=1e-4)
    assert float(found.x.norm()) < 10
    assert found.converged_to == pytest.approx(np.sqrt(2 / 5), rel=1e-4)
    assert conjugate_gradients(matrix, space.wrap(torch.ones(5, dtype=dtype)), damping=1.0).converged_to < 1e-4
