"""The Hessian of a model in an FSDP2 loop of the user's own, on 2 ranks: a product in gradients of that loop, memory, share.

A gradient is the loop's: forward and backward over this rank's batches. Gradients and products take turns. Memory is the
peak of a spectrum over the peak of training steps before it, in vectors: a rank's shard of the parameters.
"""

from __future__ import annotations

import contextlib
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch

from benchmarks.frame import Table, benchmark
from benchmarks.llamas import LLAMAS, random_llama
from benchmarks.processes import apart, run
from benchmarks.tables import ROOT

RANKS = 2
SMOLLM2 = "SmolLM2-135M"
_SHAPES = {**LLAMAS, "toy": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 256}}


@contextlib.contextmanager
def checkpoint(name: str) -> Iterator[Path]:
    """Give a directory with a model's weights and configuration, as transformers reads them."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if name != SMOLLM2:
        with random_llama(_SHAPES[name], 1, 256) as config:
            folder = Path(config["model"]["source"]).parent
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
            yield folder
        return
    from hpc_hess.config import make_config
    from hpc_hess.model.sources.source import resolve_source

    file = resolve_source(make_config({}).model).path
    with tempfile.TemporaryDirectory() as text:
        given = {"gguf_file": file.name}
        model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **given)
        model.hf_quantizer = None  # it is dequantised, but does not say so, and cannot be saved
        del model.config.quantization_config
        model.save_pretrained(text)
        AutoTokenizer.from_pretrained(file.parent, **given).save_pretrained(text)
        yield Path(text)


def peak_bytes() -> int:
    """Return the most memory that this process has held since :func:`forget_peak`."""
    return int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0]) * 1024


def forget_peak() -> None:
    """Begin anew with what this process holds now."""
    from hpc_hess.parallel.memory import release_memory

    release_memory()
    Path("/proc/self/clear_refs").write_text("5")


def measure(folder: str, length: int, batches: int, turns: int, basis: int) -> dict[str, Any]:
    """Be a rank of such a loop; return its seconds and its bytes."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModelForCausalLM

    import hpc_hess

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    draw = torch.Generator().manual_seed(dist.get_rank())
    rows = [torch.randint(3, model.config.vocab_size, (1, length), generator=draw) for _ in range(batches)]

    def gradient() -> None:
        for row in rows:
            (model(input_ids=row, labels=row).loss / len(rows)).backward()

    def seconds(function: Any) -> float:
        dist.barrier()
        began = time.perf_counter()
        function()
        dist.barrier()
        return time.perf_counter() - began

    forget_peak()
    for _ in range(2):
        gradient()
        optimizer.step()
        optimizer.zero_grad()
    of_loop = peak_bytes()
    operator = hpc_hess.hessian(model, [{"input_ids": row} for row in rows])
    hpc_hess.slq(operator, steps=basis, progress=False)
    over = peak_bytes() - of_loop
    records = operator._operator._operator.records  # type: ignore[attr-defined]
    calibration = sum(record.calibration for record in records)

    found: dict[str, list[float]] = {"gradients": [], "products": []}
    for k in range(turns):
        vector = torch.randn(operator.space.size_local, generator=torch.Generator().manual_seed(RANKS * k + dist.get_rank()))
        before = seconds(gradient)
        optimizer.zero_grad()
        product = seconds(partial(operator.matvec, operator.space.wrap(vector))) - records[-1].calibration_s
        found["gradients"].append((before + seconds(gradient)) / 2)
        optimizer.zero_grad()
        found["products"].append(product)
    dist.destroy_process_group()
    size = 4 * operator.space.size_local
    return {**found, "over": over / size, "calibration": calibration, "size": operator.shape[0]}


def loop(folder: Path, length: int, steps: int, every: int, lanczos_steps: int) -> str:
    """Run examples/fsdp2_loop.py on a text; return what it prints."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    data = ["--model", folder, "--text", ROOT / "launch" / "data" / "northanger_abbey.txt", "--rows", 1, "--length", length]
    asked = ["--steps", steps, "--every", every, "--lanczos-steps", lanczos_steps, "--rate", 1e-5]
    return run(*launcher, ROOT / "examples" / "fsdp2_loop.py", *data, *asked, threads=1)


@benchmark(
    "Inside a training program: FSDP2 on 2 ranks",
    asked={"*product through the API / two gradients*": "<= 1.05", "*memory over the loop's, in vectors*": "<= 3"},
    note="A product's time is without the gradients of a calibration, which are in its own row. The memory is without the "
    "rows of the basis.",
)
def main(
    table: Table,
    models: Annotated[tuple[str, ...], f"{SMOLLM2}, {', '.join(_SHAPES)}"] = (SMOLLM2,),
    length: Annotated[int, "tokens of a row; a batch is one row on each rank"] = 128,
    batches: Annotated[int, "of a gradient, on each rank"] = 2,
    turns: int = 4,
    basis: Annotated[int, "Lanczos steps of the spectrum whose memory is measured"] = 8,
    steps: Annotated[int, "of training; 0: leave out the loop of SmolLM2"] = 30,
    every: int = 10,
    lanczos_steps: int = 8,
    loop_length: Annotated[int, "tokens of a row there; a step of it is one row on each rank"] = 64,
) -> None:
    for name in models:
        with checkpoint(name) as folder:
            ranks = apart(measure, str(folder), length, batches, turns, basis, ranks=RANKS, threads=1)
            title, found = name if name == SMOLLM2 else f"random Llama, {name}", ranks[0]
            gradients, products = found["gradients"], found["products"]
            ratios = [p / (2 * g) for p, g in zip(products, gradients, strict=True)]
            table.measured(f"{title}: a gradient of the loop, s (median)", statistics.median(gradients))
            table.measured(f"{title}: product through the API / two gradients (median)", statistics.median(ratios))
            table.measured(f"{title}: the least and the most of it", f"{min(ratios):.3f} to {max(ratios):.3f}")
            table.measured(f"{title}: gradients of calibrations, in {basis} Lanczos steps", found["calibration"])
            over = max(rank["over"] for rank in ranks)
            table.measured(f"{title}: memory over the loop's, in vectors, without {basis} rows of the basis", over - basis)
            if name == SMOLLM2 and steps:
                text = loop(folder, loop_length, steps, every, lanczos_steps)
                what = f"{title}: {steps} steps, every {every} a spectrum of {lanczos_steps} Lanczos steps"
                for step, loss, largest, trace in re.findall(
                    r"step (\d+): loss ([\d.]+), lambda max ([\d.e+-]+),.* trace ([\d.e+-]+)", text
                ):
                    table.measured(f"{title}: loss, lambda max, trace at step {step}", f"{loss}, {largest}, {trace}")
                table.measured(f"{what}: spectra's share of the time", re.findall(r"spectra took (\d+%)", text)[0])


if __name__ == "__main__":
    main()
