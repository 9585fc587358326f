"""A run that a user's program makes of an operator of its own: the same directory as that of ``hpc-hess run``."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hpc_hess.config import IN_PROGRAM, Config, ProblemSection
from hpc_hess.errors import StoppedError
from hpc_hess.model.sharded.parts import Parts
from hpc_hess.model.sharded.undisturbed import undisturbed
from hpc_hess.session.in_program import problem_of
from hpc_hess.session.session import opened
from hpc_hess.session.stopping import Stopper
from hpc_hess.studies.opening import goes_on
from hpc_hess.studies.whole_run import make


def run_in_program(
    parts: Parts, lanczos: Mapping[str, Any], out: Path, *, resume: bool
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Make the run ``out``, or go on with it; return alpha and beta of every probe. Collective: yes.

    The program's own handlers of SIGUSR1 and SIGTERM are called once the run is closed and the model is as it was.

    Parameters
    ----------
    lanczos : keys of the configuration's table of that name.
    resume : go on with a run that is there, else put it aside.

    Raises
    ------
    StoppedError : a signal asked for it, or the job ends; what was committed is kept.
    StoreError : the directory holds a run of another model, of other batches, loss or settings, or is in use.

    """
    world, config = parts.model.world, _config(parts, lanczos, out, resume=resume)
    total, shown = config.lanczos.steps * config.lanczos.probes, sys.stdout.isatty()
    with _handed_on(Stopper(world)) as stopper, undisturbed(parts.model.module):
        with opened(config, world, out, total, stopper=stopper, shown=shown) as session:
            made = make(session, problem_of(parts, config), existing=goes_on(session))
            found = world.broadcast(made.recurrences(), "coefficients of the probes")
        if made.stopped:
            again = "the same call" if resume else "the same call with resume=True"
            raise StoppedError(f"slq {made.stopped}; {again} goes on from {out}")
    return [(np.array(alpha), np.array(beta)) for alpha, beta in found]


@contextlib.contextmanager
def _handed_on(stopper: Stopper) -> Iterator[Stopper]:
    """Hand the signals that come meanwhile on to the program's own handlers, afterwards.

    A program without a handler of SIGTERM, which it meant to end, is told by StoppedError, or ends.
    """
    over = False
    try:
        with stopper:
            yield stopper
        over = True
    finally:
        for number in dict.fromkeys(stopper.received):
            if callable(signal.getsignal(number)) or (over and number == signal.SIGTERM):
                signal.raise_signal(number)


def _config(parts: Parts, lanczos: Mapping[str, Any], out: Path, *, resume: bool) -> Config:
    """Return the configuration of a run whose arguments were checked where they were given."""
    dtype = str(parts.model.space.dtype).removeprefix("torch.")
    tables: dict[str, Mapping[str, Any]] = {
        "model": {"master_dtype": dtype, "compute_dtype": dtype},
        "lanczos": {**lanczos, "lock_step": 1},
        "run": {"out": str(out), "resume": "auto" if resume else "never"},
        **parts.settings,
    }
    tables["operator"] = {**tables.get("operator", {}), "check": False}  # what the program did not ask for costs nothing
    config = Config(problem=ProblemSection.model_validate({"build": IN_PROGRAM, "loss": parts.loss}))
    return config.model_copy(update={name: getattr(config, name).model_copy(update=t) for name, t in tables.items()})
