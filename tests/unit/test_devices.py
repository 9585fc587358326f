"""GPUs of kinds that are not here, pretended: what stands in devices.py is all that the program asks of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
import torch

from hpc_hess.config import ParallelSection
from hpc_hess.errors import LaunchError
from hpc_hess.parallel import devices
from hpc_hess.parallel.memory import device_bytes_free, peak_bytes, used_bytes
from hpc_hess.parallel.timers import Timers
from hpc_hess.parallel.world import World, describe
from tests.support.gpus import PretendedGPUs

PACKAGE = Path(__file__).parents[2] / "hpc_hess"


@pytest.mark.parametrize(("kind", "backend"), [("cuda", "cpu:gloo,cuda:nccl"), ("xpu", "cpu:gloo,xpu:xccl")])
def test_a_rank_takes_a_gpu(monkeypatch: pytest.MonkeyPatch, kind: str, backend: str) -> None:
    pretended = PretendedGPUs(monkeypatch, kind)
    for wanted, local_rank, index in (("auto", 0, 0), (kind, 1, 1), (kind, 2, 0)):
        device = devices.take(wanted, local_rank)
        assert device == torch.device(kind, index)
        assert devices.backend(device) == backend
        assert devices.identity(device) == "ab"[index]
    assert pretended.chosen == [torch.device(kind, index) for index in (0, 1, 0)]
    assert devices.take("cpu", 0) == torch.device("cpu")
    other = next(other for other in devices.KINDS if other != kind)
    with pytest.raises(LaunchError, match=f'parallel.device = "{other}" but torch sees no such GPU; .* = "{kind}"'):
        devices.take(other, 0)


@pytest.mark.parametrize("kind", devices.KINDS)
def test_memory_and_names_of_a_gpu(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    PretendedGPUs(monkeypatch, kind)
    world = World.alone(f"{kind}:0")
    assert device_bytes_free(world) == 1000 + 70 - 30
    assert used_bytes(world.device) == 30
    assert peak_bytes(world.device) == 50
    assert devices.total_bytes(world.device) == 2000
    assert describe(world)["device"] == "Pretended 1"
    assert not world.gloo


@pytest.mark.parametrize("kind", devices.KINDS)
def test_phases_on_a_gpu_lie_between_marks(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    pretended = PretendedGPUs(monkeypatch, kind)
    timers = Timers(torch.device(kind, 0))
    timers.begin()
    with timers.phase("outer"):
        pretended.clock_ms += 1000.0
        with timers.phase("inner"):
            pretended.clock_ms += 500.0
    assert timers.take() == {"outer": 1.5, "inner": 0.5}
    assert timers.take() == {}


def test_an_accelerator_that_is_not_known_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A laptop's GPU, which has no double precision and no collectives: torch computes on the CPU, in the host's memory."""
    PretendedGPUs(monkeypatch, "mps")
    assert devices.take("auto", 0) == torch.device("cpu")
    assert devices.backend(torch.device("cpu")) == "gloo"
    with pytest.raises(LaunchError, match='parallel.device = "cuda" but torch sees no GPU; set parallel.device = "cpu"'):
        devices.take("cuda", 0)
    for device in (torch.device("mps"), torch.device("cpu")):
        assert devices.identity(device) == ""
        assert used_bytes(device) > 100  # of the host


def test_errors_of_collectives_are_known() -> None:
    for text in ("[gloo] timed out", "NCCL error: unhandled system error", "XCCL error"):
        assert devices.is_of_collectives(text)
    assert not devices.is_of_collectives("a shape is wrong")


def test_what_is_in_force_inside_exact_float32_ends_with_it() -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.allow_tf32 = True
    try:
        with devices.exact_float32():
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.skipif(not devices.find_kind(), reason="needs a GPU")
def test_a_gpu_that_is_here() -> None:
    device = devices.take("auto", 0)
    timers = Timers(device)
    timers.begin()
    free, used = devices.free_bytes(device), devices.used_bytes(device)
    with timers.phase("product"):
        a = torch.ones(1 << 11, 1 << 11, device=device)
        a @ a
    assert 0 < timers.take()["product"] < 60
    assert devices.used_bytes(device) - used == a.nbytes
    assert devices.peak_bytes(device) - used >= 2 * a.nbytes
    assert 0 <= free - devices.free_bytes(device) < 1 << 30
    assert devices.free_bytes(device) < devices.total_bytes(device)
    assert devices.identity(device)
    assert devices.name(device)


# -- where the words stand -------------------------------------------------------------------------------------------------

MAKERS = re.compile(r"cuda|nccl|xpu|xccl|cublas|cudnn|nvidia|rocm|torch\.accelerator|get_device_module", re.IGNORECASE)
LINUX = re.compile(
    r"/proc\b|/sys/|/dev/(shm|pts|tty)|fallocate|fadvise|memfd|sched_|mallopt|malloc_trim|ctypes|CDLL|prctl|PDEATHSIG|"
    r"getrusage|cgroup|THP_|sys\.platform|linux|darwin",
    re.IGNORECASE,
)
# module -> words that it may hold beside the one where they belong
MAKERS_TOO = {
    "config/sections.py": {"cuda", "xpu", "nvidia"},  # values that people write, and what they mean
    "profiling/flops.py": {"torch.accelerator"},  # waits for whatever it times; stands below devices.py
}


def words(pattern: re.Pattern[str], home: str) -> dict[str, set[str]]:
    """Return the words of each module but ``home``: in its code, its comments and what it says."""
    found = {
        str(path.relative_to(PACKAGE)): {match.group().lower() for match in pattern.finditer(path.read_text())}
        for path in PACKAGE.rglob("*.py")
    }
    assert found.pop(home)
    return {module: there for module, there in found.items() if there}


def test_what_is_a_makers_stands_in_one_place() -> None:
    assert words(MAKERS, "parallel/devices.py") == MAKERS_TOO


def test_what_is_linuxs_stands_in_one_place() -> None:
    assert words(LINUX, "system.py") == {}


def test_every_kind_can_be_asked_for() -> None:
    assert get_args(ParallelSection.model_fields["device"].annotation) == ("auto", "cpu", *devices.KINDS)
