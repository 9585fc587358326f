"""The program, ``hpc-hess``: a process of its own around the command line."""

import os
import sys

from hpc_hess.cli import main
from hpc_hess.errors import EXIT_STOPPED
from hpc_hess.parallel.launcher import leave_mpi


def entry() -> None:
    """Run one command and end the process at once, without the interpreter's own clean-up.

    By then everything is written and the ranks are past their last barrier, but threads of torch and gloo are alive; one
    that wakes up while the interpreter is taken down aborts the process, now and then, after a run that went well.
    """
    code = main()
    if code in (0, EXIT_STOPPED):  # after an error other ranks may never come to MPI's end
        leave_mpi()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    entry()
