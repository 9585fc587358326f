"""The planner against what is known: sizes of shards, operations of a transformer, bytes of collectives, real memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from hpc_hess.cli import main
from hpc_hess.commands.run.work import run
from hpc_hess.config import Config, make_config
from hpc_hess.errors import ConfigError
from hpc_hess.parallel.world import World
from hpc_hess.planning import planner as planning
from hpc_hess.planning.machine import KNOWN, Machine, seconds
from hpc_hess.planning.plan import Plan
from hpc_hess.planning.planner import Planner, Trace
from hpc_hess.planning.tracing import Collective, Operation, Work

pytestmark = pytest.mark.slow

HIDDEN, INNER, LAYERS, VOCABULARY, LENGTH = 256, 512, 4, 1024, 64
BLOCK = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER + 2 * HIDDEN
NUM_PARAMS = LAYERS * BLOCK + 2 * VOCABULARY * HIDDEN + HIDDEN


@pytest.fixture(autouse=True, scope="module")
def traced_once() -> Iterator[None]:
    """Plans on several machines read the same dry run."""
    found: dict[tuple[Any, ...], Trace] = {}
    trace = planning.trace

    def once(config: Config, ranks: int, local_ranks: int, *, gloo: bool = False) -> Trace:
        key = config.to_toml(), ranks, local_ranks, gloo
        if key not in found:
            found[key] = trace(config, ranks, local_ranks, gloo=gloo)
        return found[key]

    with mock.patch.object(planning, "trace", once):
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shape") / "config.json"
    path.write_text(
        json.dumps(
            {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "hidden_size": HIDDEN,
                "intermediate_size": INNER,
                "num_hidden_layers": LAYERS,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "vocab_size": VOCABULARY,
                "max_position_embeddings": 512,
                "tie_word_embeddings": False,
            }
        )
    )
    return path


def settings(source: Path, **sections: Any) -> Config:
    return make_config(
        {
            "model": {"source": str(source)},
            "data": {"sequences": 8, "sequence_length": LENGTH, "micro_batch": 2},
            "operator": {"check": False} | sections.pop("operator", {}),
            **sections,
        }
    )


def flops_of_a_gradient(tokens: int) -> float:
    """6 for each weight that a token meets, and attention's two products, forward once and backward twice (2.5 flash)."""
    weights = LAYERS * (BLOCK - 2 * HIDDEN) + VOCABULARY * HIDDEN
    return 6 * weights * tokens + LAYERS * 4 * LENGTH * HIDDEN * tokens * 3.5


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_operations_and_bytes_of_differences(source: Path, ranks: int) -> None:
    found = planning.trace(settings(source), ranks, ranks)
    assert found.num_params == NUM_PARAMS
    assert found.num_params_local >= NUM_PARAMS / ranks
    assert found.micro_batches * found.tokens * ranks == 8 * LENGTH
    assert found.gradient.flops == pytest.approx(flops_of_a_gradient(8 * LENGTH // ranks), rel=0.02)
    assert found.product.flops == pytest.approx(2 * found.gradient.flops, rel=0.02)
    assert found.peak.parts["parameters"] == pytest.approx(4 * found.num_params_local, rel=0.01)
    assert found.peak.bytes > 5 * 4 * found.num_params_local  # parameters, theta_0, a probe, two gradients
    sent = found.gradient.sent()
    if ranks == 1:
        assert sent == {}
    else:  # blocks are gathered for the way there and again for the way back; what lies outside may stay
        blocks, all_ = 4 * LAYERS * BLOCK * found.micro_batches, 4 * NUM_PARAMS * found.micro_batches
        assert blocks + all_ * 0.99 < sent["all-gather"] < 2 * all_ * 1.02
        assert sent["reduce-scatter"] == pytest.approx(all_, rel=0.02)


@pytest.mark.parametrize("ranks", [1, 4])
def test_exact_products_and_probes_in_lock_step(source: Path, ranks: int) -> None:
    one = planning.trace(settings(source, operator={"method": "exact"}), ranks, ranks)
    four = planning.trace(settings(source, operator={"method": "exact"}, lanczos={"probes": 4}), ranks, ranks)
    gradient = planning.trace(settings(source), ranks, ranks).gradient
    assert 2.5 < one.product.flops / gradient.flops < 5
    assert four.width == 4
    assert four.product.flops < 4 * one.product.flops
    if ranks > 1:
        assert one.product.sent()["all-gather"] > 1.9 * 4 * NUM_PARAMS * one.micro_batches


@pytest.mark.parametrize("method", ["finite_difference", "exact"])
def test_a_run_counts_the_operations_that_were_planned(source: Path, tmp_path: Path, method: str) -> None:
    np.save(tmp_path / "tokens.npy", np.arange(8 * LENGTH) % VOCABULARY)
    config = make_config(
        {
            "model": {"source": str(source)},
            "lanczos": {"steps": 2},
            "operator": {"method": method, "check": False},
            "data": {
                "source": f"tokens:{tmp_path / 'tokens.npy'}",
                "sequences": 8,
                "sequence_length": LENGTH,
                "micro_batch": 2,
            },
            "run": {"out": str(tmp_path / "run")},
        }
    )
    world = World.join("cpu", 60.0)
    assert run(config, world) == 0
    world.leave()
    timing = json.loads((tmp_path / "run" / "result.json").read_text())["timing"]
    assert timing["product_flops"] == pytest.approx(planning.trace(config, 1, 1).product.flops, rel=5e-3)
    assert 0 < timing["product_flops_per_s"] < 1.5 * timing["limits_per_s"]["flops_per_s"]
    assert timing["orthogonalisation_bytes_per_s"] > 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "of a matrix product" in page


def test_micro_batches_are_counted_and_not_traced(source: Path) -> None:
    few = planning.trace(settings(source), 1, 1)
    many = planning.trace(settings(source, data={"sequences": 80, "sequence_length": LENGTH, "micro_batch": 2}), 1, 1)
    assert many.gradient.flops == 10 * few.gradient.flops
    assert many.product.flops == pytest.approx(10 * few.product.flops, rel=0.02)
    assert many.peak.bytes == few.peak.bytes


def test_experts_get_even_shares(tmp_path: Path) -> None:
    shape = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 256,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 512,
    }
    (tmp_path / "config.json").write_text(json.dumps(shape))
    found = planning.trace(settings(tmp_path / "config.json"), 1, 1)
    weights = 2 * (4 * 64 * 64 + 64 * 8 + 2 * 3 * 64 * 128) + 256 * 64
    tokens = 8 * LENGTH
    expected = 6 * weights * tokens + 2 * 4 * LENGTH * 64 * tokens * 3.5
    assert found.gradient.flops == pytest.approx(expected, rel=0.05)


def test_seconds_of_a_machine() -> None:
    machine = Machine("m", {"float32": 1e9}, 1e8, 1 << 30, 1e-3, 1e6, 1e5, 0.0)
    work = Work()
    work.operations[Operation("float32", 2_000_000_000, 8)] = 2  # bound by arithmetic
    work.operations[Operation("float32", 0, 300_000_000)] = 1  # by memory
    work.operations[Operation("float32", 1, 1)] = 1000  # by their launch
    work.collectives[Collective("all-gather", 4_000_000)] = 1
    assert seconds(work, machine, 1, 1) == (8.0, 0.0)
    assert seconds(work, machine, 4, 4) == (8.0, 3.0)
    assert seconds(work, machine, 8, 4).traffic == pytest.approx(4e6 * 7 / 8 / 4e5)


def test_what_fits_and_where(source: Path, tmp_path: Path) -> None:
    small = Machine("small", {"float32": 1e12}, 1e11, 2_000_000_000, 1e-6, 1e9, 1e9, 1e-5)
    (tmp_path / "small.json").write_text(small.to_json())
    assert Machine.read(str(tmp_path / "small.json")) == small
    config = settings(source, lanczos={"steps": 400})

    def plan(name: str, host_bytes: int) -> Plan:
        return Planner(config, 1, name, host_bytes).plan(1)

    assert not plan(str(tmp_path / "small.json"), 0).fits
    assert plan(str(tmp_path / "small.json"), 20_000_000_000).placement == "host"
    assert plan("h100", 0).placement == "device"
    assert plan("h100", 0).store_bytes == 400 * 4 * NUM_PARAMS
    with pytest.raises(ConfigError, match="--nodes 0: give at least one"):
        Planner(config, 1, "h100", 0).plan(0)
    with pytest.raises(ConfigError, match="--gpus-per-node 0: give at least one"):
        Planner(config, 0, "h100", 0)
    with pytest.raises(ConfigError, match=r"no such GPU: 'h99'; known are a100, a100-40, h100, h200, or a file"):
        Machine.read("h99")
    assert KNOWN["h200"].memory_bytes > KNOWN["h100"].memory_bytes


def test_what_would_make_it_fit(source: Path, tmp_path: Path) -> None:
    config = settings(source, lanczos={"basis_memory": "device", "steps": 100})
    host_bytes = 2**40

    def planner(memory_bytes: int) -> Planner:
        machine = Machine("tight", {"float32": 1e12}, 1e11, memory_bytes, 1e-6, 1e9, 1e9, 1e-5)
        (tmp_path / "tight.json").write_text(machine.to_json())
        return Planner(config, 1, str(tmp_path / "tight.json"), host_bytes)

    tight = planner(planner(1).plan(1).device_bytes - 1)  # a byte is missing
    found = tight.suggestions(tight.plan(1))
    assert [change for change, _ in found] == ["--set lanczos.basis_memory=auto", "--nodes 2"]
    assert all(better.fits for _, better in found)
    assert found[0][1].placement == "host"
    tight = planner(1_600_000_000)
    smallest = tight.smallest(tight.plan(1))
    assert smallest is not None
    assert smallest.nodes > 1
    assert not tight.plan(smallest.nodes - 1).fits
    assert tight.smallest(tight.plan(smallest.nodes + 2)).nodes == smallest.nodes  # type: ignore[union-attr]


def test_the_command(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.toml"
    np.save(tmp_path / "tokens.npy", np.zeros(10, np.int64))
    path.write_text(f'[model]\nsource = "{source}"\n[operator]\ncheck = false\n')
    assert main(["plan", str(path), "--nodes", "1", "--gpus-per-node", "2"]) == 0
    text = capsys.readouterr().out
    assert "fits, with the basis on the device" in text
    assert "all-gather" in text
    assert main(["plan", str(path), "--nodes", "1", "2", "--gpus-per-node", "2"]) == 0
    assert "whole run" in capsys.readouterr().out.splitlines()[0]
    assert main(["plan", str(path), "--sweep", "--nodes", "3", "--gpus-per-node", "1"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["nodes", "1", "2", "3"]
    assert main(["plan", str(path), "--smallest", "--nodes", "2", "--gpus-per-node", "1"]) == 0
    assert "on 1 node x 1 rank" in capsys.readouterr().out
    assert main(["plan", str(path), "--gpu", "nothing"]) == 2
    assert "no such GPU" in capsys.readouterr().err
