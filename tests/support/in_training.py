"""Small models, seven losses that people write, and the ways in which their programs spread models over ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

import hpc_hess
from hpc_hess.parallel.world import World

WORDS = 11
Loss = Callable[[nn.Module, Any], Any]
STEP = 1e-3  # the same on all ranks, so that numbers differ by rounding alone
Answers = dict[str, np.ndarray]


class Net(nn.Module):
    """Tokens or numbers in, ``out`` numbers for each. Sizes are odd: shards are uneven, and some are empty."""

    def __init__(self, out: int, *, tokens: bool = False) -> None:
        super().__init__()
        self.inner: nn.Module = nn.Embedding(WORDS, 6) if tokens else nn.Linear(5, 6)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.LayerNorm(6)) for _ in range(2)])
        self.head = nn.Linear(6, out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def _numbers(n: int, *shape: int, seed: int) -> torch.Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _tokens(n: int, high: int, *shape: int, seed: int) -> torch.Tensor:
    return torch.randint(high, (n, *shape), generator=torch.Generator().manual_seed(seed))


def _model(out: int, *, tokens: bool = False, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net(out, tokens=tokens).double()


def squared(model: nn.Module, batch: Any) -> tuple[torch.Tensor, int]:
    return ((model(batch[0]) - batch[1]) ** 2).sum(), len(batch[0])


def weighted(model: nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy with a weight for each class: the weights of the examples add up to the batch's."""
    weight = torch.tensor([1.0, 0.25, 3.0], dtype=torch.float64)
    return F.cross_entropy(model(batch[0]), batch[1], weight=weight, reduction="sum"), weight[batch[1]].sum()


def smoothed(model: nn.Module, batch: Any) -> tuple[torch.Tensor, int]:
    return F.cross_entropy(model(batch[0]), batch[1], label_smoothing=0.1, reduction="sum"), len(batch[1])


def _log_probability(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    log_p = model(ids[:, :-1]).log_softmax(-1)
    return log_p.gather(-1, ids[:, 1:, None]).squeeze(-1).sum(1)


class Preferences:
    """Direct preference optimisation against a frozen copy of the model."""

    def __init__(self) -> None:
        self.reference = _model(WORDS, tokens=True, seed=1).requires_grad_(False)

    def __call__(self, model: nn.Module, batch: Any) -> tuple[torch.Tensor, int]:
        better, worse = batch
        gain = [_log_probability(model, ids) - _log_probability(self.reference, ids) for ids in (better, worse)]
        return -F.logsigmoid(0.5 * (gain[0] - gain[1])).sum(), len(better)


def reward(model: nn.Module, batch: Any) -> tuple[torch.Tensor, int]:
    """Bradley and Terry's model of which of two texts is preferred."""
    better, worse = (model(ids).mean((1, 2)) for ids in batch)
    return -F.logsigmoid(better - worse).sum(), len(better)


class Distillation:
    """Divergence from a teacher's distribution, which is left alone though it could be trained."""

    def __init__(self) -> None:
        self.teacher = _model(WORDS, tokens=True, seed=2)

    def __call__(self, model: nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, int]:
        wanted = self.teacher(ids).log_softmax(-1)
        return F.kl_div(model(ids).log_softmax(-1), wanted, log_target=True, reduction="sum"), ids.numel()


def denoising(model: nn.Module, batch: Any) -> torch.Tensor:
    """A step of a diffusion model: the noise and its size belong to the batch; a scalar, so batches count equally."""
    clean, noise, size = batch
    return F.mse_loss(model(clean * (1 - size) + noise * size), noise)


def case(name: str) -> tuple[Net, Loss, list[Any]]:
    """Return a model, a loss and five batches of unequal sizes."""
    sizes = (4, 2, 5, 3, 2)
    if name in ("squared", "weighted", "smoothed"):
        out = 4 if name == "squared" else 3
        inputs = [_numbers(n, 5, seed=k) for k, n in enumerate(sizes)]
        targets: list[torch.Tensor] = [
            _numbers(n, out, seed=50 + k) if name == "squared" else _tokens(n, out, seed=50 + k) for k, n in enumerate(sizes)
        ]
        losses: dict[str, Loss] = {"squared": squared, "weighted": weighted, "smoothed": smoothed}
        return _model(out), losses[name], list(zip(inputs, targets, strict=True))
    if name == "denoising":
        triples = [
            (_numbers(n, 5, seed=k), _numbers(n, 5, seed=50 + k), 0.1 * (1 + _numbers(n, 1, seed=90 + k).abs()))
            for k, n in enumerate(sizes)
        ]
        return _model(5), denoising, list(triples)
    if name == "distillation":
        return _model(WORDS, tokens=True), Distillation(), [_tokens(n, WORDS, 6, seed=k) for k, n in enumerate(sizes)]
    pairs = [(_tokens(n, WORDS, 6, seed=k), _tokens(n, WORDS, 6, seed=50 + k)) for k, n in enumerate(sizes)]
    return _model(1 if name == "reward" else WORDS, tokens=True), reward if name == "reward" else Preferences(), list(pairs)


CASES = ("squared", "weighted", "smoothed", "preferences", "reward", "distillation", "denoising")


def dealt(batches: list[Any], rank: int, size: int) -> list[Any]:
    """Return a rank's batches: unequally many, and none for the last of three or more."""
    shares = {1: [5], 2: [4, 1], 3: [3, 2, 0], 4: [2, 2, 1, 0]}[size]
    first = sum(shares[:rank])
    return batches[first : first + shares[rank]]


def fully_sharded(model: Net, mesh: Any, *, columns: bool = False, **options: Any) -> Net:
    """Shard each block and the rest, as people do; ``columns``: by the second dimension where that divides evenly."""

    def place(p: nn.Parameter) -> Shard | None:
        return Shard(1) if p.ndim == 2 and p.shape[1] % mesh.size() == 0 else None

    options |= {"shard_placement_fn": place} if columns else {}
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def hybrid(how: str) -> DeviceMesh:
    """Return the mesh of "hsdp 2x3": two replicas of three shards."""
    shape = tuple(int(n) for n in how.removeprefix("hsdp ").split("x"))
    return init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))


def spread(model: Net, how: str, size: int) -> tuple[nn.Module, dict[str, Any]]:
    """Return a copy of the model as programs spread it, and what hessian() is told of it."""
    model = copy.deepcopy(model)
    if how == "ddp":
        return DistributedDataParallel(model), {}
    if how == "group":
        return model, {"group": torch.distributed.group.WORLD}
    if how.startswith("hsdp"):
        return fully_sharded(model, hybrid(how)), {}
    return fully_sharded(model, init_device_mesh("cpu", (size,)), columns=how == "fsdp columns"), {}


def whole_parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return every parameter whole, by its name without wrappers. Collective where it is sharded."""
    found = {}
    for name, p in model.named_parameters():
        whole = p.full_tensor() if hasattr(p, "full_tensor") else p
        found[name.removeprefix("module.")] = whole.detach().clone()
    return found


def answers(operator: Any) -> Answers:
    """Return one number or vector of each call, whole. Collective: yes."""
    v = torch.linspace(-1, 1, operator.shape[0], dtype=torch.float64)
    spectrum = hpc_hess.slq(operator, steps=6, probes=2, seed=3)
    pairs = hpc_hess.eigenpairs(operator, 1, tolerance=1e-6, copies=False)
    small = hpc_hess.slq(hpc_hess.sketched(operator, 16), steps=4)
    found = {
        "product": (operator @ v).numpy(),
        "part": operator.whole(operator @ operator.part(v)).numpy(),
        "numpy": operator @ v.numpy(),
        "alphas": np.concatenate(spectrum.alphas),
        "betas": np.concatenate(spectrum.betas),
        "sketched": np.concatenate(small.alphas),
        "eigenvalues": pairs.values,
        "eigenvector": np.abs(operator.whole(pairs.vectors[-1])),
        "trace": np.array(hpc_hess.trace(operator, products=12).mean),
        "diagonal": operator.whole(hpc_hess.diagonal(operator, products=12).values),
        "solution": hpc_hess.solve(operator, v, damping=1.0, products=8).x,
    }
    if "head.bias" in {p.name for p in operator.layout.parameters}:
        found["block"] = hpc_hess.sub_block(operator, ["head.bias"])
    return found


def product(operator: Any) -> Answers:
    """Return a product, of a vector whole and in parts. Collective: yes."""
    v = torch.linspace(-1, 1, operator.shape[0], dtype=torch.float64)
    return {"numpy": operator @ v.numpy(), "part": operator.whole(operator @ operator.part(v)).numpy()}


def on_ranks(world: World, asked: list[tuple[str, str, Any]], ask: Callable[[Any], Answers]) -> list[Answers]:
    """Return what is asked of each (case, distribution, method), batches dealt over these ranks. Collective: yes."""
    found = []
    for name, how, method in asked:
        model, loss, batches = case(name)
        model, of = spread(model, how, world.size)
        mine = dealt(batches, world.rank, world.size)
        found.append(ask(hpc_hess.hessian(model, mine, loss, method=method, step=STEP, **of)))
    return found
