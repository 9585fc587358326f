"""From a configuration to the function whose Hessian is taken: model, data, objective, gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import nn

from hpc_hess.config import Config, DataSection, ModelSection
from hpc_hess.console.progress import Progress
from hpc_hess.errors import ConfigError, NumericsError
from hpc_hess.intake.configuration import running
from hpc_hess.intake.findings import Finding, Intake
from hpc_hess.model.data.data import Samples, idle_ranks_note, load_samples, micro_batches
from hpc_hess.model.data.trial import spanned_finding, try_forward
from hpc_hess.model.sharded.gradient import Gradient
from hpc_hess.model.sharded.loss import LabelObjective
from hpc_hess.model.sharded.own_loss import CallableObjective
from hpc_hess.model.sharded.routing import Routing
from hpc_hess.model.sharded.shard import ShardedModel, checkpoint_blocks, shard_model
from hpc_hess.model.sharded.skeleton import attention_note, attention_of, build_skeleton
from hpc_hess.model.sources.adapted import asks_hub
from hpc_hess.model.sources.hub import reaching
from hpc_hess.model.sources.source import Source, resolve_source
from hpc_hess.model.sources.weights import copy_buffers, fill, open_reader
from hpc_hess.parallel import devices
from hpc_hess.parallel.memory import release_memory, used_bytes
from hpc_hess.parallel.vector import Vector, VectorSpace
from hpc_hess.parallel.world import World
from hpc_hess.session import own_problem
from hpc_hess.sketch.kinds import SketchSettings
from hpc_hess.sketch.sketch import Sketch, part_of, sketch_space
from hpc_hess.system import importing

T = TypeVar("T")


@dataclass
class Problem:
    """The function, sharded: everything a product needs. Of a problem of the user's own ``samples`` has no rows."""

    source: Source
    samples: Samples
    model: ShardedModel
    objective: LabelObjective | CallableObjective
    gradient: Gradient
    plain: nn.Module | None  # the skeleton without FSDP's hooks, which exact products stream through
    program_bytes: int  # in this process before anything of the model's size was there
    intake: Intake  # what was found about everything that came in
    sketch: Sketch | None = None  # with operator.sketched: what the matrix is seen through

    @property
    def space(self) -> VectorSpace:
        """The space of the Krylov vectors: the parameters', or that of the sketch."""
        return self.model.space if self.sketch is None else sketch_space(self.sketch, self.model.space)

    @property
    def attention(self) -> str:
        """Which attention the model computes with: what model.attention = "auto" has chosen."""
        return attention_of(self.model.module)

    @property
    def labelled(self) -> LabelObjective:
        """The objective, whose samples have labels. Raises ConfigError: it is the user's own."""
        if isinstance(self.objective, LabelObjective):
            return self.objective
        raise ConfigError("this needs samples with labels, which a problem of one's own does not show: leave it out")

    def to_krylov_space(self, vector: Vector) -> Vector:
        """Return a vector of the parameters as one of :attr:`space`. Collective: yes."""
        if self.sketch is None:
            return vector
        return part_of(self.sketch.apply(vector), self.space)


def dtype_of(name: str) -> torch.dtype:
    """Return the torch dtype of a configuration value; tf32 is a way to multiply what is stored as float32."""
    return torch.float32 if name == "tf32" else getattr(torch, name)


class Inputs(NamedTuple):
    """What a run starts from, before anything of the model's size is read.

    ``own``: what the function of problem.build returned; the others say what they can of it.
    """

    source: Source
    skeleton: nn.Module | None  # on the meta device; None: still to be built
    samples: Samples
    own: own_problem.Built | None = None


def read_inputs(config: Config, world: World, *, build: bool = True) -> Inputs:
    """Find the model, ``build`` it without weights, read the data. Collective: yes. Raises ModelError, DataError."""
    if config.problem.build:
        built, source = own_problem.build(config, world)
        return Inputs(source, built.model, Samples({}, torch.empty(0), 0, source.fingerprint), built)

    def read() -> Inputs:
        with importing():
            source = resolve_source(config.model)
            skeleton = build_skeleton(source, config.model) if build else None
            return Inputs(source, skeleton, load_samples(config.data, config.model, source))

    return in_turn(
        world, read, "read the model's configuration and the data", shared=fills_a_cache(config.model, config.data)
    )


def _built(config: Config, world: World, source: Source) -> nn.Module:
    """Build the model without weights. Collective: yes. Raises ModelError."""

    def build() -> nn.Module:
        with importing():
            return build_skeleton(source, config.model)

    return in_turn(world, build, "build the model", shared=fills_a_cache(config.model, config.data))


def load_problem(config: Config, world: World, progress: Progress, inputs: Inputs | None = None) -> Problem:
    """Shard and fill the model. Collective: yes.

    ``inputs`` : of this configuration, from :func:`read_inputs`, where they are read already; used up.

    Raises
    ------
    ModelError, DataError, LayoutError : on every rank, if any rank meets one.

    """
    devices.make_exact_float32()
    if config.model.compute_dtype == "tf32":
        with world.together("look for tensor cores"):
            devices.require_tf32(world.device)
    if config.parallel.deterministic:
        devices.make_deterministic()
    source, skeleton, samples, own = inputs or read_inputs(config, world)
    if skeleton is None:
        skeleton = _built(config, world, source)
    if world.size > 1:
        import torch.distributed.fsdp  # noqa: F401  # so that it counts as the program
    program_bytes = used_bytes(world.device)
    intake = Intake(progress.note)
    if own is not None:
        return _load_own(config, world, Inputs(source, skeleton, samples, own), program_bytes, intake)
    intake.add(*source.findings, *samples.findings, *attention_note(skeleton, config.model))
    for note in filter(None, [*samples.notes, idle_ranks_note(len(samples), world.size)]):
        progress.note(note)
    progress.phase(f"loading {source.name}")
    plain = copy.deepcopy(skeleton) if world.size > 1 else None
    model = shard_model(
        skeleton,
        world,
        include=config.parameters.include,
        exclude=config.parameters.exclude,
        master_dtype=dtype_of(config.model.master_dtype),
        compute_dtype=dtype_of(config.model.compute_dtype),
    )

    def read_weights() -> list[Finding]:
        with world.together("read the weights"):
            reader = open_reader(source, config.model, skeleton)
            fill(model.module, reader, world.shard_rank, world.shard_size)
            if plain is not None:
                copy_buffers(model.module, plain)
            found = reader.findings
            reader.close()
            release_memory()
        return found

    intake.add(*read_weights(), spanned_finding(model))
    computes_in = dtype_of(config.model.compute_dtype if model.sharded else config.model.master_dtype)
    explained = partial(running, source.path, source.hf_config.get_text_config().to_dict())
    found, alone = try_forward(model, plain, samples, world.rank % len(samples), read_weights, computes_in, explained)
    intake.add(*found)
    samples = replace(samples, alone=alone)
    routing = Routing(model.module, config.operator.routing)
    routing.attach()
    if config.model.activation_checkpointing:
        checkpoint_blocks(model.module)
    batches = micro_batches(samples, world.rank, world.size, config.data.micro_batch)
    objective = samples.objective(batches, samples.num_tokens, world.device)
    gradient, sketch = Gradient(model, objective, routing), _sketch(config, model)
    return Problem(source, samples, model, objective, gradient, plain, program_bytes, intake, sketch)


def _load_own(config: Config, world: World, inputs: Inputs, program_bytes: int, intake: Intake) -> Problem:
    """Lay a problem of the user's own over the ranks. Collective: yes. Raises as :func:`load_problem`."""
    source, _, samples, own = inputs
    assert own is not None
    model, plain, findings = own_problem.shard(own, config, world, dtype_of(config.model.master_dtype))
    intake.add(*findings, spanned_finding(model))
    routing = Routing(model.module, config.operator.routing)
    routing.attach()
    if config.model.activation_checkpointing:
        checkpoint_blocks(model.module)
    objective, findings = own_problem.objective_of(own, model, config)
    intake.add(*findings)
    count = world.sum_over_ranks(torch.tensor([objective.num_own], dtype=torch.float64), "numbers of batches")
    samples = replace(samples, labels=torch.empty(int(count)))
    gradient, sketch = Gradient(model, objective, routing), _sketch(config, model)
    return Problem(source, samples, model, objective, gradient, plain, program_bytes, intake, sketch)


def _sketch(config: Config, model: ShardedModel) -> Sketch | None:
    if not config.operator.sketched:
        return None
    return Sketch(model.layout.num_params_full, SketchSettings.of(config.sketch))


def fills_a_cache(model: ModelSection, data: DataSection) -> bool:
    """Return whether reading may fill a cache that ranks share: the Hub's, or that of a model's own code. Collective: no."""
    return model.trust_remote_code or data.source.startswith("hub:") or asks_hub(model)


def in_turn(world: World, read: Callable[[], T], name: str, *, shared: bool) -> T:
    """Return ``read()``, which has no collectives; with a ``shared`` cache one rank of a node is first. Collective: yes.

    The first one downloads what names of the Hub stand for, and the others find it in the cache. transformers copies a
    model's own code into a cache (HF_MODULES_CACHE), where a rank would find another's half-copied files. Every rank raises
    the error that some rank meets.
    """

    def turn(first: bool) -> T:
        with reaching("all" if first else "none"):
            return read()

    if world.any_true(shared, name):  # a path may exist on some nodes only
        return world.one_first(turn, name)
    with world.together(name):
        value = read()
    return value  # noqa: RET504  # an error does not come this far


def check_repeatable(gradient: Gradient) -> float:
    """Compute the first micro-batch's gradient twice; return the relative difference. Collective: yes.

    Raises
    ------
    NumericsError : the two differ by more than rounding (dropout or other randomness is on).

    """
    _, first = gradient(micro_batches=1)
    _, second = gradient(micro_batches=1)
    norm = first.norm()
    difference = second.axpy_(-1.0, first).norm() / norm if norm > 0 else 0.0
    if difference > 100 * torch.finfo(gradient.model.space.dtype).eps:
        raise NumericsError(
            f"the same gradient computed twice differs by {difference:.1e} relative: dropout or another random "
            "operation is on; put the model in eval mode or make it deterministic"
        )
    return difference
