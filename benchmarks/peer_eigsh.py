"""The peer of benchmarks/eigenpairs.py: SciPy's eigsh (ARPACK) on curvlinops' Hessian, in an environment of its own.

Nothing is shared with hpc_hess but the file of weights and the tokens. Needs torch, transformers, curvlinops-for-pytorch and
SciPy before 1.17, whose ARPACK in C counts basis entries in 32 bits: 17 vectors of 135 M are too many for it. SiLU is
written out: torch 2.13 has no forward derivative of silu_backward, which curvlinops' product needs.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from curvlinops import HessianLinearOperator
from scipy import __version__ as scipy_version
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import nn
from transformers import AutoModelForCausalLM


class SiLU(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(x)


class Logits(nn.Module):
    """The model as curvlinops wants it: from rows of ids to logits [predicted tokens, vocabulary]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)


def write_out_silu(module: nn.Module) -> None:
    for name, child in module.named_children():
        if type(child).__name__ in ("SiLU", "SiLUActivation"):
            setattr(module, name, SiLU())
        else:
            write_out_silu(child)


def load(path: Path) -> nn.Module:
    file: dict[str, Any] = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    model = AutoModelForCausalLM.from_pretrained(
        path.parent if file else path, dtype=torch.float32, attn_implementation="eager", **file
    )
    write_out_silu(model)
    return Logits(model.eval())


def hessian(model: nn.Module, ids: torch.Tensor, micro_batch: int) -> HessianLinearOperator:
    """Of the mean over all predicted tokens: rows are equally long, so it is the mean over batches of equal size."""
    batches = [(rows, rows[:, 1:].flatten()) for rows in ids.split(micro_batch)]
    return HessianLinearOperator(model, nn.CrossEntropyLoss(), list(model.parameters()), batches, check_deterministic=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a directory with safetensors, or a .gguf file")
    parser.add_argument("--tokens", type=Path, required=True, help=".npy of ids, (rows, length)")
    parser.add_argument("--out", type=Path, required=True, help="where the JSON goes")
    parser.add_argument("--count", type=int, default=5, help="pairs of each end")
    parser.add_argument("--basis", type=int, default=20)
    parser.add_argument("--tolerance", type=float, default=1e-3, help="of each residual, relative to its eigenvalue")
    parser.add_argument("--micro-batch", type=int, default=1)
    args = parser.parse_args()
    model = load(args.model)
    operator = hessian(model, torch.from_numpy(np.load(args.tokens)), args.micro_batch)
    size, seconds = operator.shape[0], []

    def product(x: np.ndarray) -> np.ndarray:
        began = time.perf_counter()
        y = (operator @ torch.from_numpy(np.ascontiguousarray(x).reshape(-1))).numpy()
        seconds.append(time.perf_counter() - began)
        return y

    began = time.perf_counter()
    values = eigsh(
        LinearOperator((size, size), matvec=product, dtype=np.float32),
        2 * args.count,
        which="BE",
        ncv=args.basis,
        tol=args.tolerance,
        v0=np.random.default_rng(0).standard_normal(size, np.float32),
        return_eigenvectors=False,
    )
    args.out.write_text(
        json.dumps(
            {
                "values": np.sort(values).tolist(),
                "size": size,
                "products": len(seconds),
                "product_s": seconds,
                "search_s": time.perf_counter() - began,
                "scipy": scipy_version,
                "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
            }
        )
    )


if __name__ == "__main__":
    main()
