"""A run directory made from a matrix with a chosen spectrum, by a Lanczos process of this file's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from hpc_hess.config import make_config
from hpc_hess.linalg.quadrature import ritz, trace


def lanczos(eigenvalues: np.ndarray, steps: int, seed: int) -> tuple[list[float], list[float]]:
    """Alpha and beta of Q diag(eigenvalues) Q with two Householder reflections in Q, from a Rademacher vector."""
    n = len(eigenvalues)
    mirrors = [u / np.linalg.norm(u) for u in np.random.default_rng(7).standard_normal((2, n))]
    rng = np.random.default_rng(seed)

    def product(x: np.ndarray) -> np.ndarray:
        for u in mirrors:
            x = x - 2 * u * (u @ x)
        x = eigenvalues * x
        for u in reversed(mirrors):
            x = x - 2 * u * (u @ x)
        return x

    basis = np.zeros((steps + 1, n))
    basis[0] = rng.choice([-1.0, 1.0], n) / np.sqrt(n)
    alpha: list[float] = []
    beta: list[float] = []
    for j in range(steps):
        w = product(basis[j])
        alpha.append(float(w @ basis[j]))
        for _ in range(2):
            w -= basis[: j + 1].T @ (basis[: j + 1] @ w)
        beta.append(float(np.linalg.norm(w)))
        if beta[-1] <= 1e-12 * max(map(abs, alpha)):
            break
        basis[j + 1] = w / beta[-1]
    return alpha, beta


def llm_like(scale: float = 1.0) -> np.ndarray:
    """A heavy-tailed bulk near zero and outliers of both signs, the negative one largest."""
    eigenvalues = np.random.default_rng(1).standard_t(2, 2000) * 0.02
    eigenvalues[:10] = [-1396, -702, -233, -31, -6, 893, 411, 160, 30, 5.5]
    return eigenvalues * scale


def make_result(eigenvalues: np.ndarray, steps: int = 12, probes: int = 1, **more: Any) -> dict[str, Any]:
    """A result as a finished run writes it."""
    entries, quadratures = [], []
    for k in range(probes):
        alpha, beta = lanczos(eigenvalues, steps, k)
        q = ritz(alpha, beta)
        quadratures.append(q)
        entries.append(
            {
                "seed": 5,
                "probe": k,
                "alpha": alpha,
                "beta": beta,
                "ritz_values": q.values.tolist(),
                "ritz_weights": q.weights.tolist(),
                "ritz_residuals": q.residuals.tolist(),
            }
        )
    estimate = trace(quadratures, len(eigenvalues))
    return {
        "format": 1,
        "num_params": len(eigenvalues),
        "world_size": 2,
        "model": {"name": "toy", "kind": "random"},
        "data": {"tokens": 512, "sequences": 4},
        "operator": {"name": "hessian", "scheme": "central"},
        "steps": steps,
        "probes": entries,
        "lambda_max": max(float(q.values[-1]) for q in quadratures),
        "lambda_min": min(float(q.values[0]) for q in quadratures),
        "trace": {"mean": estimate.mean, "stderr": estimate.stderr},
        "errors": {"symmetry": 1e-4, "repeat": 0.0},
        "timing": {"gradient_s": 6.5, "hvp_s": 13.4, "lanczos_s": 0.31, "checkpoint_s": 0.6},
        "memory": {"peak_bytes": 3 << 30},
        "hardware": {"device": "cpu"},
        "versions": {"torch": "2.13.0"},
        **more,
    }


def make_events(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of such a run."""
    events: list[dict[str, Any]] = [{"event": "start", "probe": 0, "time": 1.75e9}]
    for k, probe in enumerate(result.get("probes", [])):
        for j in range(len(probe["alpha"])):
            times = {"hvp_s": 13.0 + j % 3, "lanczos_s": 0.1 + 0.01 * j, "checkpoint_s": 0.5}
            events.append({"event": "step", "probe": k, "step": j + 1, **times})
    return events


def write_run(path: Path, result: dict[str, Any], config: dict[str, Any] | None = None) -> Path:
    """Write result.json, config.toml and events.jsonl, the last line of which a kill has cut short."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "result.json").write_text(json.dumps(result), encoding="utf-8")
    (path / "config.toml").write_text(make_config(config or {}).to_toml(), encoding="utf-8")
    lines = [json.dumps(event) for event in make_events(result)]
    (path / "events.jsonl").write_text("\n".join([*lines, '{"event": "st']), encoding="utf-8")
    return path
