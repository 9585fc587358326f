"""The command line: ``hpc-hess run | check | finetune | dynamics | inspect | report``."""

from __future__ import annotations

import argparse
import functools
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hpc_hess.errors import HpcHessError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 (other), 2 (bad input), 3 (numerics), 75 (stopped, run again)."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command in ("run", "check", "finetune", "dynamics"):
        return _spmd(args)
    try:
        return int(args.function(args))
    except HpcHessError as error:
        if args.debug:
            raise
        print(f"hpc-hess: error: {error}", file=sys.stderr)
        return error.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hpc-hess", description="Hessian spectra of large language models, sharded over processes and nodes."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="compute a spectrum, or go on with one (alone, torchrun, mpirun or srun)")
    check = commands.add_parser("check", help="measure how far the products of a configuration can be trusted")
    finetune = commands.add_parser("finetune", help="train the model a little, keeping checkpoints (launched like run)")
    dynamics = commands.add_parser("dynamics", help="compare the spectra of checkpoints (launched like run)")
    for command in (run, check, finetune, dynamics):
        command.add_argument("config", help="TOML file; every key has a default")
        command.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="overrides",
                             help="override one key; may be repeated")  # fmt: skip
    run.add_argument("--resume", choices=["auto", "never", "must"], help="short for --set run.resume=...")

    finetune.add_argument("--steps", type=int, default=200, help="updates (200)")
    finetune.add_argument("--learning-rate", type=float, default=1e-5, help="constant (1e-5)")
    finetune.add_argument("--batch", type=int, default=32, help="sequences of an update (32)")
    finetune.add_argument("--optimizer", choices=["sgd", "adamw"], default="sgd")
    finetune.add_argument("--save-at", default="0", metavar="0,10,50",
                          help="updates after which to keep a checkpoint; the last always")  # fmt: skip
    finetune.add_argument("--seed", type=int, default=0, help="of the order of the sequences (0)")
    finetune.add_argument("--out", type=Path, required=True, metavar="DIR", help="checkpoints go to DIR/step-NNNNNN")

    dynamics.add_argument("--models", nargs="+", required=True, metavar="MODEL", help="what model.source takes, in order")
    dynamics.add_argument("--sequences", nargs="+", type=int, default=[], metavar="N", help="sample sizes (data.sequences)")
    dynamics.add_argument("--out", type=Path, required=True, metavar="DIR", help="runs go to DIR/NAME, the page to "
                          "DIR/dynamics.html")  # fmt: skip

    inspect = commands.add_parser("inspect", help="show what a run directory holds")
    inspect.add_argument("run", type=Path)
    inspect.add_argument("--verify", action="store_true", help="recompute every row checksum of the store")
    inspect.set_defaults(function=_inspect)

    report = commands.add_parser("report", help="rewrite the figures and report.html of a finished run")
    report.add_argument("run", type=Path)
    report.set_defaults(function=_report)

    for command in (run, check, finetune, dynamics, inspect, report):
        command.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def _spmd(args: argparse.Namespace) -> int:
    # torch reads it once: large tensors in huge pages take a third of the page faults, and less memory at the peak
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # heavy imports only where they are needed: --help answers at once
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # a request to stop is heeded once there is something to commit
    from hpc_hess.config import Config, load_config
    from hpc_hess.parallel.world import World

    config, error = Config(), None
    command: Callable[..., int] | None = None
    overrides = list(args.overrides)
    if args.command == "run" and args.resume:
        overrides.append(f'run.resume="{args.resume}"')
    try:
        config = load_config(args.config, overrides)
        command = _command(args)
    except HpcHessError as caught:
        error = caught
    try:
        world = World.join(config.parallel.device, config.parallel.timeout_s, want_mpi=config.store.driver != "files")
    except HpcHessError as caught:
        if args.debug:
            raise
        print(f"hpc-hess: error: {error or caught}", file=sys.stderr)
        return (error or caught).exit_code
    try:
        world.raise_together(error, "read the configuration")
        assert command is not None
        code = command(config, world)
    except BaseException as caught:  # every rank must end, and the first to fail says why
        code = world.fail(caught, debug=args.debug)
        sys.stdout.flush()
        os._exit(code)  # no clean-up that waits for ranks which will not come
    return code  # the process group ends with the process: see __main__


def _command(args: argparse.Namespace) -> Callable[..., int]:
    """Return the function of a configuration and a World that the arguments ask for. Raises ConfigError."""
    if args.command == "run":
        from hpc_hess.run import run

        return run
    if args.command == "check":
        from hpc_hess.check import check

        return check
    if args.command == "dynamics":
        from hpc_hess.dynamics import dynamics

        return functools.partial(dynamics, models=args.models, sequences=args.sequences, out=args.out)
    from hpc_hess.finetune import Training, finetune, parse_steps

    values: dict[str, Any] = {k: getattr(args, k) for k in ("out", "steps", "learning_rate", "batch", "optimizer", "seed")}
    return functools.partial(finetune, training=Training(save_at=parse_steps(args.save_at), **values))


def _inspect(args: argparse.Namespace) -> int:
    from hpc_hess.report.screen import inspect_run

    return inspect_run(args.run, verify=args.verify)


def _report(args: argparse.Namespace) -> int:
    from hpc_hess.report.page import write_report

    print(write_report(args.run))
    return 0
