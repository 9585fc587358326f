"""How ranks find each other: the store at rank 0, the process group, and the watchdog that looks after it."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from hpc_hess.errors import CollectiveError
from hpc_hess.parallel.launcher import Launch, is_loopback, master_endpoint
from hpc_hess.parallel.watchdog import Watchdog
from hpc_hess.system import loopback


def meet(launch: Launch, backend: str, mpi: Any, timeout_s: float) -> Watchdog | None:
    """Open the process group; return its watchdog, None where there is one rank. Collective: yes.

    Raises
    ------
    LaunchError : the launcher does not say where rank 0 is.
    CollectiveError : the other ranks did not come within the timeout.

    """
    timeout = timedelta(seconds=timeout_s)
    try:
        if launch.size == 1:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
            return None
        address, port = master_endpoint(launch, os.environ, mpi)
        # torchrun's agent already serves a store on this port; elsewhere rank 0 does
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        served: Any = dist.TCPStore(address, port, launch.size, launch.rank == 0 and not agent, timeout=timeout)
        prefix = f"hpc_hess/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        store = dist.PrefixStore(prefix, served)
        if _all_on_loopback(store, launch, address):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback())  # made-up host names need not resolve
        dist.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.size, timeout=timeout)

        def connect() -> Any:
            wait = timedelta(seconds=min(10.0, timeout_s))
            return dist.PrefixStore(prefix, dist.TCPStore(address, port, is_master=False, timeout=wait))

        return Watchdog(launch.rank, launch.size, connect, timeout_s)
    except (RuntimeError, ValueError, OSError) as error:
        first = str(error).split("\n", 1)[0]
        several = ", GLOO_SOCKET_IFNAME (the network between the nodes)" if launch.num_nodes > 1 else ""
        raise CollectiveError(
            f"rank {launch.rank} of {launch.size} could not join the others ({first}); check MASTER_ADDR, "
            f"MASTER_PORT{several} and that every rank was started"
        ) from error


def _all_on_loopback(store: Any, launch: Launch, address: str) -> bool:
    """Return whether every rank reaches rank 0 by the loopback interface, so that all are on one machine. Collective: yes.

    On the first of several nodes alone a host name may be 127.0.1.1.
    """
    store.set(f"loopback/{launch.rank}", str(is_loopback(address)))
    keys = [f"loopback/{rank}" for rank in range(launch.size)]
    return is_loopback(address) and set(store.multi_get(keys)) == {b"True"}
