"""The Python interface on models that a program has spread over ranks, against one process, in float64; DPO; training.

Toys with seven losses of people's own. A quantity's difference is the largest of an entry, over the largest entry.
A part whose rows are there is kept.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hpc_hess
from benchmarks.frame import Table, benchmark
from benchmarks.tables import ROOT
from hpc_hess.model.sharded.precision import honest_casts
from hpc_hess.parallel.world import World
from tests.support.in_training import CASES, STEP, Answers, answers, case, on_ranks, product
from tests.support.spawn import run_ranks
from tests.support.training import differing, spectrum

_MESHES = {1: "hsdp 1x1", 2: "hsdp 2x1", 3: "hsdp 1x3", 4: "hsdp 2x2"}
_HOW = {"fsdp": "FSDP2", "ddp": "DDP", "group": "plain replicas"}
_METHODS = {"finite_difference": "differences", "exact": "exact"}
_COLUMNS = dict.fromkeys(("product", "part", "numpy"), "products, differences") | {"alphas": "alpha", "betas": "beta"}
_TRAINED = {1: ("plain", "fsdp"), 2: ("fsdp", "hsdp 2x1", "ddp", "mixed", "gathered", "checkpointed", "compiled", "hooked")}
_TRAINED |= {4: ("fsdp", "hsdp 2x2", "ddp")}
_LONG_S = 900


def named(how: str) -> str:
    """Return a distribution in words."""
    return _HOW[how] if how in _HOW else f"HSDP {how.removeprefix('hsdp ')}"


def on(ranks: int) -> str:
    """Return a number of ranks in words."""
    return f"{ranks} rank{'s' if ranks > 1 else ''}"


def apart(found: Answers, right: Answers) -> dict[str, float]:
    """Return how far each quantity is off."""
    return {name: float(np.abs(found[name] - value).max() / np.abs(value).max()) for name, value in right.items()}


def equality(table: Table) -> None:
    """Compare products of all losses, and every call on one of them, with those of one process, however the model lies."""
    parts: list[tuple[Callable[[Any], Answers], list[tuple[str, str]]]] = [
        (product, [(name, method) for name in CASES for method in ("finite_difference", "exact")]),
        (answers, [("squared", "finite_difference")]),
    ]
    by_loss: dict[str, dict[str, float]] = {}
    by_way: dict[tuple[int, str], dict[str, float]] = {}
    for ask, cases in parts:
        alone = {}
        for name, method in cases:
            model, loss, batches = case(name)
            alone[name, method] = ask(hpc_hess.hessian(model, batches, loss, method=method, step=STEP))  # type: ignore[arg-type]
        for ranks, mesh in _MESHES.items():
            asked = [(name, how, method) for how in (*_HOW, mesh) for name, method in cases]
            for of_rank in run_ranks(on_ranks, ranks, asked, ask, timeout_s=_LONG_S):
                for (name, how, method), found in zip(asked, of_rank, strict=True):
                    for quantity, off in apart(found, alone[name, method]).items():
                        column = _COLUMNS.get(quantity, quantity) if ask is answers else f"products, {_METHODS[method]}"
                        for row in (by_loss.setdefault(name, {}), by_way.setdefault((ranks, how), {})):
                            row[column] = max(off, row.get(column, 0.0))
    for (ranks, how), row in sorted(by_way.items(), key=lambda each: each[0][0]):
        table.add({"what": f"{named(how)}, {on(ranks)}", "measured": max(row.values()), **row})
    for name, row in by_loss.items():
        table.add({"what": f"all of these, loss: {name}", "measured": max(row.values()), **row})


# -- direct preference optimisation --------------------------------------------------------------------------------------


def example(name: str) -> ModuleType:
    """Return one of the problems of examples/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / "problems" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def written_out(model: Any, reference: Any, pair: dict[str, Any], beta: float) -> torch.Tensor:
    """Return the summed loss of the published formula (Rafailov et al. 2023, equation 7), token by token."""

    def log_pi(of: Any, ids: torch.Tensor) -> torch.Tensor:
        scores = of(input_ids=ids).logits
        return sum(  # type: ignore[return-value]
            scores[:, t - 1].gather(1, ids[:, t, None])[:, 0] - scores[:, t - 1].exp().sum(1).log()
            for t in range(pair["prompt"], ids.shape[1])
        )

    win, lose = ((log_pi(model, pair[k]) - log_pi(reference, pair[k]).detach()) for k in ("chosen", "rejected"))
    return (1 + (-beta * (win - lose)).exp()).log().sum()


def dpo(table: Table) -> None:
    """Compare the Hessian of examples/problems/dpo.py with double backward of the formula, entry by entry.

    Llama's own casts to float32 are casts to float64 on both sides: in float32 they would round by 1e-7.
    """
    beta = 0.3
    with tempfile.TemporaryDirectory() as folder:
        places = {}
        for seed, name in enumerate(("policy", "reference")):
            torch.manual_seed(seed)
            sizes = {"vocab_size": 8, "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1}
            config = LlamaConfig(**sizes, num_attention_heads=2, initializer_range=0.3, tie_word_embeddings=True)
            places[name] = str(Path(folder) / name)
            LlamaForCausalLM(config).double().save_pretrained(places[name])
        policy, pairs, loss = example("dpo").build(World.alone(), {**places, "beta": beta, "batches": 2})
        reference = LlamaForCausalLM.from_pretrained(places["reference"], attn_implementation="eager").eval()
    assert policy.dtype == reference.dtype == torch.float64

    def whole(model: Any, pair: dict[str, Any]) -> tuple[torch.Tensor, float]:
        with honest_casts(torch.float64):
            return loss(model, pair)  # type: ignore[no-any-return]

    products = {}
    for method in ("exact", "finite_difference"):
        operator = hpc_hess.hessian(policy, pairs, whole, method=method)  # type: ignore[arg-type]
        products[method] = np.stack([operator @ row for row in np.eye(operator.shape[0])])
    policy.eval().set_attn_implementation("eager")
    parameters = [p for _, p in sorted(policy.named_parameters())]
    with honest_casts(torch.float64):
        written = [written_out(policy, reference, pair, beta) for pair in pairs]
    value = sum(written) / sum(len(pair["chosen"]) for pair in pairs)
    value_here = sum(whole(policy, pair)[0] for pair in pairs) / sum(whole(policy, pair)[1] for pair in pairs)
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, parameters, create_graph=True)])
    rows = [torch.autograd.grad(entry, parameters, retain_graph=True) for entry in gradient]
    dense = torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows]).numpy()
    model = f"DPO of a Llama of {len(dense)} parameters"
    table.measured(f"{model}: value of the loss against the formula", float((abs(value_here - value) / value).detach()))
    for method, words in (("exact", "exact products"), ("finite_difference", "finite differences")):
        off = float(np.abs(products[method] - dense).max() / np.abs(dense).max())
        table.measured(f"{model}: dense Hessian by {words}, against double backward of the formula", off)


# -- training ------------------------------------------------------------------------------------------------------------


def training(table: Table) -> None:
    """Say whether weights after a training are bitwise those without a spectrum in its middle."""
    same = {}
    for ranks, ways in _TRAINED.items():
        jobs = [(how, spectrum) for how in ways]
        moved = {line.split(",")[0] for found in run_ranks(differing, ranks, jobs, timeout_s=_LONG_S) for line in found}
        for how in ways:
            words = named(how) if how in _HOW or how.startswith("hsdp") else _WORDS[how]
            what = f"training, {words}, {on(ranks)}: the same bits with a spectrum in its middle"
            same[what] = "no" if how in moved else "yes"
    for what, answer in same.items():
        table.measured(what, answer)


_WORDS = {
    "plain": "one process",
    "mixed": "FSDP2 in bfloat16",
    "gathered": "FSDP2 that keeps weights gathered",
    "checkpointed": "FSDP2 with activation checkpointing",
    "compiled": "FSDP2 with torch.compile",
    "hooked": "FSDP2 with hooks on gradients",
}


@benchmark(
    "The Python interface on several ranks against one process, float64, seven losses of people's own",
    asked={"training*": "yes", "DPO*finite*": "<= 1e-6", "*": "<= 1e-8"},
    note="Differences are relative to the largest entry. Products are of seven losses, other calls of squared errors, by "
    "differences of one step. Ranks have unequally many batches, the last of three or four none.",
)
def main(table: Table, again: Annotated[bool, "measure every part anew"] = False) -> None:
    kept = [] if again else table.earlier()
    for begins, part in {(*_HOW.values(), "HSDP", "all"): equality, ("DPO",): dpo, ("training",): training}.items():
        rows = [row for row in kept if row["what"].startswith(begins)]
        table.rows += rows
        if not rows:
            part(table)


if __name__ == "__main__":
    main()
