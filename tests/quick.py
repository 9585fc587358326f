"""run_ranks without the seconds that importing torch takes: ranks are forked from a server that has imported it."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

from tests import spawn
from tests.spawn import CONTEXT


def start_ranks(function: Callable[..., Any], num_ranks: int, *args: Any) -> tuple[list[BaseProcess], list[Any]]:
    """Start ``function(world, *args)`` on ``num_ranks`` processes; return them and the pipes their answers come by."""
    port = spawn.free_port()
    processes: list[BaseProcess] = []
    pipes = []
    for rank in range(num_ranks):
        receiver, sender = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(
            target=spawn._child, args=(sender, rank, num_ranks, port, function, args), daemon=True
        )
        process.start()
        sender.close()
        processes.append(process)
        pipes.append(receiver)
    return processes, pipes


def run_quickly(function: Callable[..., Any], num_ranks: int, *args: Any, timeout_s: float = 60) -> list[Any]:
    """As tests.spawn.run_ranks; the function must not depend on a fresh interpreter."""
    processes, pipes = start_ranks(function, num_ranks, *args)
    try:
        answers = []
        for pipe in pipes:
            assert pipe.poll(timeout_s), f"no answer within {timeout_s} s"
            failed, _, answer = pipe.recv()
            assert not failed, answer
            answers.append(answer)
        return answers
    finally:
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
