"""What every long command does around its work: progress, requests to stop, the directory for itself alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hpc_hess.config import Config
from hpc_hess.console.progress import Progress, make_progress
from hpc_hess.parallel.world import World
from hpc_hess.session.starts import clear_starts, note_stop
from hpc_hess.session.stopping import EXIT_STOPPED, Stopper
from hpc_hess.storage.lock import RunLock


@dataclass
class Work:
    """A command at work in ``out``. ``held`` closes what it opens; ``progressed``: something was kept to go on from."""

    world: World
    progress: Progress
    stopper: Stopper
    held: contextlib.ExitStack
    out: Path
    progressed: bool = False
    _stopped: bool = False

    def stopped(self, reason: str, when: str = "") -> int:
        """Say why the command ends early; return its exit code. Collective: yes.

        Raises
        ------
        ConfigError : it is the third start in a row without progress.

        """
        self.progress.note(f"stopped early{when}: {reason}; run the same command to go on")
        note_stop(self.world, self.out, reason, progressed=self.progressed)
        self._stopped = True
        self.world.barrier("stop")
        return EXIT_STOPPED


@contextlib.contextmanager
def working(config: Config, world: World, out: Path, total: int) -> Iterator[Work]:
    """Form the mesh, show progress of ``total`` steps, listen to signals and time limits, lock ``out``. Collective: yes.

    Raises
    ------
    HpcHessError : the mesh is not possible; another job has the directory.

    """
    world.make_mesh(config.parallel.replicate)
    with (
        make_progress(world.rank == 0, total) as progress,
        Stopper(world, config.run.time_limit, config.run.grace_s) as stopper,
        contextlib.ExitStack() as held,
    ):
        held.callback(RunLock.acquire(out, world).release)
        work = Work(world, progress, stopper, held, out)
        yield work
        if not work._stopped:
            clear_starts(world, out)
