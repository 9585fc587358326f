"""World: who am I among the ranks, and the few collectives everything else is built from.

Collectives live here, in model/ (FSDP's own, and the exact product's gathers) and in storage/ (parallel HDF5).
Each takes a name, has the process group's timeout, and turns a failure into a CollectiveError with that name.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from hpc_hess.errors import CollectiveError, HpcHessError, LaunchError
from hpc_hess.parallel import devices, messages
from hpc_hess.parallel.failing import first_to_fail, linger
from hpc_hess.parallel.launcher import Launch, detect, mpi_world
from hpc_hess.parallel.meeting import meet
from hpc_hess.parallel.shard_collectives import ShardCollectives, TorchCollectives
from hpc_hess.parallel.shared_memory import SharedMemory, open_windows
from hpc_hess.parallel.timers import Timers
from hpc_hess.parallel.watchdog import Watchdog

T = TypeVar("T")


class World:
    """One SPMD job: rank, size, node, device, and the process groups.

    With HSDP (``replicate`` > 1) ranks form a replicate x shard grid; ``shard_rank`` and ``shard_size`` count within
    one replica, and every dot product is reduced within it. Use :meth:`join` or :meth:`alone`.
    """

    def __init__(self, launch: Launch, device: torch.device, *, connected: bool, mpi: Any = None) -> None:
        self.launch = launch
        self.rank, self.size = launch.rank, launch.size
        self.device = device
        self.connected = connected
        self.mpi = mpi  # mpi4py's COMM_WORLD when it spans exactly these ranks, else None
        self.mesh: Any = None
        self.replica, self.num_replicas = 0, 1
        self.shard_rank, self.shard_size = self.rank, self.size
        self._groups: list[Any] = [None]  # each of a dimension of the grid, inner ones first; together they reach all ranks
        self._shard_group: Any = None
        self.replica_group: Any = None  # the ranks that hold what this one holds
        self._carrier: torch.device | None = None  # where values must lie to travel; None: they travel as they lie
        self.collectives: ShardCollectives = TorchCollectives(None, gloo=False)  # until there is a mesh
        self._watchdog: Watchdog | None = None
        self.timers = Timers(device)

    # -- set-up and teardown -------------------------------------------------------------------------------------

    @classmethod
    def alone(cls, device: str = "cpu") -> World:
        """Return a world of one process that never communicates (notebooks, tools)."""
        return cls(Launch("alone", 0, 1, 0, 1, 0, 1), torch.device(device), connected=False)

    @classmethod
    def within(cls, device: torch.device, shards: Any, replicas: Any) -> World:
        """Return the world of process groups that a program has made: of ranks that share parameters, and that repeat them.

        Either may be None. The program keeps its groups: never :meth:`leave` this world. Collective: yes.
        """
        sizes = [dist.get_world_size(group) if group is not None else 1 for group in (shards, replicas)]
        shard, replica = (dist.get_rank(group) if group is not None else 0 for group in (shards, replicas))
        rank, size = replica * sizes[0] + shard, sizes[0] * sizes[1]
        world = cls(Launch("program", rank, size, 0, 1, 0, 1), device, connected=True)
        world._groups = [group for group in (shards, replicas) if group is not None]
        world._shard_group, world.replica_group = shards, replicas
        (world.shard_size, world.num_replicas), world.shard_rank, world.replica = sizes, shard, replica
        if not all("cpu:" in dist.get_backend_config(group) for group in world._groups):
            world._carrier = device
        world.collectives = TorchCollectives(shards, gloo=world.gloo)
        hosts = world.gather(socket.gethostname(), "meet the other ranks")
        world.launch = replace(world.launch, local_size=hosts.count(hosts[rank]), num_nodes=len(set(hosts)))
        return world

    @classmethod
    def join(cls, device: str = "auto", timeout_s: float = 1800.0, *, want_mpi: bool = True) -> World:
        """Join the process group that the launcher's environment describes. Collective: yes.

        Raises
        ------
        LaunchError : MPI and torch disagree on the world, or no GPU where one was asked for.
        CollectiveError : the other ranks did not come within the timeout.

        """
        launch = detect(os.environ)
        torch_device = devices.take(device, launch.local_rank)  # that no two ranks have the same is seen below
        mpi = mpi_world(launch, wanted=want_mpi)
        watchdog = meet(launch, devices.backend(torch_device), mpi, timeout_s)
        world = cls(launch, torch_device, connected=True, mpi=mpi)
        world._watchdog = watchdog
        world.barrier("join the world")
        world.require_own_gpu(devices.identity(torch_device))
        return world

    def one_first(self, work: Callable[[bool], T], name: str) -> T:
        """Return work(True) on rank 0, then on one rank of each other node, then work(False) on all others. Collective: yes.

        For work without collectives that fills a cache, of the node or of all nodes, in which ranks would meet. It may take
        longer than the timeout, as downloads do: it runs in a thread, and the ranks meet every second meanwhile. Where it
        fails on some rank, every rank raises that error, and no other rank begins.
        """
        turn = 0 if self.rank == 0 else 1 if self.launch.local_rank == 0 else 2
        found: list[T] = []
        failed: list[BaseException] = []

        def run() -> None:
            try:
                found.append(work(turn < 2))
            except BaseException as error:  # it is raised where it can be seen
                failed.append(error)

        for now in range(3 if self.size > 1 else 1):
            thread = threading.Thread(target=run, name=name, daemon=True)
            if now == turn:
                thread.start()
            wait_s = 0.01
            while self.any_true(thread.is_alive(), name):
                thread.join(wait_s) if now == turn else time.sleep(wait_s)
                wait_s = min(2 * wait_s, 1.0)
            if failed and not isinstance(failed[0], HpcHessError):
                raise failed[0]
            self.raise_together(cast(HpcHessError, failed[0]) if failed else None, name)
        return found[0]

    def require_own_gpu(self, mine: str) -> None:
        """Refuse two ranks with the same GPU. ``mine``: what devices.identity() says of this rank's. Collective: yes.

        Raises
        ------
        LaunchError : on every rank; rank 0 is the one that shows it.

        """
        everyone = self.gather(mine, "compare the GPUs")
        for rank, name in enumerate(everyone):
            if name and (first := everyone.index(name)) < rank:
                raise LaunchError(
                    f"ranks {first} and {rank} share the GPU {name}: start at most one rank per GPU, or let the launcher "
                    "show each rank its own",
                    shown_by_other=self.rank > 0,
                )

    def make_mesh(self, replicate: int = 1) -> None:
        """Arrange the ranks as replicate x shard and remember this rank's place. Collective: yes.

        Raises
        ------
        LaunchError : ``replicate`` does not divide the number of ranks.

        """
        if self.size % replicate:
            raise LaunchError(f"parallel.replicate = {replicate} does not divide the {self.size} ranks")
        from torch.distributed.device_mesh import init_device_mesh

        self.num_replicas, self.shard_size = replicate, self.size // replicate
        self.replica, self.shard_rank = divmod(self.rank, self.shard_size)
        kind = self.device.type
        if replicate == 1:
            self.mesh = init_device_mesh(kind, (self.size,), mesh_dim_names=("shard",))
        else:
            self.mesh = init_device_mesh(kind, (replicate, self.shard_size), mesh_dim_names=("replicate", "shard"))
        self._shard_group = self.mesh.get_group("shard")
        self.replica_group = self.mesh.get_group("replicate") if replicate > 1 else None
        self.collectives = self._open_collectives()

    def _open_collectives(self) -> ShardCollectives:
        """Choose how parameters and gradients travel: through shared memory where every rank can. Collective: yes."""
        if self.gloo and self.shard_size > 1:
            first = self.rank - self.shard_rank
            windows = open_windows(
                self.shard_size,
                lambda mine: self.gather(mine, "share memory")[first : first + self.shard_size],
                lambda seen: self.all_true(seen, "share memory"),
            )
            if windows is not None:
                return SharedMemory(windows, self.shard_rank, self._shard_group)
        return TorchCollectives(self._shard_group, gloo=self.gloo)

    def leave(self) -> None:
        """Leave the process group. Collective: yes."""
        if self._watchdog is not None:
            self._watchdog.close()
        if self.connected and dist.is_initialized():
            dist.destroy_process_group()
            self.connected = False

    # -- collectives ---------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def doing(self, what: str, *, gil_held: bool = False) -> Iterator[None]:
        """Tell the other ranks what this one is doing, in case it hangs; end it where that takes longer than the timeout.

        ``gil_held``: see Watchdog.doing.
        """
        with self._watchdog.doing(what, gil_held=gil_held) if self._watchdog else contextlib.nullcontext():
            yield

    @contextlib.contextmanager
    def _named(self, name: str, phase: str = "agreement") -> Iterator[None]:
        try:
            with self.timers.phase(phase), self.doing(name):
                yield
        except (RuntimeError, ValueError) as error:
            raise self._incomplete(name, error) from error

    @contextlib.contextmanager
    def guard(self, name: str) -> Iterator[None]:
        """Name the collectives inside library code, such as FSDP's. Every error that is not theirs passes unchanged.

        The block may take no longer than the timeout of a collective.

        Raises
        ------
        CollectiveError : a collective in the block did not complete.

        """
        try:
            with self.doing(name):
                yield
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and "gloo" not in str(error):  # gloo has no class of its own
                raise
            raise self._incomplete(name, error) from error

    def _incomplete(self, name: str, error: Exception) -> CollectiveError:
        first = str(error).strip().split("\n", 1)[0]
        return CollectiveError(
            f"rank {self.rank}: the collective '{name}' did not complete: another rank died, hangs, or was stopped "
            f"({first}){self._watchdog.absent() if self._watchdog else ''}"
        )

    @property
    def gloo(self) -> bool:
        """Whether tensors on this rank's device travel through gloo."""
        return self.device.type == "cpu"

    @property
    def shards_only(self) -> bool:
        """Whether dot products need no reduction because one rank holds the whole vector."""
        return not self.connected or self.shard_size == 1

    def sum_over_shards(self, values: torch.Tensor, name: str) -> torch.Tensor:
        """Sum float64 ``values`` in place over the ranks of one replica; equal bitwise on every rank afterwards.

        Collective: yes. With HSDP replica 0's sums are broadcast, so that replicas cannot drift apart.
        """
        if self.connected and self.shard_size > 1:
            with self._named(name, "all-reduce"), self.carried(values) as carried:
                dist.all_reduce(carried, group=self._shard_group)
        if self.connected and self.num_replicas > 1:
            with self._named(name, "all-reduce"), self.carried(values) as carried:
                dist.broadcast(carried, group_src=0, group=self.replica_group)
        return values

    def sum_over_replicas(self, values: torch.Tensor, name: str) -> torch.Tensor:
        """Sum ``values`` in place over the ranks that hold the same entries. Collective: yes."""
        if self.connected and self.num_replicas > 1:
            with self._named(name, "all-reduce"), self.carried(values) as carried:
                dist.all_reduce(carried, group=self.replica_group)
        return values

    def sum_over_ranks(self, values: torch.Tensor, name: str) -> torch.Tensor:
        """Sum ``values`` in place over all ranks. Collective: yes."""
        return self._reduced(values, dist.ReduceOp.SUM, name)

    def max_over_ranks(self, value: float, name: str) -> float:
        """Return the largest ``value`` of any rank. Collective: yes."""
        return float(self._reduced(torch.tensor([value], dtype=torch.float64), dist.ReduceOp.MAX, name))

    def _reduced(self, values: torch.Tensor, op: Any, name: str) -> torch.Tensor:
        if self.connected and self.size > 1:
            with self._named(name), self.carried(values) as carried:
                for group in self._groups:
                    dist.all_reduce(carried, op=op, group=group)
        return values

    @contextlib.contextmanager
    def carried(self, values: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield ``values`` where collectives can take them; what becomes of them is written back. Collective: no."""
        there = values if self._carrier is None else values.to(self._carrier)
        yield there
        if there is not values:
            values.copy_(there)

    def _sent(self, values: torch.Tensor) -> torch.Tensor:
        """Return rank 0's ``values`` on every rank."""
        with self.carried(values) as carried:
            for group in self._groups:
                dist.broadcast(carried, group=group, group_src=0)
        return values

    def _gathered(self, values: torch.Tensor) -> torch.Tensor:
        """Return every rank's ``values`` [n] as rows in rank order, on the host."""
        everyone = values[None] if self._carrier is None else values[None].to(self._carrier)
        for group in self._groups:
            parts = [torch.empty_like(everyone) for _ in range(dist.get_world_size(group))]
            dist.all_gather(parts, everyone, group=group)
            everyone = torch.cat(parts)
        return everyone.cpu()

    def all_true(self, flag: bool, name: str) -> bool:
        """Return whether ``flag`` holds on every rank. Collective: yes."""
        return self.max_over_ranks(0.0 if flag else 1.0, name) == 0.0

    def any_true(self, flag: bool, name: str) -> bool:
        """Return whether ``flag`` holds on some rank. Collective: yes."""
        return self.max_over_ranks(1.0 if flag else 0.0, name) == 1.0

    def broadcast(self, value: T, name: str) -> T:
        """Return rank 0's ``value`` (of a kind that messages.pack takes) on every rank. Collective: yes."""
        if not self.connected or self.size == 1:
            return value
        mine = messages.packed(value) if self.rank == 0 else b""
        with self._named(name):
            size = self._sent(torch.tensor([len(mine)]))
            buffer = self._sent(messages.buffer(mine, int(size)))
        return cast(T, messages.unpacked(buffer, int(size)))

    def gather(self, value: T, name: str) -> list[T]:
        """Return every rank's ``value`` (of a kind that messages.pack takes) in rank order, everywhere. Collective: yes."""
        if not self.connected or self.size == 1:
            return [value]
        mine = messages.packed(value)
        with self._named(name):
            sizes = self._gathered(torch.tensor([len(mine)])).flatten().tolist()
            buffers = self._gathered(messages.buffer(mine, max(sizes)))
        return [cast(T, messages.unpacked(buffer, size)) for buffer, size in zip(buffers, sizes, strict=True)]

    def barrier(self, name: str) -> None:
        """Wait for every rank. Collective: yes."""
        self.any_true(False, name)

    # -- errors --------------------------------------------------------------------------------------------------

    def raise_together(self, error: HpcHessError | None, name: str) -> None:
        """Raise the lowest failing rank's error on every rank, or return on every rank. Collective: yes."""
        mine = None if error is None else (type(error), str(error))
        for rank, found in enumerate(self.gather(mine, name)):
            if found is not None:
                if error is not None and rank == self.rank:
                    raise error
                raise found[0](found[1])

    @contextlib.contextmanager
    def together(self, name: str) -> Iterator[None]:
        """Run a block without collectives; if it fails on some rank, every rank raises that error. Collective: yes."""
        error = None
        try:
            yield
        except HpcHessError as caught:
            error = caught
        self.raise_together(error, name)

    def fail(self, error: BaseException, *, debug: bool = False) -> int:
        """Show ``error`` once for the whole job and return the exit code. Never waits for other ranks."""
        code = error.exit_code if isinstance(error, HpcHessError) else 1
        text = str(error) if isinstance(error, HpcHessError) else f"{type(error).__name__}: {error}"
        several = self.connected and self.size > 1
        if not several or first_to_fail(self.rank, secondary=isinstance(error, CollectiveError)):
            where = f" [rank {self.rank}]" if self.size > 1 else ""
            if debug or not isinstance(error, HpcHessError):
                traceback.print_exception(error)
            print(f"hpc-hess: error{where}: {text}", file=sys.stderr, flush=True)
        if several:
            linger(self.size)
        return code


def describe(world: World) -> dict[str, Any]:
    """Return what a report says about the machine: launcher, ranks, host, device, threads."""
    gpu = devices.name(world.device) if devices.is_gpu(world.device) else None
    return {
        "launcher": world.launch.launcher,
        "world_size": world.size,
        "nodes": world.launch.num_nodes,
        "replicas": world.num_replicas,
        "host": socket.gethostname(),
        "device": gpu or "cpu",
        "threads_per_rank": torch.get_num_threads(),
    }
