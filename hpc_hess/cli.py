"""The command line: ``hpc-hess run | check | inspect | report``."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from hpc_hess.errors import HpcHessError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 (other), 2 (bad input), 3 (numerics), 75 (stopped, run again)."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command in ("run", "check"):
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
    for command in (run, check):
        command.add_argument("config", help="TOML file; every key has a default")
        command.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="overrides",
                             help="override one key; may be repeated")  # fmt: skip
    run.add_argument("--resume", choices=["auto", "never", "must"], help="short for --set run.resume=...")

    inspect = commands.add_parser("inspect", help="show what a run directory holds")
    inspect.add_argument("run", type=Path)
    inspect.add_argument("--verify", action="store_true", help="recompute every row checksum of the store")
    inspect.set_defaults(function=_inspect)

    report = commands.add_parser("report", help="rewrite the figures and report.html of a finished run")
    report.add_argument("run", type=Path)
    report.set_defaults(function=_report)

    for command in (run, check, inspect, report):
        command.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def _spmd(args: argparse.Namespace) -> int:
    # torch reads it once: large tensors in huge pages take a third of the page faults, and less memory at the peak
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # heavy imports only where they are needed: --help answers at once
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # a request to stop is heeded once there is something to commit
    from hpc_hess.config import Config, load_config
    from hpc_hess.parallel.world import World

    if args.command == "run":
        from hpc_hess.run import run as command
    else:
        from hpc_hess.check import check as command

    config, error = Config(), None
    overrides = list(args.overrides)
    if args.command == "run" and args.resume:
        overrides.append(f'run.resume="{args.resume}"')
    try:
        config = load_config(args.config, overrides)
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
        code = command(config, world)
    except BaseException as caught:  # every rank must end, and the first to fail says why
        code = world.fail(caught, debug=args.debug)
        sys.stdout.flush()
        os._exit(code)  # no clean-up that waits for ranks which will not come
    return code  # the process group ends with the process: see __main__


def _inspect(args: argparse.Namespace) -> int:
    from hpc_hess.report.screen import inspect_run

    return inspect_run(args.run, verify=args.verify)


def _report(args: argparse.Namespace) -> int:
    from hpc_hess.report.page import write_report

    print(write_report(args.run))
    return 0
