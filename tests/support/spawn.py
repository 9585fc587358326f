"""Run a function on real ranks: spawned processes that join one gloo World on the loopback interface."""

from __future__ import annotations

import multiprocessing
import os
import random
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

# Ranks are forked from a server that has imported what takes seconds; each still joins a World of its own.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.support.preload"])
_FOREIGN = ("TORCHELASTIC_", "SLURM_", "OMPI_", "PMI_", "PMIX_", "MPI_LOCAL")
_GRACE_S = 5.0  # how long the other ranks may take to say what they saw after the first failure


def run_ranks(
    function: Callable[..., Any], num_ranks: int, *args: Any, timeout_s: float = 120, fresh: bool = False
) -> list[Any]:
    """Return ``function(world, *args)`` of every rank, in rank order.

    ``function`` is a module-level function; its arguments and its value are picklable. Every rank is a spawned process
    with one thread; with ``fresh`` each starts an interpreter of its own and writes where this process writes (capfd).
    No process outlives the call.

    Raises
    ------
    AssertionError : a rank raised, died or hung; the message holds its traceback.

    """
    processes, pipes = start_ranks(function, num_ranks, *args, fresh=fresh)
    try:
        values, failures, died, hanging = _collect(pipes, time.monotonic() + timeout_s)
        if failures or died or hanging:
            for rank in died:
                processes[rank].join(_GRACE_S)
                failures.append((False, f"rank {rank} of {num_ranks} ended with code {processes[rank].exitcode}"))
            if not failures:
                failures = [(False, f"rank {r} of {num_ranks} gave no answer within {timeout_s} s") for r in hanging]
            # a rank that only noticed another's end comes last
            raise AssertionError("\n\n".join(text for _, text in sorted(failures, key=lambda failure: failure[0])))
        for process in processes:
            process.join(_GRACE_S)
        return [values[rank] for rank in range(num_ranks)]
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
        for pipe in pipes:
            pipe.close()


def start_ranks(
    function: Callable[..., Any], num_ranks: int, *args: Any, fresh: bool = False
) -> tuple[list[BaseProcess], list[Connection]]:
    """Start what ``run_ranks`` runs; return the processes and the pipes that (failed, was second, answer) come by."""
    context: Any = multiprocessing.get_context("spawn") if fresh else CONTEXT
    port = free_port()
    processes, pipes = [], []
    for rank in range(num_ranks):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(sender, rank, num_ranks, port, function, args), daemon=True)
        process.start()
        sender.close()
        processes.append(process)
        pipes.append(receiver)
    return processes, pipes


def free_port() -> int:
    """Return a TCP port that is free on the loopback interface now, as the next one is.

    It is none of those that the system gives to outgoing connections (32768 and up on Linux): one of them would take it.
    """
    while True:
        port = random.SystemRandom().randrange(12_000, 32_000, 2)
        with socket.socket() as probe, socket.socket() as after:
            try:
                probe.bind(("127.0.0.1", port))
                after.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port


def clean_environment() -> dict[str, str]:
    """Return this process's environment without what a launcher around the tests may have set."""
    return {key: value for key, value in os.environ.items() if not key.startswith(_FOREIGN)}


def _collect(
    pipes: list[Connection], deadline: float
) -> tuple[dict[int, Any], list[tuple[bool, str]], list[int], list[int]]:
    """Return values by rank, failures as (is secondary, text), ranks that died, ranks still silent at the deadline."""
    values: dict[int, Any] = {}
    failures: list[tuple[bool, str]] = []
    died: list[int] = []
    open_pipes = dict(zip(pipes, range(len(pipes)), strict=True))
    while open_pipes and (left := deadline - time.monotonic()) > 0:
        for pipe in wait(list(open_pipes), timeout=left):
            assert isinstance(pipe, Connection)
            rank = open_pipes.pop(pipe)
            try:
                failed, secondary, answer = pipe.recv()
            except EOFError:
                died.append(rank)
                failed = True
            else:
                if failed:
                    failures.append((secondary, answer))
                else:
                    values[rank] = answer
            if failed:
                deadline = min(deadline, time.monotonic() + _GRACE_S)
    return values, failures, died, sorted(open_pipes.values())


def _child(
    pipe: Connection, rank: int, num_ranks: int, port: int, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    for key in [key for key in os.environ if key.startswith(_FOREIGN)]:
        del os.environ[key]
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    try:
        import torch

        from hpc_hess.parallel.world import World

        torch.set_num_threads(1)
        world = World.join(device="cpu", timeout_s=60, want_mpi=False)
        value = function(world, *args)
        world.leave()
        pipe.send((False, False, value))
    except BaseException as error:
        from hpc_hess.errors import CollectiveError

        text = f"rank {rank} of {num_ranks} failed:\n{''.join(traceback.format_exception(error))}"
        pipe.send((True, isinstance(error, CollectiveError), text))
