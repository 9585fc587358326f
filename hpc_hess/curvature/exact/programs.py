"""The functions of a model's stages, each traced and compiled once for all layers that are alike.

A function is traced through jvp, vjp and vmap to a graph of elementary operations, which Inductor compiles. Layers are alike
where their forward passes are the same graph with the same constants; parameters, buffers and all else they read are
arguments. Compiled programs are files under the digest of their graph: steps, probes, ranks and later runs share them.
What cannot be traced or compiled, or comes out differently, is computed as without this module, and the notes say why.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from hpc_hess.curvature.exact.ports import Mapped, Single, Together
from hpc_hess.curvature.exact.self_check import disagreement
from hpc_hess.curvature.exact.stages import Stage, Tree, Work
from hpc_hess.errors import first_line
from hpc_hess.parallel import devices

Kernels = Callable[[], AbstractContextManager[Any]]

MOST_SHAPES = 6  # programs of one function; of further shapes it is computed without compiling
_CONSTANTS = (bool, int, float, str, type(None), torch.dtype, torch.device)


class UntraceableError(Exception):
    """A function that cannot become a graph; says why."""


@dataclass
class _Entry:
    """A function for tensors of certain shapes: how it is computed, and what its results are."""

    plainly: Together
    structures: list[Any]  # of the shared and the single results
    program: Together | None = None


class Programs:
    """Runs the functions of stages: compiled.

    Parameters
    ----------
    kernels : a context in which the model's operations have derivatives. vmap leaves the caller's own behind.
    directory : of the files; None: nothing is kept.
    notes : sentences for the log are added to it.

    Attributes
    ----------
    compiled, loaded : programs compiled here, and those taken from files.
    seconds : spent on tracing, compiling and loading.

    """

    def __init__(self, kernels: Kernels, directory: Path | None, notes: list[str]) -> None:
        self._kernels, self._directory, self._notes = kernels, directory, notes
        self._kinds: dict[str, Hashable] = {}
        self._untraceable: set[Hashable] = set()
        self._entries: dict[Hashable, _Entry] = {}
        self._shapes: dict[Hashable, int] = {}
        self._reasons: set[str] = set()
        self.compiled = self.loaded = 0
        self.seconds = 0.0

    def __call__(self, port: Single | Mapped, work: Work, shared: Tree, each: Tree) -> tuple[Tree, Tree]:
        """Return what ``work``'s function does, for all directions of ``port``."""
        (common, shared_form), (own, each_form) = tree_flatten(shared), tree_flatten(each)
        forms = shared_form, each_form
        others = [t for t in [*common, *own] if not isinstance(t, torch.Tensor)]
        if strange := [t for t in others if not isinstance(t, _CONSTANTS)]:
            self._note(work.stage.title, f"it takes a {type(strange[0]).__name__}")
            return work.function(shared, each)
        constants = tuple(map(repr, others))
        tensors = [t for t in common if isinstance(t, torch.Tensor)]
        single = [t for t in own if isinstance(t, torch.Tensor)]
        found: list[_Entry] = []

        def run(tensors: list[torch.Tensor], stacked: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
            tensors, stacked = ([t.contiguous() for t in ts] for ts in (tensors, stacked))
            with self._kernels(), unseen():
                key = (self._kind(work.stage, tensors, shared), work.role, str(forms), constants)
                key += _signature(tensors, stacked)
                if key not in self._entries:
                    self._entries[key] = self._make(work, common, own, forms, tensors, stacked, key)
                found.append(self._entries[key])
            if found[0].program is not None:
                return found[0].program(tensors, stacked)
            with self._kernels():
                return found[0].plainly(tensors, stacked)

        results = port.call(run, tensors, single)
        return tuple(_filled(form, rs) for form, rs in zip(found[0].structures, results, strict=True))  # type: ignore[return-value]

    # -- making ------------------------------------------------------------------------------------------------------

    def _make(
        self, work: Work, common: list[Any], own: list[Any], forms: Any, tensors: Any, stacked: Any, key: Any
    ) -> _Entry:
        began = time.perf_counter()
        structures: list[Any] = []
        plainly = _together(work, common, own, forms, structures)
        entry = _Entry(plainly, structures)
        family, title = key[:2], f"{work.stage.title}, {work.role}"
        self._shapes[family] = self._shapes.get(family, 0) + 1
        try:
            if key[0] in self._untraceable:
                return entry  # said already
            if self._shapes[family] > MOST_SHAPES:
                raise UntraceableError(f"more than {MOST_SHAPES} shapes of its tensors")
            graph = traced(
                lambda *ts: _flat(plainly(list(ts[: len(tensors)]), list(ts[len(tensors) :]))), *tensors, *stacked
            )
            graph, constants = constants_as_inputs(graph)
            program = self._compiled(graph, [*tensors, *stacked, *constants])
            reference = plainly(tensors, stacked)
            count = len(reference[0])

            def run(tensors: list[torch.Tensor], stacked: list[torch.Tensor]) -> Any:
                out = program(*tensors, *stacked, *constants)
                return list(out[:count]), list(out[count:])

            if wrong := disagreement([t for ts in run(tensors, stacked) for t in ts], [t for ts in reference for t in ts]):
                raise UntraceableError(f"the compiled program is off by {wrong:.0e}")
            entry.program = run
        except Exception as error:  # whatever a compiler raises, there is another way
            self._note(title, first_line(error))
        finally:
            self.seconds += time.perf_counter() - began
        return entry

    def _kind(self, stage: Stage, tensors: list[torch.Tensor], shared: Tree) -> Hashable:
        """Return what layers that are alike have in common."""
        if stage.title not in self._kinds:
            began = time.perf_counter()
            inputs = (*shared[:3],)
            leaves, form = tree_flatten(inputs)
            given = iter(tensors)
            places = [isinstance(leaf, torch.Tensor) for leaf in leaves]
            plain = [next(given) for here in places if here]

            def forward(*ts: torch.Tensor) -> Any:
                values = iter(ts)
                full, rest, x = tree_unflatten(
                    [next(values) if here else leaf for leaf, here in zip(leaves, places, strict=True)], form
                )
                return list(stage.f(dict(zip(stage.names, full, strict=True)), rest, x))

            try:
                self._kinds[stage.title] = digest(traced(forward, *plain))
            except Exception as error:  # a stage may do anything
                self._kinds[stage.title] = stage.title
                self._untraceable.add(stage.title)
                self._note(stage.title, first_line(error))
            self.seconds += time.perf_counter() - began
        return self._kinds[stage.title]

    def _compiled(self, graph: fx.GraphModule, tensors: list[torch.Tensor]) -> Callable[..., Any]:
        """Return the compiled graph, from its file where there is one. One process at a time compiles it."""
        if self._directory is None:
            self.compiled += 1
            return compile_graph(graph, tensors, None)
        name = digest(graph, _signature(tensors), torch.__version__, _machine(tensors))
        path = self._directory / f"{name}.program"
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_suffix(".lock")):
                if path.exists() and (program := _loaded(path)) is not None:
                    self.loaded += 1
                    return program
                self.compiled += 1
                return compile_graph(graph, tensors, path)
        except OSError as error:
            self._notes.append(
                f"compiled programs are not kept in {self._directory} ({first_line(error)}): set operator.programs to a "
                "directory that can be written"
            )
            self._directory = None
            return self._compiled(graph, tensors)

    def _note(self, title: str, reason: str) -> None:
        if reason not in self._reasons:  # the same holds for the layers after it
            self._reasons.add(reason)
            self._notes.append(f"{title}: not compiled ({reason})")


def _together(work: Work, common: list[Any], own: list[Any], forms: Any, structures: list[Any]) -> Together:
    """Return ``work``'s function of lists of tensors, for all directions; it leaves its results' structures behind."""
    shared_form, each_form = forms
    shared_places, each_places = ([isinstance(t, torch.Tensor) for t in leaves] for leaves in (common, own))
    shared_constants, each_constants = ([None if isinstance(t, torch.Tensor) else t for t in ts] for ts in (common, own))

    def fill(form: Any, places: list[bool], constants: list[Any], tensors: list[torch.Tensor]) -> Tree:
        values = iter(tensors)
        return tree_unflatten([next(values) if here else c for here, c in zip(places, constants, strict=True)], form)

    def run(tensors: list[torch.Tensor], stacked: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        shared = fill(shared_form, shared_places, shared_constants, tensors)
        results: list[list[torch.Tensor]] = []

        def once(each: list[torch.Tensor], port: Single | Mapped) -> None:
            out = work.function(shared, fill(each_form, each_places, each_constants, each))
            structures[:] = [_structure(tree) for tree in out]
            for tree in out:
                if tensors := _tensors(tree):
                    port.collect(results.append, tensors)
                else:
                    results.append([])

        def mapped(index: torch.Tensor, *each: torch.Tensor) -> torch.Tensor:
            once(list(each), Mapped(index))
            return index

        if stacked and stacked[0].shape[0] > 1:
            torch.vmap(mapped)(torch.arange(stacked[0].shape[0], device=stacked[0].device), *stacked)
        else:
            once([t[0] for t in stacked], Single())
        return [t[0] for t in results[0]], results[1]

    return run


# -- trees of tensors and constants ------------------------------------------------------------------------------------


def _tensors(tree: Tree) -> list[torch.Tensor]:
    return [t for t in tree_flatten(tree)[0] if isinstance(t, torch.Tensor)]


def _structure(tree: Tree) -> tuple[list[bool], Any]:
    leaves, form = tree_flatten(tree)
    return [isinstance(leaf, torch.Tensor) for leaf in leaves], form


def _filled(structure: tuple[list[bool], Any], tensors: list[torch.Tensor]) -> Tree:
    places, form = structure
    values = iter(tensors)
    return tree_unflatten([next(values) if here else None for here in places], form)


def _flat(results: tuple[list[torch.Tensor], list[torch.Tensor]]) -> list[torch.Tensor]:
    return [*results[0], *results[1]]


def _signature(*lists: list[torch.Tensor]) -> tuple[Any, ...]:
    return tuple(tuple((tuple(t.shape), t.dtype, t.device.type) for t in ts) for ts in lists)


# -- graphs ------------------------------------------------------------------------------------------------------------


def traced(f: Callable[..., Any], *tensors: torch.Tensor) -> fx.GraphModule:
    """Return ``f`` of tensors of these shapes as a graph of elementary operations. Nothing is computed."""
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(f, tracing_mode="fake", _allow_non_fake_inputs=True)(*tensors)


def digest(graph: fx.GraphModule, *more: Any) -> str:
    """Return what tells a graph from all others: its text, its constants, and ``more``."""
    found = hashlib.sha256(repr((graph.code, more)).encode())
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            constant = getattr(graph, node.target)
            found.update(repr((node.target, constant.shape, constant.dtype)).encode())
            found.update(constant.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def constants_as_inputs(graph: fx.GraphModule) -> tuple[fx.GraphModule, list[torch.Tensor]]:
    """Return a graph that takes the constants that ``graph`` holds as its last inputs, and these: files hold none."""
    last = [node for node in graph.graph.nodes if node.op == "placeholder"][-1]
    inputs: dict[str, fx.Node] = {}
    for node in [node for node in graph.graph.nodes if node.op == "get_attr"]:
        if node.target not in inputs:
            with graph.graph.inserting_after(last):
                last = inputs[node.target] = graph.graph.placeholder(f"constant_{len(inputs)}")
            last.meta = node.meta
        node.replace_all_uses_with(inputs[node.target])
        graph.graph.erase_node(node)
    constants = [getattr(graph, name) for name in inputs]
    return fx.GraphModule({}, graph.graph), constants  # whatever a module holds would be an input


def compile_graph(graph: fx.GraphModule, tensors: list[torch.Tensor], path: Path | None) -> Callable[..., Any]:
    """Return the graph compiled by Inductor for tensors like these; it is kept in ``path``."""
    with torch._C.DisableTorchFunction(), torch.no_grad():
        program = torch._inductor.standalone_compile(graph, list(tensors), dynamic_shapes="from_example_inputs")
        if path is not None:
            unfinished = path.with_suffix(".part")  # one process at a time is here
            program.save(path=str(unfinished), format="binary")
            unfinished.replace(path)
    return program


def _loaded(path: Path) -> Callable[..., Any] | None:
    try:
        with torch._C.DisableTorchFunction():
            return torch._inductor.CompiledArtifact.load(path=str(path), format="binary")
    except Exception:  # cut short, or of another version of torch: it is made again
        return None


def unseen() -> AbstractContextManager[Any]:
    """Hide what is traced and compared from whatever counts or watches operations."""
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes()


def _machine(tensors: list[torch.Tensor]) -> str:
    """Return what a compiled program cannot be moved from."""
    device = tensors[0].device
    if device.type == "cpu":
        return f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    return f"{devices.name(device)}, {torch.get_float32_matmul_precision()}"


def why_not(device: torch.device) -> str:
    """Return why nothing can be compiled here, or ""."""
    if device.type != "cpu":
        from torch.utils._triton import has_triton

        return "" if has_triton() else "Triton is missing, or does not know this device"
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception:  # it has several, of its own
        return "there is no C++ compiler (install g++, or set CXX)"
    return ""


def default_directory() -> Path:
    """Return where compiled programs are kept unless one says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hpc_hess" / "programs"
