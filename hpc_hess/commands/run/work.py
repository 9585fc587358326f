"""One SPMD run: a session around it, and what the terminal shows of its end."""

from __future__ import annotations

import contextlib
from pathlib import Path

from hpc_hess.commands.run.screen import print_summary
from hpc_hess.commands.run.tracking import Tracking, check_installed
from hpc_hess.config import Config
from hpc_hess.parallel import devices
from hpc_hess.parallel.world import World
from hpc_hess.profiling.flops import measure_limits
from hpc_hess.session.problem import dtype_of, read_inputs
from hpc_hess.session.session import opened
from hpc_hess.session.stopping import EXIT_STOPPED, Stopper
from hpc_hess.studies.opening import goes_on
from hpc_hess.studies.whole_run import make


def run(config: Config, world: World, stopper: Stopper | None = None) -> int:
    """Compute what the configuration asks for, or go on with it. Returns the exit code. Collective: yes.

    ``stopper`` : of a command that runs more than this; else signals and run.time_limit count from here on.

    Raises
    ------
    HpcHessError : as one sentence for the user; the run directory keeps every committed step.

    """
    check_installed(config, world)
    total = config.lanczos.steps * config.lanczos.probes
    with opened(config, world, Path(config.run.out), total, stopper=stopper) as session:
        existing = goes_on(session)
        limits = [] if existing else _limits(config, world)
        tracking = Tracking(session)
        inputs = read_inputs(config, world, build=not existing)  # a finished run needs no model
        made = make(session, inputs, existing=existing, limits=limits, begun=tracking.begin)
        if not made.stopped:
            if world.rank == 0:
                session.progress.close()
                print_summary(made.result, session.out, made.report)
                tracking.finish(made.result)
            world.barrier("finish")
            return 0
    world.barrier("stop")  # a launcher may end the others as soon as one rank leaves
    return EXIT_STOPPED


def _limits(config: Config, world: World) -> list[float]:
    """Return what every rank reaches at least of a matrix product and of a copy. Collective: yes."""
    dtype = config.model.compute_dtype
    with devices.tf32() if dtype == "tf32" else contextlib.nullcontext():
        mine = measure_limits(world.device, dtype_of(dtype))
    return [-world.max_over_ranks(-rate, "speed of the machine") for rate in mine]
