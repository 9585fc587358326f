"""Memory that control groups leave to a process, in both versions of their file system; pages kept; garbage."""

from __future__ import annotations

import contextlib
import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hpc_hess import system
from hpc_hess.parallel.memory import host_bytes_free
from hpc_hess.system import group_bytes_free, importing, reusing_freed_pages


def group(folder: Path, *files: tuple[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files:
        (folder / name).write_text(text)


def version_2(folder: Path, limit: str, used: int, droppable: int) -> None:
    group(
        folder,
        ("memory.max", limit),
        ("memory.current", str(used)),
        ("memory.stat", f"anon 5\ninactive_file {droppable}\nactive_file 9\n"),
    )


def version_1(folder: Path, limit: int, used: int, droppable: int) -> None:
    group(
        folder,
        ("memory.limit_in_bytes", str(limit)),
        ("memory.usage_in_bytes", str(used)),
        ("memory.stat", f"inactive_file 1\ntotal_inactive_file {droppable}\n"),
    )


def left(root: Path, own: str) -> list[int]:
    (root / "own").write_text(own)
    return sorted(group_bytes_free(root, root / "own"))


@pytest.mark.parametrize(("limit", "expected"), [("1000", [640]), ("max", [])])
def test_version_2(tmp_path: Path, limit: str, expected: list[int]) -> None:
    version_2(tmp_path / "job" / "step", limit, 400, 40)
    version_2(tmp_path / "job", "max", 1, 0)
    assert left(tmp_path, "0::/job/step\n") == expected


def test_the_group_around_a_group_counts(tmp_path: Path) -> None:
    version_2(tmp_path / "job" / "step", "1000", 400, 40)
    version_2(tmp_path / "job", "900", 500, 0)
    assert left(tmp_path, "0::/job/step\n") == [400, 640]


def test_version_1(tmp_path: Path) -> None:
    version_1(tmp_path / "memory" / "job", 1000, 900, 100)
    assert left(tmp_path, "9:name=systemd:/\n4:memory:/job\n1:cpu,cpuacct:/\n0::/\n") == [200]


def test_a_system_without_control_groups(tmp_path: Path) -> None:
    assert list(group_bytes_free(tmp_path, tmp_path / "none")) == []
    assert host_bytes_free() > 0


def test_no_garbage_is_looked_for_while_modules_are_imported() -> None:
    with importing():
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.disable()
    try:
        with importing():
            pass
        assert not gc.isenabled()  # as its owner has it
    finally:
        gc.enable()


def test_freed_pages_are_kept_until_the_outermost_block_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    library = SimpleNamespace(mallopt=lambda *words: calls.append(words), malloc_trim=lambda pad: calls.append("trim"))
    monkeypatch.setattr(system, "_c_library", lambda: library)
    with contextlib.suppress(KeyError), reusing_freed_pages():
        begun = list(calls)
        with reusing_freed_pages():
            pass
        assert calls == begun
        raise KeyError
    assert calls[-1] == "trim"
    assert "trim" not in begun
    with reusing_freed_pages():
        assert calls[-len(begun) :] == begun  # again, after an error
