"""Products in TF32: its rounding emulated, refused where no GPU has it, and in force inside products alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from benchmarks.regimes_emulated import EMULATED, round_to_tf32, rounding, split_bfloat16, truncate_to_tf32
from hpc_hess.config import Config, load_config
from hpc_hess.config.loading import TOY
from hpc_hess.console.progress import Progress
from hpc_hess.errors import LaunchError, NumericsError
from hpc_hess.parallel import devices
from hpc_hess.parallel.world import World
from hpc_hess.session.operators import exact_operator, reference_operator, wants_reference, what_is_computed
from hpc_hess.session.problem import load_problem

U = 2.0**-10  # the spacing of tf32 numbers in [1, 2)


@pytest.mark.parametrize(
    ("value", "nearest", "truncated"),
    [
        (1 + U, 1 + U, 1 + U),
        (1 + 0.5 * U, 1, 1),  # a tie, to even
        (1 + 1.5 * U, 1 + 2 * U, 1 + U),
        (1 + 0.5 * U + 2.0**-23, 1 + U, 1),
        (-1 - 0.75 * U, -1 - U, -1),
        (2 - 2.0**-23, 2, 2 - U),  # up into the next binade
        (0.0, 0.0, 0.0),
        (float("inf"), float("inf"), float("inf")),
    ],
)
def test_rounding_to_tf32(value: float, nearest: float, truncated: float) -> None:
    x = torch.tensor([value])
    assert float(round_to_tf32(x)) == nearest
    assert float(truncate_to_tf32(x)) == truncated


def test_bfloat16_terms_of_a_number() -> None:
    x = torch.tensor([1 + 2.0**-9 + 2.0**-20])
    assert [float(t) for t in split_bfloat16(x, 3)] == [1.0, 2.0**-9 + 2.0**-20 - 2.0**-20, 2.0**-20]


def test_every_matrix_product_is_rounded_forth_and_back() -> None:
    raw = 1 + 0.75 * U
    a, b, bias = (torch.full((2, 2), raw, requires_grad=True) for _ in range(3))
    rounded = 2 * (1 + U) ** 2
    with rounding("tf32 (emulated)"):
        for product in (a @ b, torch.bmm(a[None], b[None]), torch.einsum("ij,jk->ik", a, b)):
            assert bool((product == rounded).all())
        for total in (torch.addmm(bias, a, b), torch.nn.functional.linear(a, b, bias[0])):  # the bias is not an operand
            assert bool(((total - rounded - raw).abs() < 1e-6).all())
        (a @ b).backward(torch.ones(2, 2))
        with pytest.raises(NotImplementedError, match="not rounded"):
            torch.nn.functional.conv1d(torch.ones(1, 1, 3), torch.ones(1, 1, 1))
    assert a.grad is not None
    assert bool((a.grad == 2 * (1 + U)).all())
    assert bool(((a @ b) - 2 * raw**2).abs().max() < 1e-6)


def test_errors_of_the_formats() -> None:
    """Operands lose half a spacing at most, 2^-11 of themselves: a sum of 512 products about 2^-11 * sqrt(2 / 6)."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(512, 512, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    errors = {}
    for name in EMULATED:
        with rounding(name):
            errors[name] = float(((a @ b) - exact).norm() / exact.norm())
    assert 2e-4 < errors["tf32 (emulated)"] < 4e-4
    assert 1.5 < errors["tf32, truncated (emulated)"] / errors["tf32 (emulated)"] < 4
    assert errors["bf16x3 (emulated)"] < 1e-5
    assert errors["bf16x6 (emulated)"] < 1e-6


# -- the program's own -------------------------------------------------------------------------------------------------


def _config(*more: str) -> Config:
    return load_config(
        TOY, ["operator.method=exact", "model.master_dtype=float32", "model.compute_dtype=tf32", "data.sequences=1", *more]
    )


def test_without_tensor_cores_it_ends_with_a_sentence() -> None:
    with pytest.raises(LaunchError, match='a CPU: set model.compute_dtype = "float32"') as ended:
        load_problem(_config(), World.alone("cpu"), Progress(0))
    assert "\n" not in str(ended.value)


def test_which_gpus_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    for kind, major, there in (("cuda", 8, True), ("cuda", 7, False), ("xpu", 9, False)):
        found = SimpleNamespace(name="Pretended 1", major=major)
        monkeypatch.setattr(devices, "_properties", lambda device, found=found: found)
        if there:
            devices.require_tf32(torch.device(kind, 0))
            continue
        with pytest.raises(LaunchError, match='set model.compute_dtype = "float32"'):
            devices.require_tf32(torch.device(kind, 0))
    monkeypatch.setattr(torch.version, "hip", "6.0")  # AMD's go by the same name
    with pytest.raises(LaunchError, match="another GPU"):
        devices.require_tf32(torch.device("cuda", 0))


def test_it_is_in_force_inside_products_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "require_tf32", lambda device: None)  # a CPU, taken for a GPU that has it
    config = _config()
    problem = load_problem(config, World.alone("cpu"), Progress(0))
    operator = exact_operator(config, problem)
    assert problem.space.dtype == torch.float32
    seen = []
    forward = torch.nn.Linear.forward

    def watched(self: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        seen.append(torch.get_float32_matmul_precision())
        return forward(self, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", watched)
    v = problem.space.wrap(torch.ones(problem.space.size_local))
    operator.matvec(v)
    assert set(seen) == {"high"}
    assert torch.get_float32_matmul_precision() == "highest"
    assert wants_reference(config)
    assert what_is_computed(config, problem).endswith("matrix products in tf32")
    seen.clear()
    problem.gradient()
    reference_operator(config, problem, 0.0, None).matvec(v)
    assert set(seen) == {"highest"}
    problem.model.local_parameters[0].fill_(float("nan"))
    with pytest.raises(NumericsError):
        operator.matvec(v)
    assert torch.get_float32_matmul_precision() == "highest"
