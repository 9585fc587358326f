"""The command line: ``hpc-hess COMMAND``; the commands of _LAUNCHED run on many ranks, the others in one process."""

from __future__ import annotations

import argparse
import difflib
import functools
import gc
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import hpc_hess
from hpc_hess.commands.arguments import Comparison, Query, Search, Training, add_arguments, filled
from hpc_hess.errors import ConfigError, HpcHessError, LaunchError
from hpc_hess.parallel.orphan import end_with_launcher
from hpc_hess.system import ask_for_large_pages, importing

_LAUNCHED = ("run", "check", "finetune", "dynamics", "attribute", "sketch-check", "intrinsic-dimension")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 (other), 2 (bad input), 3 (numerics), 75 (stopped, run again)."""
    for stream in (sys.stdout, sys.stderr):  # no command dies while printing, whatever the terminal's encoding
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    words = list(sys.argv[1:] if argv is None else argv)
    for word in words:
        if not word.isprintable() and any("\udc80" <= letter <= "\udcff" for letter in word):
            shown = word.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
            print(f"hpc-hess: error: the argument '{shown}' is not UTF-8: write it in UTF-8", file=sys.stderr)
            return 2
    parser = _parser()
    args = parser.parse_args(words)
    if args.command in _LAUNCHED:
        return _spmd(args)
    try:
        return int(args.function(args))
    except HpcHessError as error:
        if args.debug:
            raise
        print(f"hpc-hess: error: {error}", file=sys.stderr)
        return error.exit_code


class _Parser(argparse.ArgumentParser):
    """One sentence for what does not parse, and exit code 2; what is misspelt is answered with what is nearest."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Return what was parsed and an empty list: a command knows best what its own arguments could be."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            near = difflib.get_close_matches(unknown[0].split("=")[0], self._option_string_actions, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"see {self.prog} --help"
            self.error(f"unknown argument '{unknown[0]}': {hint}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        """Say it in one line and end with 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


class _Commands:
    """The commands of the program, listed by groups in its help."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        shown = {"prog": parser.prog, "metavar": "COMMAND", "help": argparse.SUPPRESS}  # the groups are shown instead
        self._all = parser.add_subparsers(dest="command", required=True, **shown)
        self.groups: dict[str, list[str]] = {}

    def add(
        self, group: str, name: str, does: str, function: Callable[[argparse.Namespace], int] | None = None
    ) -> argparse.ArgumentParser:
        """Add a command; ``function`` runs it in this process, unless it is one of _LAUNCHED."""
        self.groups.setdefault(group, []).append(f"  {name:<21}{does}")
        made = self._all.add_parser(name, description=f"{does[0].upper()}{does[1:]}.")
        made.set_defaults(function=function)
        return made


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="hpc-hess",
        usage="%(prog)s [-h] [--version] COMMAND ...",
        description="Hessian spectra of large language models, sharded over processes and nodes.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {hpc_hess.__version__}")
    commands = _Commands(parser)
    _spectra(commands)
    _training(commands)
    _attribution(commands)
    _planning(commands)
    _looking(commands)
    listed = [f"{group}:\n" + "\n".join(lines) for group, lines in commands.groups.items()]
    listed.append(
        f"Many ranks, started by torchrun, mpirun or srun, can do: {', '.join(_LAUNCHED[:-1])},\n{_LAUNCHED[-1]}. "
        "hpc-hess COMMAND --help says what a command takes."
    )
    parser.epilog = "\n\n".join(listed)
    return parser


def _spectra(commands: _Commands) -> None:
    run = commands.add("spectra", "run", "compute a spectrum, or go on with one")
    check = commands.add("spectra", "check", "measure how far the products of a configuration can be trusted")
    dynamics = commands.add("spectra", "dynamics", "compare the spectra of checkpoints")
    for command in (run, check):
        _configured(command, demo=True)
        command.add_argument("--toy", action="store_true", help="a tiny model of random weights, instead of CONFIG")
    run.add_argument("--resume", choices=["auto", "never", "must"], help="short for --set run.resume=...")
    _configured(dynamics)
    dynamics.add_argument("--models", nargs="+", required=True, metavar="MODEL", help="what model.source takes, in order")
    dynamics.add_argument("--sequences", nargs="+", type=int, default=[], metavar="N", help="sample sizes (data.sequences)")
    dynamics.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="runs go to DIR/NAME, the page to DIR/dynamics.html"
    )


def _training(commands: _Commands) -> None:
    finetune = commands.add("training", "finetune", "train the model a little, keeping checkpoints")
    add_arguments(_configured(finetune), Training)
    intrinsic = commands.add("training", "intrinsic-dimension", "find how few dimensions suffice to fine-tune")
    add_arguments(_configured(intrinsic), Search)


def _attribution(commands: _Commands) -> None:
    attribute = commands.add("attribution", "attribute", "which examples speak for a text: build, then query")
    parts = attribute.add_subparsers(dest="part", required=True, metavar="PART")
    _configured(parts.add_parser("build", help="sketch the gradient of every example, or go on with it"))
    add_arguments(_configured(parts.add_parser("query", help="rank the examples for a text")), Query)
    compare = commands.add("attribution", "sketch-check", "compare sketched with whole gradients")
    add_arguments(_configured(compare), Comparison)


def _planning(commands: _Commands) -> None:
    printed = commands.add("planning", "config", "print a configuration of all keys, with their meanings", _config)
    form = printed.add_mutually_exclusive_group()
    form.add_argument("--minimal", action="store_true", help="only the keys that matter first")
    form.add_argument("--markdown", action="store_true", help="as docs/configuration.md")
    _debuggable(printed)

    plan = commands.add("planning", "plan", "predict memory and time of a run on other machines", _plan)
    _configured(plan, demo=True)
    plan.add_argument("--nodes", type=int, nargs="+", default=[1], metavar="N", help="several: a table")
    search = plan.add_mutually_exclusive_group()
    search.add_argument("--sweep", action="store_true", help="a table of 1, 2, 4, ... nodes, up to --nodes (64)")
    search.add_argument("--smallest", action="store_true", help="find the fewest nodes that fit, from --nodes on")
    plan.add_argument("--gpus-per-node", type=int, default=8, metavar="G", help="ranks of a node (8)")
    plan.add_argument("--gpu", default="h100", metavar="NAME", help="h100, h200, a100, a100-40 or a measured.json (h100)")
    plan.add_argument("--host-gib", type=float, default=1000.0, metavar="GIB", help="memory of a node for the ranks (1000)")
    plan.add_argument("--json", action="store_true", help="print numbers for programs")

    scaling = commands.add("planning", "scaling", "run scaling studies, fit laws to runs, measure the machine", _scaling)
    parts = scaling.add_subparsers(dest="part", required=True, metavar="PART")
    study = parts.add_parser("run", help="run every point of a study that has no result yet, one after the other")
    study.add_argument("study", type=Path, help="TOML file: config, out, [set], [sweep], [per_rank]")
    study.add_argument("--point", type=int, nargs="+", default=[], metavar="K", help="only these (a Slurm array's task)")
    fit = parts.add_parser("fit", help="fit time and memory laws to finished runs")
    fit.add_argument("runs", type=Path, nargs="+", help="run directories")
    fit.add_argument("--out", type=Path, default=Path("runs/scaling"), metavar="DIR", help="for scaling.html (runs/scaling)")
    machine = parts.add_parser("machine", help="time matrix products and copies here, for plan --gpu FILE")
    machine.add_argument("out", type=Path, metavar="FILE.json")
    for part in (study, fit, machine):
        _debuggable(part)


def _looking(commands: _Commands) -> None:
    group = "models and data"
    data = _configured(commands.add(group, "data", "show what the loss is over: sequences and predicted tokens", _data))
    data.add_argument("--samples", type=int, default=3, metavar="N", help="sequences that are shown (3)")
    fetch = commands.add(group, "fetch", "download a model of the Hugging Face Hub, and print its directory", _fetch)
    fetch.add_argument("what", metavar="NAME", help="ORG/NAME, ORG/NAME@REV, or a CONFIG: its model, and its data")
    _debuggable(fetch)
    group = "looking at runs"
    inspect = commands.add(group, "inspect", "show what a run directory holds", _inspect)
    report = commands.add(group, "report", "rewrite the figures and report.html of a finished run", _report)
    clean = commands.add(group, "clean", "free the disk space of a run directory that nothing needs any more", _clean)
    for command in (inspect, report, clean):
        command.add_argument("run", type=Path)
        _debuggable(command)
    inspect.add_argument("--verify", action="store_true", help="recompute every row checksum of the store")
    clean.add_argument("--dry-run", action="store_true", help="only say what would be freed")
    clean.add_argument("--basis", action="store_true", help="also the basis that store.keep_basis = true has kept")


def _configured(command: argparse.ArgumentParser, *, demo: bool = False) -> argparse.ArgumentParser:
    """Add what every command of a configuration takes. ``demo``: it may be left out."""
    command.add_argument(
        "config",
        metavar="CONFIG",
        nargs="?" if demo else None,
        help="TOML file; see hpc-hess config" + " (the demo: SmolLM2-135M)" * demo,
    )
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        dest="overrides",
        help="override one key; may be repeated",
    )
    return _debuggable(command)


def _debuggable(command: argparse.ArgumentParser) -> argparse.ArgumentParser:
    command.add_argument("--debug", action="store_true", help="show tracebacks")
    return command


def _spmd(args: argparse.Namespace) -> int:
    ask_for_large_pages(os.environ)
    # heavy imports only where they are needed: --help answers at once
    end_with_launcher(os.environ)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # a request to stop is heeded once there is something to commit
    with importing():
        from hpc_hess.config import DEMO, TOY, Config, load_config
        from hpc_hess.parallel.world import World

    config, error = Config(), None
    command: Callable[..., int] | None = None
    overrides = list(args.overrides)
    if args.command == "run" and args.resume:
        overrides.append(f'run.resume="{args.resume}"')
    toy = getattr(args, "toy", False)
    try:
        if toy and args.config:
            raise ConfigError("--toy takes the place of a configuration: leave one of the two out")
        config = load_config(args.config or (TOY if toy else DEMO), overrides)
        _refuse_own_problem(args.command, config)
        with importing():
            command = _command(args)
        gc.freeze()  # no search for garbage visits all that again
    except HpcHessError as caught:
        error = caught
    try:
        world = World.join(config.parallel.device, config.parallel.timeout_s, want_mpi=config.store.driver != "files")
    except HpcHessError as caught:
        if args.debug:
            raise
        if error is None and isinstance(caught, LaunchError) and caught.shown_by_other:
            time.sleep(1.0)  # the first rank to end makes the launcher end the others
        else:
            print(f"hpc-hess: error: {error or caught}", file=sys.stderr, flush=True)
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


_OF_OWN_PROBLEMS = ("run", "check")


def _refuse_own_problem(command: str, config: Any) -> None:
    """Refuse a problem of one's own where a command needs a model and data that it can read. Raises ConfigError."""
    if config.problem.build and command not in _OF_OWN_PROBLEMS:
        raise ConfigError(
            f"hpc-hess {command} needs the [model] and [data] of a configuration, and this one has problem.build = "
            f"'{config.problem.build}': use hpc-hess run or check, or the Python interface"
        )


def _command(args: argparse.Namespace) -> Callable[..., int]:
    """Return the function of a configuration and a World that the arguments ask for. Raises ConfigError."""
    if args.command == "run":
        from hpc_hess.commands.run.work import run

        return run
    if args.command == "check":
        from hpc_hess.commands.check.work import check

        return check
    if args.command == "dynamics":
        from hpc_hess.commands.dynamics.work import dynamics

        return functools.partial(dynamics, models=args.models, sequences=args.sequences, out=args.out)
    if args.command == "attribute":
        from hpc_hess.commands.attribute.work import build, query

        if args.part == "build":
            return build
        return functools.partial(query, asked=filled(Query, args))
    if args.command == "sketch-check":
        from hpc_hess.commands.sketch_check.work import sketch_check

        return functools.partial(sketch_check, asked=filled(Comparison, args))
    if args.command == "intrinsic-dimension":
        from hpc_hess.commands.intrinsic_dimension.work import intrinsic_dimension

        return functools.partial(intrinsic_dimension, search=filled(Search, args))
    from hpc_hess.commands.finetune.work import finetune

    return functools.partial(finetune, training=filled(Training, args))


def _config(args: argparse.Namespace) -> int:
    from hpc_hess.commands.config_page import commented_toml, markdown

    print(markdown() if args.markdown else commented_toml(minimal=args.minimal), end="")
    return 0


def _plan(args: argparse.Namespace) -> int:
    import json

    from hpc_hess.config import DEMO, load_config

    config = load_config(args.config or DEMO, args.overrides)  # before torch is imported: an error comes at once
    _refuse_own_problem("plan", config)
    from hpc_hess.commands.plan.page import plan_text, suggestions_text, sweep_text
    from hpc_hess.planning.plan import describe, powers_up_to
    from hpc_hess.planning.planner import Planner

    planner = Planner(config, args.gpus_per_node, args.gpu, int(args.host_gib * 2**30))
    intake = planner.intake(lambda line: print(line, file=sys.stderr)).to_json()
    nodes = powers_up_to(max(args.nodes)) if args.sweep else args.nodes
    found = [planner.plan(count) for count in (nodes[:1] if args.smallest else nodes)]
    if args.smallest:
        found = [planner.smallest(found[0]) or found[0]]
    suggested = [] if found[-1].fits or len(found) > 1 else planner.suggestions(found[-1])
    plans = [describe(plan) | {"intake": intake} for plan in found]
    changes = [(change, describe(plan)) for change, plan in suggested]
    if args.json:
        print(json.dumps([*plans, *({"change": change, **plan} for change, plan in changes)], indent=2))
    else:
        print(plan_text(plans[0]) if len(plans) == 1 else sweep_text(plans))
        if len(plans) == 1 and not found[0].fits:
            print(suggestions_text(changes))
    return 0 if any(plan.fits for plan in found) else 2


def _scaling(args: argparse.Namespace) -> int:
    from hpc_hess.commands.scaling import work as scale

    if args.part == "run":
        return scale.run_study(args.study, args.point)
    if args.part == "fit":
        return scale.fit_runs(args.runs, args.out)
    return scale.measure_machine(args.out)


def _inspect(args: argparse.Namespace) -> int:
    with importing():
        from hpc_hess.commands.run.screen import inspect_run

    return inspect_run(args.run, verify=args.verify)


def _data(args: argparse.Namespace) -> int:
    from hpc_hess.config import load_config

    config = load_config(args.config, args.overrides)  # before torch is imported: an error comes at once
    _refuse_own_problem("data", config)
    from hpc_hess.commands.show_data import show_data

    return show_data(config, args.samples)


def _fetch(args: argparse.Namespace) -> int:
    from hpc_hess.commands.fetch import fetch

    return fetch(args.what)


def _clean(args: argparse.Namespace) -> int:
    from hpc_hess.commands.clean import clean

    return clean(args.run, dry=args.dry_run, basis=args.basis)


def _report(args: argparse.Namespace) -> int:
    with importing():
        from hpc_hess.commands.run.report import rewrite_report

    print(rewrite_report(args.run))
    return 0
