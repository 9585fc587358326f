"""Extreme eigenvalues and products of each toy architecture against dense float64 Hessians and curvlinops."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from typing import Annotated, Any

import torch
from curvlinops import HessianLinearOperator
from torch import nn

import hpc_hess
from benchmarks.frame import Option, Table, benchmark
from hpc_hess.model.sharded.own_loss import CallableObjective, causal_lm_loss
from hpc_hess.model.sharded.precision import honest_casts
from tests.support.dense import dense_hessian
from tests.support.toys import TOYS, VOCAB, toy_model
from tests.support.written_out import write_out

STEPS = 80


def small(name: str) -> nn.Module:
    """The toy with a vocabulary of 20, so that its dense Hessian has a few thousand rows."""
    model = toy_model(name, dtype=torch.float64)
    model.resize_token_embeddings(20)
    return model.eval()


def tokens() -> Iterator[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        yield {"input_ids": torch.randint(3, 20, (2, 9), generator=generator)}


class CurvlinopsModel(nn.Module):
    """The model as curvlinops wants it: a function of one input tensor that returns logits [tokens, vocabulary].

    SiLU and LayerNorm are written out in elementary operations: torch 2.13 has no forward derivative of silu_backward,
    and jvp of jacrev through layer_norm, which is what curvlinops takes, is silently wrong there.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        write_out(model)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        with honest_casts(torch.float64):
            return self.model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)


def curvlinops_error(model: nn.Module, batches: list[dict[str, torch.Tensor]], operator: Any) -> float:
    """Relative difference of one product."""
    wrapped = CurvlinopsModel(model)
    named = dict(sorted(wrapped.model.named_parameters()))
    ids = torch.cat([b["input_ids"] for b in batches])
    reference = HessianLinearOperator(
        wrapped,
        nn.CrossEntropyLoss(),
        list(named.values()),
        [(ids, ids[:, 1:].flatten())],
        check_deterministic=False,
        num_data=1,
        batch_size_fn=lambda _: 1,
    )
    v = torch.randn(operator.shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    theirs = reference @ v
    return float((operator @ v - theirs).norm() / theirs.norm())


@benchmark(
    "Extreme eigenvalues against dense float64 Hessians, errors relative to |lambda|max", asked="1e-6 in every error column"
)
def main(
    table: Table, models: Annotated[tuple[str, ...], Option("measure these only, keep the other rows", positional=True)] = ()
) -> None:
    names = models or tuple(TOYS)
    kept = {row["model"]: row for row in table.earlier()}
    table.settings |= {
        "steps": STEPS,
        "dtype": "float64",
        "vocabulary": 20,
        "toy vocabulary before": VOCAB,
        "tokens": "3 x 2 x 9",
    }
    for name in TOYS:
        if name not in names and name in kept:
            table.add(kept[name])
            continue
        began = time.perf_counter()
        model, batches = small(name), list(tokens())
        untouched = copy.deepcopy(model)
        operator = hpc_hess.hessian(model, batches)
        spectrum = hpc_hess.slq(operator, steps=STEPS)
        dense = torch.linalg.eigvalsh(dense_hessian(model, CallableObjective(batches, causal_lm_loss, model)))
        scale = float(dense.abs().max())
        table.add(
            {
                "model": name,
                "parameters": operator.shape[0],
                "lambda_max": float(dense[-1]),
                "lambda_min": float(dense[0]),
                "error of lambda_max": abs(spectrum.lambda_max - float(dense[-1])) / scale,
                "error of lambda_min": abs(spectrum.lambda_min - float(dense[0])) / scale,
                "product against curvlinops": curvlinops_error(untouched, batches, operator),
                "seconds": time.perf_counter() - began,
            }
        )


if __name__ == "__main__":
    main()
