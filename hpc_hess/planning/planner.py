"""A run as one of its ranks would live it, traced without a GPU, without the other ranks, without weights and data.

The program is the real one (same sharding, same operator, same vectors) on fake tensors and a fake process group.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hpc_hess.config import Config, make_config
from hpc_hess.curvature.differences.finite_difference import FiniteDifferenceHessian
from hpc_hess.curvature.exact.exact import StreamedOperator
from hpc_hess.curvature.exact.self_check import Choice
from hpc_hess.curvature.operators import Point, built, exact_product
from hpc_hess.errors import ConfigError
from hpc_hess.intake.choices import Choices
from hpc_hess.intake.findings import Intake, unchecked
from hpc_hess.linalg.lanczos import basis_rows
from hpc_hess.linalg.operator import LinearOperator, products
from hpc_hess.model.data.data import without_numbers
from hpc_hess.model.sharded.accumulation import Unwatched
from hpc_hess.model.sharded.gradient import Gradient
from hpc_hess.model.sharded.loss import LabelObjective, TokenObjective
from hpc_hess.model.sharded.routing import Routing
from hpc_hess.model.sharded.shard import checkpoint_blocks, shard_model
from hpc_hess.model.sharded.skeleton import build_skeleton, text_config
from hpc_hess.model.sources.hub import reaching
from hpc_hess.model.sources.source import Source, resolve_source
from hpc_hess.parallel import kernels
from hpc_hess.parallel.pretend import pretending
from hpc_hess.parallel.shared_memory import half_bytes
from hpc_hess.parallel.vector import Vector
from hpc_hess.planning.machine import Machine
from hpc_hess.planning.plan import Plan, Trace, make_plan, nodes_needed
from hpc_hess.planning.tracing import Tracer, Work
from hpc_hess.session.memory_budget import basis_dtype, lock_step
from hpc_hess.session.operators import needs_gradient, spec_of, streaming_settings, wants_reference
from hpc_hess.session.problem import dtype_of

_MOST_NODES = 4096  # that a search looks at
_CALIBRATION_VECTORS = 3  # that step_size.measure holds beside what a product holds: fourth, truncated, slope


class _Differences(FiniteDifferenceHessian):
    """Finite differences whose step is stored without loss: fake numbers would tell nothing."""

    def _move(self, v: Vector, factor: float, norm: float, *, dither: bool = False) -> tuple[float, bool]:
        self.gradient.model.move_parameters(self.theta0, v.data, factor)
        return factor * norm * norm, False

    def _look(self, before: Choices | None = None) -> Choices | None:
        return None


def _calibrates(config: Config) -> bool:
    return config.operator.method == "finite_difference" and config.operator.step == "auto"


def num_experts(hf_config: Any) -> int:
    """Return the experts of each layer, 1 for a dense model."""
    text = text_config(hf_config)
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    return next((n for n in (getattr(text, name, None) for name in names) if isinstance(n, int) and n > 0), 1)


def _source(config: Config) -> Source:
    """Find the model; of one of the Hub that is not here, the configuration alone is downloaded. Raises ModelError."""
    with reaching("small"):
        return resolve_source(config.model)


def trace(config: Config, ranks: int, local_ranks: int, *, gloo: bool = False) -> Trace:
    """Trace one product of ``config`` on ``ranks`` ranks, ``local_ranks`` of them on a node. Collective: no.

    Raises
    ------
    ModelError, LayoutError, LaunchError : as the run itself would.

    """
    source = _source(config)
    skeleton = build_skeleton(source, config.model)
    plain = copy.deepcopy(skeleton) if ranks > 1 else None
    tracer = Tracer(num_experts(source.hf_config))
    replicate = config.parallel.replicate
    with (
        contextlib.nullcontext() if gloo else kernels.as_on_gpu(),
        pretending(ranks, local_ranks, gloo=gloo, replicate=replicate) as world,
        FakeTensorMode(allow_non_fake_inputs=True),
        tracer,
    ):
        with tracer.category("shared windows"):
            on_one_node = gloo and 1 < ranks <= local_ranks
            windows = torch.empty(2 * half_bytes(ranks) * ranks if on_one_node else 0, dtype=torch.uint8)
        with tracer.category("parameters"):
            model = shard_model(
                skeleton,
                world,
                include=config.parameters.include,
                exclude=config.parameters.exclude,
                master_dtype=dtype_of(config.model.master_dtype),
                compute_dtype=dtype_of(config.model.compute_dtype),
            )
        objective = _objective(config, ranks, source.hf_config, world.device)
        routing = Routing(model.module, config.operator.routing)
        routing.attach()
        gradient = Gradient(model, objective, routing)
        if config.model.activation_checkpointing:
            checkpoint_blocks(model.module)
        watch = _MicroBatches(tracer)
        width = lock_step(config.lanczos, config.operator.method == "exact")
        with tracer.category("vectors"):
            base = model.space.zeros() if needs_gradient(config) else None
            point = Point(1.0, base, model)
            operator = built(spec_of(config), _product(config, gradient, objective, plain, watch, base), point)
            vectors = [model.space.zeros() for _ in range(width)]
        with tracer.category("calibration"):
            spare = [model.space.zeros() for _ in range(_CALIBRATION_VECTORS if _calibrates(config) else 0)]
        with tracer.category("products"), tracer.stretch() as product:
            found = products(operator, vectors)
        del spare
        peak = product.peak
        if wants_reference(config) and isinstance(objective, TokenObjective):
            with tracer.category("vectors"):
                exact = _exact(config, gradient, objective, plain, config.model.master_dtype)
                reference = built(spec_of(config), exact, point)
            with tracer.category("products"), tracer.stretch() as check:
                found += products(reference, vectors[:1])
            peak = max(peak, check.peak, key=lambda peak: peak.bytes)
        del windows
        count = -(-config.data.sequences // (ranks * config.data.micro_batch))
        whole = product.work - watch.work * watch.calls + watch.work * (watch.calls * count)
        rows = basis_rows(config.lanczos.reorthogonalise, config.lanczos.steps)
        dtype = basis_dtype(config.lanczos, model.space.dtype)
        return Trace(
            source.name,
            model.layout.num_params,
            model.space.size_local,
            ranks,
            min(ranks, local_ranks),
            count,
            objective.micro_batches[0].size,
            config.operator.method,
            width,
            rows,
            model.space.size_local * dtype.itemsize,
            model.space.dtype.itemsize,
            watch.work * count,
            whole,
            peak,
        )


class Planner:
    """Plans of one configuration on nodes of ``local_ranks`` ranks with ``host_bytes`` of memory. Collective: no.

    Parameters
    ----------
    machine : what each rank computes on; see Machine.read.

    Raises
    ------
    ConfigError : there is no such machine, or no rank; a sketched operator.

    """

    def __init__(self, config: Config, local_ranks: int, machine: str, host_bytes: int) -> None:
        if local_ranks < 1:
            raise ConfigError(f"--gpus-per-node {local_ranks}: give at least one")
        if config.operator.sketched:
            raise ConfigError("a run with operator.sketched = true cannot be planned yet: plan it without")
        self.config, self._local_ranks, self._host_bytes = config, local_ranks, host_bytes
        self._machine = Machine.read(machine)

    def intake(self, say: Callable[[str], object] | None = None) -> Intake:
        """Return what the checks of the model's files find; ``say`` shows the line of each. Raises ModelError."""
        found = Intake(say)
        found.add(*_source(self.config).findings)
        found.add(unchecked("data.source", "a plan reads no data"), unchecked("model.causal", "a plan runs no forward pass"))
        return found

    def plan(self, nodes: int, config: Config | None = None) -> Plan:
        """Trace the run on ``nodes`` nodes, with another configuration if given. Raises as :func:`trace` does."""
        if nodes < 1:
            raise ConfigError(f"--nodes {nodes}: give at least one")
        config = config or self.config
        traced = trace(config, nodes * self._local_ranks, self._local_ranks, gloo=not self._machine.overlap)
        return make_plan(traced, config.lanczos, self._machine, self._host_bytes)

    def smallest(self, start: Plan) -> Plan | None:
        """Return the plan with the fewest nodes that fits, None if none is found. ``start``: any of the configuration's."""
        lacking, fitting, plan = 0, None, start
        while fitting is None or fitting.nodes - lacking > 1:
            if plan.fits:
                fitting = plan
            else:
                lacking = plan.nodes
            estimate = nodes_needed(plan)
            most = _MOST_NODES if fitting is None else fitting.nodes - 1
            if lacking >= most or estimate is None:
                break
            if not lacking < estimate <= (estimate if fitting is None else fitting.nodes):
                # it errs, as where the host's memory is what lacks
                estimate = 2 * lacking if fitting is None else (lacking + fitting.nodes) // 2
            plan = self.plan(min(max(estimate, lacking + 1), most))
        return fitting

    def suggestions(self, plan: Plan) -> list[tuple[str, Plan]]:
        """Return what would make a plan fit that does not: settings on as many nodes, and more nodes. Each was traced."""
        found = []
        changes = _changes(self.config)
        for some in [*([change] for change in changes), *([changes] if len(changes) > 1 else [])]:
            better = self.plan(plan.nodes, make_config(self.config.model_dump(), some))
            if better.fits:
                found.append((" ".join(f"--set {change}" for change in some), better))
                break
        more = self.smallest(plan)
        if more is not None:
            found.append((f"--nodes {more.nodes}", more))
        return found


def _changes(config: Config) -> list[str]:
    """Return the settings that need less memory than the configuration's, those first that cost the least time."""
    changes = []
    if config.lanczos.basis_memory != "auto":
        changes.append("lanczos.basis_memory=auto")
    if lock_step(config.lanczos, config.operator.method == "exact") > 1:
        changes.append("lanczos.lock_step=1")
    if config.data.micro_batch > 1:
        changes.append("data.micro_batch=1")
    if not config.model.activation_checkpointing and config.operator.method != "exact":  # exact ones keep one block's
        changes.append("model.activation_checkpointing=true")
    return changes


class _MicroBatches(Unwatched):
    """Counts the micro-batches of a product, and what the last one took; see model.sharded.accumulation.Watch."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer, self._open = tracer, contextlib.ExitStack()
        self.work, self.calls = Work(), 0

    def begin(self, sums: list[torch.Tensor], count: int) -> int:
        self._found = self._open.enter_context(self._tracer.stretch())
        return 0

    def added(self, index: int, sums: list[torch.Tensor], *, more: bool = True) -> None:
        self._open.close()
        self.work, self.calls = self._found.work, self.calls + 1


def _objective(config: Config, ranks: int, hf_config: Any, device: torch.device) -> LabelObjective:
    """Return rank 0's first micro-batch, without numbers. Raises ConfigError: its exact product cannot be traced."""
    rows = min(config.data.micro_batch, -(-config.data.sequences // ranks))
    objective = without_numbers(config.data, config.model, hf_config, rows, device)
    if config.operator.method == "exact" and not isinstance(objective, TokenObjective):
        raise ConfigError(
            f'exact products of model.task = "{config.model.task}" take the model as a whole, which cannot be planned: run '
            'it, or set operator.method = "finite_difference"'
        )
    return objective


def _product(
    config: Config,
    gradient: Gradient,
    objective: LabelObjective,
    plain: torch.nn.Module | None,
    watch: _MicroBatches,
    base: Vector | None,
) -> LinearOperator:
    section = config.operator
    if section.method == "exact":
        exact = _exact(config, gradient, objective, plain, config.model.compute_dtype)
        exact.follow(watch)
        return exact
    differences = _Differences(gradient, section.scheme, 1e-3, (1.0, base))
    gradient.follow(watch)
    return differences


def _exact(
    config: Config, gradient: Gradient, objective: LabelObjective, plain: torch.nn.Module | None, compute_dtype: str
) -> StreamedOperator:
    assert isinstance(objective, TokenObjective)
    return exact_product(spec_of(config))(
        gradient.model,
        objective,
        plain=plain,
        compute_dtype=dtype_of(compute_dtype),
        settings=streaming_settings(config, compile=False),
        choose=lambda *_: Choice(),
    )
