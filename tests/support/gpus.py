"""GPUs of a kind that is not here, pretended: torch answers about them, and computes nothing on them."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

MEMORY = {"memory_reserved": 70, "memory_allocated": 30, "max_memory_allocated": 50, "get_memory_info": (1000, 2000)}


class Event:
    """A mark in the stream of a pretended GPU."""

    def __init__(self, gpus: PretendedGPUs) -> None:
        self._gpus, self._at = gpus, -1.0

    def record(self) -> None:
        self._at = self._gpus.clock_ms

    def elapsed_time(self, end: Event) -> float:
        assert self._gpus.waited
        return end._at - self._at


class PretendedGPUs:
    """GPUs with these identities, as torch shows them from here on, until ``patch`` is undone."""

    def __init__(self, patch: pytest.MonkeyPatch, kind: str, identities: Sequence[str] = ("a", "b")) -> None:
        self._kind, self._identities = kind, identities
        self.chosen: list[torch.device] = []
        self.clock_ms, self.waited = 0.0, False
        for name, value in MEMORY.items():
            patch.setattr(torch.accelerator, name, lambda device, value=value: self._of(device, value))
        patch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device(kind))
        patch.setattr(torch.accelerator, "device_count", lambda: len(identities))
        patch.setattr(torch.accelerator, "set_device_index", self.chosen.append)
        patch.setattr(torch.accelerator, "synchronize", lambda device: setattr(self, "waited", True))
        module = SimpleNamespace(Event=self._event, get_device_properties=self._properties)
        patch.setattr(torch, "get_device_module", lambda device: self._of(device, module))

    def _of(self, device: torch.device, value: Any) -> Any:
        assert device.type == self._kind
        return value

    def _event(self, *, enable_timing: bool) -> Event:
        assert enable_timing
        return Event(self)

    def _properties(self, device: torch.device) -> Any:
        return SimpleNamespace(name="Pretended 1", uuid=self._identities[device.index], total_memory=2000)
