"""A run as one of its ranks would live it, traced without a GPU, without the other ranks, without weights and data.

The program is the real one (same sharding, same operator, same vectors) on fake tensors and a fake process group.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hpc_hess.config import Config
from hpc_hess.curvature.finite_difference import FiniteDifferenceHessian
from hpc_hess.curvature.self_check import Choice
from hpc_hess.errors import ConfigError
from hpc_hess.linalg.lanczos import basis_rows
from hpc_hess.linalg.operator import LinearOperator, products
from hpc_hess.model.accumulation import Unwatched
from hpc_hess.model.gradient import Gradient
from hpc_hess.model.loss import CausalLMObjective, MicroBatch
from hpc_hess.model.routing import Routing
from hpc_hess.model.shard import checkpoint_blocks, shard_model
from hpc_hess.model.skeleton import build_skeleton, vocabulary_size
from hpc_hess.model.source import resolve_source
from hpc_hess.parallel.pretend import pretending
from hpc_hess.parallel.vector import Vector
from hpc_hess.placement import MOST_IN_LOCK_STEP, basis_dtype
from hpc_hess.problem import dtype_of
from hpc_hess.products import STREAMED, streaming_settings
from hpc_hess.scaling.machine import Machine
from hpc_hess.scaling.plan import Trace, describe, make_plan
from hpc_hess.scaling.tracing import Tracer, Work

_CALIBRATION_VECTORS = 3  # that step_size.measure holds beside what a product holds: fourth, truncated, slope


class _Differences(FiniteDifferenceHessian):
    """Finite differences whose step is stored without loss: fake numbers would tell nothing."""

    def _move(self, v: Vector, factor: float, norm: float, *, dither: bool = False) -> tuple[float, bool]:
        self.gradient.model.move_parameters(self.theta0, v.data, factor)
        return factor * norm * norm, False


def _calibrates(config: Config) -> bool:
    return config.operator.method == "finite_difference" and config.operator.step == "auto"


def _lock_step(config: Config) -> int:
    lanczos = config.lanczos
    if lanczos.lock_step != "auto":
        return min(lanczos.lock_step, lanczos.probes)
    return min(MOST_IN_LOCK_STEP, lanczos.probes) if config.operator.method == "exact" else 1


def num_experts(hf_config: Any) -> int:
    """Return the experts of each layer, 1 for a dense model."""
    text = hf_config.get_text_config() if hasattr(hf_config, "get_text_config") else hf_config
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    return next((n for n in (getattr(text, name, None) for name in names) if isinstance(n, int) and n > 0), 1)


def trace(config: Config, ranks: int, local_ranks: int, *, gloo: bool = False) -> Trace:
    """Trace one product of ``config`` on ``ranks`` ranks, ``local_ranks`` of them on a node. Collective: no.

    Raises
    ------
    ModelError, LayoutError, LaunchError : as the run itself would.

    """
    source = resolve_source(config.model)
    skeleton = build_skeleton(source, config.model)
    vocabulary = vocabulary_size(source.hf_config)
    plain = copy.deepcopy(skeleton) if ranks > 1 else None
    tracer = Tracer(num_experts(source.hf_config))
    replicate = config.parallel.replicate
    with (
        pretending(ranks, local_ranks, gloo=gloo, replicate=replicate) as world,
        FakeTensorMode(allow_non_fake_inputs=True),
        tracer,
    ):
        with tracer.category("parameters"):
            model = shard_model(
                skeleton, world, include=config.parameters.include, exclude=config.parameters.exclude,
                master_dtype=dtype_of(config.model.master_dtype), compute_dtype=dtype_of(config.model.compute_dtype),
            )  # fmt: skip
        objective = _objective(config, ranks, vocabulary, world.device)
        gradient = Gradient(model, objective, Routing(model.module, config.operator.routing))
        if config.model.activation_checkpointing:
            checkpoint_blocks(model.module)
        watch = _MicroBatches(tracer)
        width = _lock_step(config)
        with tracer.category("vectors"):
            operator = _operator(config, gradient, objective, plain, watch)
            vectors = [model.space.zeros() for _ in range(width)]
        with tracer.category("calibration"):
            spare = [model.space.zeros() for _ in range(_CALIBRATION_VECTORS if _calibrates(config) else 0)]
        with tracer.category("products"), tracer.stretch() as product:
            products(operator, vectors)
        del spare
        count = -(-config.data.sequences // (ranks * config.data.micro_batch))
        whole = product.work - watch.work * watch.calls + watch.work * (watch.calls * count)
        rows = basis_rows(config.lanczos.reorthogonalise, config.lanczos.steps)
        dtype = basis_dtype(config.lanczos, model.space.dtype)
        return Trace(
            source.name, model.layout.num_params, model.space.size_local, ranks, min(ranks, local_ranks), count,
            objective.micro_batches[0].input_ids.numel(), width, rows, model.space.size_local * dtype.itemsize,
            model.space.dtype.itemsize, watch.work * count, whole, product.peak,
        )  # fmt: skip


def plans(config: Config, nodes: Sequence[int], local_ranks: int, machine: str, host_bytes: int) -> list[dict[str, Any]]:
    """Return a plan (scaling.plan.describe) for each number of nodes. ``machine``: see Machine.read. Collective: no."""
    if min(nodes) < 1 or local_ranks < 1:
        raise ConfigError(f"--nodes {min(nodes)} --gpus-per-node {local_ranks}: give at least one node of at least one GPU")
    device = Machine.read(machine)
    found = []
    for count in nodes:
        traced = trace(config, count * local_ranks, local_ranks, gloo=not device.overlap)
        found.append(describe(make_plan(traced, config.lanczos, device, host_bytes)))
    return found


class _MicroBatches(Unwatched):
    """Counts the micro-batches of a product, and what the last one took; see model.accumulation.Watch."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer, self._open = tracer, contextlib.ExitStack()
        self.work, self.calls = Work(), 0

    def begin(self, sums: list[torch.Tensor], count: int) -> int:
        self._found = self._open.enter_context(self._tracer.stretch())
        return 0

    def added(self, index: int, sums: list[torch.Tensor], *, more: bool = True) -> None:
        self._open.close()
        self.work, self.calls = self._found.work, self.calls + 1


def _objective(config: Config, ranks: int, vocabulary: int, device: torch.device) -> CausalLMObjective:
    """Return rank 0's first micro-batch, of tokens without numbers."""
    data = config.data
    rows = min(data.micro_batch, -(-data.sequences // ranks))
    ids = torch.zeros(rows, data.sequence_length, dtype=torch.int64)
    batch = MicroBatch(list(range(rows)), ids, torch.ones_like(ids), ids.clone())
    return CausalLMObjective([batch], data.sequences * (data.sequence_length - 1), device)


def _operator(
    config: Config, gradient: Gradient, objective: CausalLMObjective, plain: torch.nn.Module | None, watch: _MicroBatches
) -> LinearOperator:
    section, model = config.operator, gradient.model
    if section.method == "exact":
        exact = STREAMED[section.kind](
            model, objective, plain=plain, compute_dtype=dtype_of(config.model.compute_dtype),
            settings=streaming_settings(config), choose=lambda *_: Choice(),
        )  # fmt: skip
        exact.watch = watch
        return exact
    base = model.space.zeros() if section.scheme == "forward" else None
    differences = _Differences(gradient, section.scheme, 1e-3, (1.0, base))
    gradient.watch = watch
    return differences
