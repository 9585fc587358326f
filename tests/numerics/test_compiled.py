"""Compiled stages: the same numbers, one program for all layers that are alike, files that other runs share."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

from hpc_hess.curvature.exact import programs
from hpc_hess.curvature.exact.exact import ExactHessian, StreamedOperator
from hpc_hess.curvature.exact.gauss_newton import EmpiricalFisher, GaussNewton, Residual
from hpc_hess.curvature.exact.repaying import Repaying
from hpc_hess.curvature.exact.streaming import Settings
from hpc_hess.model.blocks import attention
from hpc_hess.parallel.world import World
from tests.support.exact_case import ToyBlock, ToyLM, case, error, micro_batches, objective, vectors, widened
from tests.support.exact_case import whole_model as whole

PROGRAMS = 6  # there, back and the loss, for the shapes of two micro-batches


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the graphs operation by operation: what is tested is what they compute, not the compiler."""
    monkeypatch.setattr(programs, "compile_graph", lambda graph, tensors, path: graph)


def of(operator: StreamedOperator) -> programs.Programs:
    found = operator.repaying._programs
    assert found is not None
    return found


def about_compiling(operator: StreamedOperator) -> list[str]:
    return [note for note in operator.notes if "compiled" in note]


def llama(directory: Path | None) -> tuple[ExactHessian, Callable[[], float]]:
    """Return a product that is compiled, and what gives its error."""
    model, loss = case("llama")
    (v,) = vectors(model, 1)
    with widened():
        expected = ExactHessian(model, loss).matvec(v)
    operator = ExactHessian(model, loss, settings=Settings(compile="on", programs=directory))
    return operator, lambda: error(operator.matvec(v), expected.data)


def test_programs_give_the_same_numbers_and_are_shared_through_files(tmp_path: Path) -> None:
    for made in ((PROGRAMS, 0), (0, PROGRAMS)):
        operator, wrong = llama(tmp_path)
        assert wrong() < 1e-6  # the model's own float32
        assert (of(operator).compiled, of(operator).loaded) == made
        assert not about_compiling(operator)
    (tmp_path / next(f.name for f in tmp_path.glob("*.program"))).write_bytes(b"cut short")
    operator, wrong = llama(tmp_path)
    assert wrong() < 1e-6
    assert (of(operator).compiled, of(operator).loaded) == (1, PROGRAMS - 1)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("llama_untied", ExactHessian),
        ("llama_untied", GaussNewton),
        ("llama_untied", Residual),
        ("llama_untied", EmpiricalFisher),
        ("gpt2", ExactHessian),
        ("gpt_neox", ExactHessian),
        ("gemma2", ExactHessian),
        ("gpt_oss", ExactHessian),
    ],
)
@pytest.mark.usefixtures("uncompiled")
def test_graphs_compute_what_the_model_does(name: str, kind: type[StreamedOperator]) -> None:
    model, loss = case(name)
    vs = vectors(model, 2)
    operator = kind(model, loss, settings=Settings(compile="on"))
    expected = kind(model, loss).matmat(vs)
    found = [*operator.matmat(vs), operator.matvec(vs[0])]
    assert max(error(f, e.data) for f, e in zip(found, [*expected, expected[0]], strict=True)) < 1e-14
    assert of(operator).compiled == 2 * PROGRAMS, "all layers share their programs, of two widths"
    assert not about_compiling(operator)


@pytest.mark.usefixtures("uncompiled")
def test_large_attention_is_one_node_of_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "WRITTEN_OUT", 0)
    graphs: list[fx.GraphModule] = []
    monkeypatch.setattr(programs, "compile_graph", lambda graph, *_: graphs.append(graph) or graph)
    operator, wrong = llama(None)
    assert wrong() < 1e-6
    assert not about_compiling(operator)
    calls = [str(node.target) for graph in graphs for node in graph.graph.nodes if "hpc_hess.attention" in str(node.target)]
    assert len(calls) == 2 * (1 + 2), "there: value and tangent; back: these and their pull; of two shapes"


@pytest.mark.parametrize(
    "settings",
    [
        Settings(way="reverse"),
        Settings(keep_state=True),
        Settings(boundaries_on_host=True),
        Settings(logit_budget=2000, projections="all"),
        Settings(projections="none"),
    ],
    ids=["reverse", "keep state", "host", "chunks, all products", "no product"],
)
@pytest.mark.usefixtures("uncompiled")
def test_every_setting(settings: Settings) -> None:
    model, _ = case("llama", include=["*layers*", "*norm*"])
    vs, loss = vectors(model, 2), objective(micro_batches(2, 6)[:1])
    for kind in (ExactHessian, GaussNewton):
        expected = kind(model, loss).matmat(vs)
        operator = kind(model, loss, settings=Settings(**{**vars(settings), "compile": "on"}))
        assert max(error(f, e.data) for f, e in zip(operator.matmat(vs), expected, strict=True)) < 1e-13
        assert not about_compiling(operator)


class _Scaled(ToyBlock):
    """A block whose constants tell it from the others."""

    def __init__(self, factor: float, shift: float) -> None:
        super().__init__()
        self.factor, self.shift = factor, torch.tensor(shift)
        self.register_buffer("bias", torch.full((8,), shift))

    def forward(self, x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        return super().forward(x, *others) * self.factor + self.shift * x + self.bias * x


@pytest.mark.usefixtures("uncompiled")
def test_layers_that_differ_in_a_constant_are_told_apart() -> None:
    torch.manual_seed(0)
    blocks = [_Scaled(1.0, 0.5), _Scaled(1.0, 0.5), _Scaled(0.7, 0.5), _Scaled(1.0, 0.25)]
    model, loss = whole(ToyLM(blocks).double()), objective(micro_batches(2, 6))
    (v,) = vectors(model, 1)
    expected = ExactHessian(model, loss).matvec(v)
    operator = ExactHessian(model, loss, settings=Settings(compile="on"))
    assert error(operator.matvec(v), expected.data) < 1e-14
    kinds = of(operator)._kinds
    assert len({kinds[f"block {i}"] for i in range(4)}) == 3
    assert not about_compiling(operator)


class _Undecided(ToyBlock):
    def forward(self, x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        out = super().forward(x, *others)
        return out if bool((x > 100.0).any()) else 2.0 * out


@pytest.mark.usefixtures("uncompiled")
def test_what_cannot_be_traced_is_computed_as_it_is_written() -> None:
    model, loss = whole(ToyLM([_Undecided(), ToyBlock()]).double()), objective(micro_batches(2, 6))
    (v,) = vectors(model, 1)
    operator = ExactHessian(model, loss, settings=Settings(compile="on"))
    assert error(operator.matvec(v), ExactHessian(model, loss).matvec(v).data) < 1e-14
    (note,) = about_compiling(operator)
    assert note.startswith("block 0: not compiled (")


def _raises(*_: Any) -> Any:
    raise RuntimeError("InductorError: out of disk")


def _wrong(graph: fx.GraphModule, *_: Any) -> Any:
    return lambda *tensors: [1.5 * t for t in graph(*tensors)]


@pytest.mark.parametrize(
    ("compiler", "said"), [(_raises, "InductorError: out of disk"), (_wrong, "the compiled program is off by 5e-01")]
)
def test_a_compiler_that_fails(monkeypatch: pytest.MonkeyPatch, compiler: Any, said: str) -> None:
    monkeypatch.setattr(programs, "compile_graph", compiler)
    operator, wrong = llama(None)
    assert wrong() < 1e-6
    assert about_compiling(operator)[0] == f"block 0, there, keeping narrow: not compiled ({said})"


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", _raises)
    operator, wrong = llama(None)
    assert wrong() < 1e-6
    reason = "there is no C++ compiler (install g++, or set CXX)"
    assert about_compiling(operator) == [f"exact products are not compiled: {reason}"]


@pytest.mark.usefixtures("uncompiled")
def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    operator, wrong = llama(tmp_path / "file" / "programs")
    assert wrong() < 1e-6
    (note,) = about_compiling(operator)
    assert note.startswith(f"compiled programs are not kept in {tmp_path / 'file' / 'programs'} (")
    assert of(operator).compiled == PROGRAMS


@pytest.mark.usefixtures("uncompiled")
def test_a_process_that_died_while_compiling_holds_nobody_up(tmp_path: Path) -> None:
    operator, wrong = llama(tmp_path)
    wrong()
    locks = [str(path) for path in tmp_path.glob("*.lock")]
    assert len(locks) == PROGRAMS
    lines = ["import sys, time, filelock", "held = [filelock.FileLock(path) for path in sys.argv[1:]]"]
    lines += ["[lock.acquire() for lock in held]", "print(1, flush=True)", "time.sleep(600)"]
    with subprocess.Popen([sys.executable, "-c", "\n".join(lines), *locks], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        holder.kill()
    operator, wrong = llama(tmp_path)
    assert wrong() < 1e-6
    assert of(operator).compiled == PROGRAMS


@pytest.mark.usefixtures("uncompiled")
def test_many_shapes_do_not_compile_without_end() -> None:
    model, _ = case("llama")
    (v,) = vectors(model, 1)
    batches = [b for length in range(6, 16) for b in micro_batches(2, length)[:1]]
    loss = objective(batches)
    operator = ExactHessian(model, loss, settings=Settings(compile="on"))
    assert error(operator.matvec(v), ExactHessian(model, loss).matvec(v).data) < 1e-14
    assert of(operator).compiled <= 3 * programs.MOST_SHAPES
    assert any(f"more than {programs.MOST_SHAPES} shapes" in note for note in about_compiling(operator))


class _Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def perf_counter(self) -> float:
        return self.now_s


@pytest.mark.parametrize(("products", "each_s", "after"), [(80, 9.0, 1), (0, 9.0, 34), (0, 1000.0, 1), (10, 0.1, None)])
def test_products_are_compiled_where_it_is_repaid(
    monkeypatch: pytest.MonkeyPatch, products: int, each_s: float, after: int | None
) -> None:
    """75 s of compiling against a quarter of the products that are left."""
    from hpc_hess.curvature.exact import repaying

    clock, notes = _Clock(), list[str]()
    monkeypatch.setattr(repaying, "time", clock)
    settings = Settings(compile="auto", products=products)
    weighing = Repaying(settings, World.alone(), 1, lambda: torch.no_grad(), notes)
    found = None
    for number in range(50):
        with weighing.programs(1, torch.device("cpu")) as runner:
            clock.now_s += each_s
        if runner is not None:
            found = number
            break
    assert found == after
    assert len(notes) == (after is not None)
