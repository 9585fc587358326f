"""What the server of ranks has imported when it forks them (spawn.py). Ranks start without MPI, and so does it."""

from __future__ import annotations

import contextlib
import gc

with contextlib.suppress(ImportError):
    import mpi4py

    mpi4py.rc.initialize = False  # else h5py, where it is built for MPI, starts it

import matplotlib.figure  # noqa: F401
import pytest  # noqa: F401
import scipy.stats  # noqa: F401
import torch.distributed.fsdp  # noqa: F401
import transformers.models.auto.modeling_auto
import transformers.models.llama.modeling_llama  # noqa: F401

import hpc_hess.api
import hpc_hess.commands.run.work  # noqa: F401

gc.collect()
gc.freeze()  # no rank looks through all that again
