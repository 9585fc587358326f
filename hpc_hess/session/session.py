"""The session: what a command is given to work with, from the lock of its directory to the last line that it prints."""

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
from hpc_hess.storage.events import EventLog
from hpc_hess.storage.lock import RunLock
from hpc_hess.system import missing


@dataclass
class Session:
    """A command at work in the directory ``out``, which it alone writes to.

    Attributes
    ----------
    stopper : asks to stop, by signals and time limits, until the session ends.
    lock : of ``out``. ``held`` gives it back, after everything that was entered later.
    progressed : something was kept that the next start can go on from.

    """

    config: Config
    world: World
    out: Path
    progress: Progress
    stopper: Stopper
    lock: RunLock
    events: EventLog
    held: contextlib.ExitStack
    progressed: bool = False
    _counted: bool = False

    def stopped(self, reason: str, when: str = "") -> int:
        """Say why the command ends early; return its exit code. Collective: yes.

        Raises
        ------
        ConfigError : it is the third start in a row without progress.

        """
        self.progress.note(f"stopped early{when}: {reason}; run the same command to go on")
        self.count_stop(reason)
        self.world.barrier("stop")
        return EXIT_STOPPED

    def count_stop(self, reason: str) -> None:
        """Count a start that ends early. Collective: yes. Raises ConfigError as :meth:`stopped`."""
        note_stop(self.world, self.out, reason, progressed=self.progressed)
        self._counted = True

    def got_through(self) -> None:
        """Forget starts that ended early without progress. Collective: yes."""
        clear_starts(self.world, self.out)
        self._counted = True


@contextlib.contextmanager
def opened(
    config: Config, world: World, out: Path, total: int, *, stopper: Stopper | None = None, shown: bool = True
) -> Iterator[Session]:
    """Form the mesh, show progress of ``total`` steps, listen to signals and time limits, lock ``out``. Collective: yes.

    The world of a user's program has its groups already, and gets no mesh.

    ``stopper`` : of a command that runs several sessions; else signals and run.time_limit count from here on.
    ``shown`` : whether rank 0 shows anything.

    Raises
    ------
    HpcHessError : the mesh is not possible; another job has the directory.

    """
    if not config.problem.in_program:
        world.make_mesh(config.parallel.replicate)
    with make_progress(shown and world.rank == 0, total) as progress, contextlib.ExitStack() as held:
        stopper = stopper or held.enter_context(Stopper(world, config.run.time_limit, config.run.grace_s))
        lock = RunLock.acquire(out, world)
        session = Session(config, world, out, progress, stopper, lock, EventLog(out, world), held)
        held.callback(lambda: session.lock.release())  # the one that it is by then
        for note in filter(None, [missing(world.size), stopper.note]):
            progress.note(note)
        stopper.note = ""  # of several sessions, the first says it
        yield session
        if not session._counted:
            session.got_through()
