"""torchrun, but its exit code is that of the first rank that failed, and a failure is shown once, by that rank.

A request to stop (TERM, USR1) goes to the ranks, which commit and end by themselves; torchrun alone would end them.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
from types import FrameType

import psutil
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main


def pass_on(number: int, frame: FrameType | None) -> None:
    """Send a signal to every rank of this node."""
    for rank in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            rank.send_signal(number)


signal.signal(signal.SIGTERM, pass_on)
signal.signal(signal.SIGUSR1, pass_on)
# the agent's own account of a failed rank repeats what the rank has said
logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)

try:
    main(["--signals-to-handle", "SIGINT,SIGHUP,SIGQUIT", *sys.argv[1:]])
except ChildFailedError as error:
    rank, failure = error.get_first_failure()
    if failure.exitcode >= 0:
        sys.exit(failure.exitcode)
    # ended by signal N: the rank could not say so itself; 128 + N, as a shell says it
    name = signal.Signals(-failure.exitcode).name
    hint = ": out of memory?" if name == "SIGKILL" else ""
    print(f"hpc-hess: error [rank {rank}]: the process was ended by {name}{hint}", file=sys.stderr, flush=True)
    sys.exit(128 - failure.exitcode)
