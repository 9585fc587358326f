"""A machine that is not Linux, as far as the package can tell: ``python -m tests.support.elsewhere OUT`` runs a toy there.

What other packages ask of the system they still get: on another system they have forms of their own.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[2]
TOY = "launch/configs/toy.toml"
SETTINGS = [
    "operator.method=exact",
    'parameters.include=["*norm.weight"]',
    "lanczos.steps=4",
    "lanczos.probes=1",
    "lanczos.reorthogonalise=2",
    "analysis.eigenpairs=1",
    "analysis.most_products=8",
]
_PLACES = ("/proc", "/sys", "/dev/shm")
_OF_OS = ("memfd_create", "posix_fadvise", "posix_fallocate", "pidfd_open", "copy_file_range", "splice", "eventfd")
_OF_C = ("fallocate", "posix_fallocate", "mallopt", "malloc_trim", "prctl")
denied: set[str] = set()


def _by_the_package() -> bool:
    """Return whether the code at work is the package's own, not that of a package that it called."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if "site-packages" in file or "dist-packages" in file:
            return False
        if file.startswith(str(ROOT / "hpc_hess")):
            return True
        frame = frame.f_back
    return False


def _deny(path: Any) -> None:
    if isinstance(path, str | bytes | os.PathLike):
        text = os.fsdecode(path)
        if text.startswith(_PLACES) and _by_the_package():
            denied.add(text)
            raise FileNotFoundError(2, "not on this system", text)


def _hear(event: str, args: tuple[Any, ...]) -> None:
    if event in ("open", "os.listdir", "os.scandir"):
        _deny(args[0])


class _Library(ctypes.CDLL):
    def __getattr__(self, name: str) -> Any:
        if name in _OF_C and _by_the_package():
            denied.add(name)
            raise AttributeError(name)
        return super().__getattr__(name)


def mask() -> None:
    """From now on this process has none of what is Linux's alone."""
    sys.addaudithook(_hear)
    for name in ("stat", "lstat", "readlink"):
        _wrap(name)
    for name in [*_OF_OS, *(name for name in vars(os) if name.startswith(("sched_", "POSIX_FADV_", "MFD_")))]:
        if hasattr(os, name):
            delattr(os, name)
    ctypes.CDLL = _Library  # type: ignore[misc]


def _wrap(name: str) -> None:
    inner = getattr(os, name)

    def outer(path: Any, *args: Any, **options: Any) -> Any:
        _deny(path)
        return inner(path, *args, **options)

    setattr(os, name, outer)


def go_through(out: Path) -> None:
    """Run the toy until it is stopped half-way, go on, look at it, clean it."""
    import torch.distributed as dist

    from hpc_hess.cli import main
    from hpc_hess.session.stopping import Stopper
    from hpc_hess.storage import drivers

    drivers._LARGE = 1  # every row is large
    command = ["run", TOY, *(word for setting in [*SETTINGS, f"run.out={out}"] for word in ("--set", setting))]
    asked = [0]

    def agreed(self: Stopper, next_step_s: float) -> str:
        asked[0] += 1
        return "a test asks for it" if asked[0] > 2 else ""

    with mock.patch.object(Stopper, "agreed", agreed):
        assert main(command) == 75
    dist.destroy_process_group()
    assert main(command) == 0
    assert main(["inspect", str(out), "--verify"]) == 0
    assert main(["clean", str(out)]) == 0


if __name__ == "__main__":
    mask()
    go_through(Path(sys.argv[1]))
    sys.stdout.flush()
    print("denied:", *sorted(denied), file=sys.stderr, flush=True)
    os._exit(0)  # as the program ends
