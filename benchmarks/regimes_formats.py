"""The function of regimes in each number format."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from hpc_hess.config import make_config
from hpc_hess.console.progress import make_progress
from hpc_hess.curvature.exact.exact import ExactHessian
from hpc_hess.model.sharded.loss import CausalLMObjective, Contribution
from hpc_hess.parallel.world import World
from hpc_hess.session.problem import Problem, load_problem


class _BFloat16Copy(nn.Module):
    """The module, called with its parameters cast to bfloat16; gradients flow back to the float32 masters."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **inputs: Any) -> Any:
        cast = {name: p.to(torch.bfloat16) for name, p in self.module.named_parameters()}
        return functional_call(self.module, cast, kwargs=inputs)  # ties are kept


class BFloat16Objective(CausalLMObjective):
    """The same loss, computed in bfloat16 up to the logits; the cross-entropy is float32, as in the program."""

    def __init__(self, plain: CausalLMObjective) -> None:
        super().__init__(plain.micro_batches, plain.num_tokens, plain.device)

    def contribution(self, module: nn.Module, index: int) -> Contribution:
        return super().contribution(_BFloat16Copy(module), index)


def hold_bfloat16_weights(problem: Problem) -> None:
    """Round the parameters to values that bfloat16 can hold."""
    model = problem.model
    model.write_parameters(model.read_parameters().bfloat16().to(model.space.dtype))


def load(config: dict[str, Any], dtype: str) -> Problem:
    """Load the function with parameters in ``dtype`` (float64 or float32)."""
    model = {**config.get("model", {}), "master_dtype": dtype, "compute_dtype": dtype}
    return load_problem(make_config({**config, "model": model}), World.alone("cpu"), make_progress(False, 1))


def exact_product(problem: Problem, compute: torch.dtype | None = None) -> ExactHessian:
    return ExactHessian(problem.model, problem.objective, compute_dtype=compute)
