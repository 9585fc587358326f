"""What every benchmark shares: the machine's description, and a table written to benchmarks/results/."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
LLAMAS = {
    "9 M": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "vocab_size": 4096},
    "24 M": {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 10, "vocab_size": 6144},
    "51 M": {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "vocab_size": 8192},
    "93 M": {"hidden_size": 640, "intermediate_size": 2560, "num_hidden_layers": 14, "vocab_size": 10240},
    "347 M": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 20, "vocab_size": 32000},
}  # shapes for random_llama


def machine() -> dict[str, Any]:
    """Return processor, cores, memory and versions."""
    import psutil
    import torch

    cpu = next(
        (line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.machine(),
    )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy", "h5py")}
    return {
        "cpu": cpu, "cores": os.cpu_count(), "memory_gb": round(psutil.virtual_memory().total / 1e9), "gpu": gpu,
        "python": platform.python_version(), **versions,
    }  # fmt: skip


def write(name: str, title: str, rows: list[dict[str, Any]], settings: dict[str, Any], note: str = "",
          command: str = "", measured_on: dict[str, Any] | None = None) -> None:  # fmt: skip
    """Write results/NAME.json and results/NAME.md, and print the table. ``command`` repeats it, else NAME does.

    ``measured_on``: another machine than this one.
    """
    RESULTS.mkdir(exist_ok=True)
    record = {"title": title, "date": datetime.now(UTC).date().isoformat(), "machine": measured_on or machine(),
              "settings": settings, "note": note, "rows": rows}  # fmt: skip
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    text = table(rows)
    lines = [f"# {title}", "", f"Repeat: `python -m benchmarks.{command or name}`. Measured {record['date']} on " +
             ", ".join(f"{k} {v}" for k, v in record["machine"].items() if v is not None) + ".",
             "Settings: " + ", ".join(f"{k} = {v}" for k, v in settings.items()) + ".", "", text]  # fmt: skip
    if note:
        lines += ["", note]
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n")
    print(text, f"\n\n{note}" if note else "", flush=True)


def table(rows: list[dict[str, Any]]) -> str:
    """Return rows as a Markdown table; numbers in three digits."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_show(row.get(c, "")) for c in columns) + " |" for row in rows]
    return "\n".join(lines)


def _show(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


@contextmanager
def random_llama(shape: dict[str, int], rows: int, length: int) -> Iterator[dict[str, Any]]:
    """Give the configuration of a Llama with seeded weights on random tokens, as files in a temporary directory."""
    import numpy as np
    from transformers import LlamaConfig

    hidden = shape["hidden_size"]
    heads = 4 if hidden >= 48 else 2
    config = LlamaConfig(**{
        "num_attention_heads": heads, "num_key_value_heads": heads // 2, "max_position_embeddings": max(256, length),
        "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": hidden**-0.5,
        "architectures": ["LlamaForCausalLM"], **shape,
    })  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        np.save(Path(folder) / "tokens.npy", np.random.default_rng(0).integers(3, shape["vocab_size"], rows * length))
        yield {
            "model": {"source": f"{folder}/config.json"},
            "data": {"source": f"tokens:{folder}/tokens.npy", "sequence_length": length, "sequences": rows},
        }


def run_program(
    config: dict[str, Any], ranks: int = 1, *, threads: int | None = None, keep: Path | None = None
) -> dict[str, Any]:
    """Run ``hpc_hess run`` under torchrun in a directory of its own; return result.json with the events added.

    ``keep``: a directory for a copy of the figures.
    """
    import tomli_w

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        config = {**config, "run": {**config.get("run", {}), "out": str(out)}}
        path = Path(folder) / "config.toml"
        path.write_text(tomli_w.dumps(config))
        env = {**os.environ, "OMP_NUM_THREADS": str(threads or max(1, (os.cpu_count() or 1) // ranks))}
        command = [sys.executable, "-m", "hpc_hess", "run", str(path)]
        if ranks > 1:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}",
                       "-m", "hpc_hess", "run", str(path)]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        result = json.loads((out / "result.json").read_text())
        if keep is not None:
            shutil.copytree(out / "figures", keep / "figures")
        result["events"] = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
        return result
