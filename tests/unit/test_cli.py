"""The command line: what parses, what is refused in one line, and that help does not wait for torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hpc_hess import __version__
from hpc_hess.cli import _parser, main
from hpc_hess.commands.arguments import Comparison, Query, Search, Training, filled
from hpc_hess.errors import ConfigError

_LOADED = "import sys; from hpc_hess.cli import main\ntry: main({words!r})\nexcept SystemExit: pass\nprint(*sys.modules)"


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["finetune", "--help"], ["plan", "--help"]], ids=" ".join)
def test_help_and_version_import_nothing_heavy(words: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", _LOADED.format(words=words)], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in done.stdout.splitlines()[-1].split()}
    assert "argparse" in loaded
    assert loaded.isdisjoint({"torch", "numpy", "scipy", "h5py", "transformers", "matplotlib", "pydantic", "rich"})


def test_looking_at_a_run_imports_no_torch(tmp_path: Path) -> None:
    for words in (["inspect", str(tmp_path)], ["report", str(tmp_path)]):  # which say that there is no run
        done = subprocess.run(
            [sys.executable, "-c", _LOADED.format(words=words)], capture_output=True, text=True, check=True
        )
        assert done.stderr.startswith("hpc-hess: error: ")
        loaded = set(done.stdout.splitlines()[-1].split())
        assert "hpc_hess.storage.run_files" in loaded
        assert loaded.isdisjoint({"torch", "transformers"})


def test_a_run_imports_models_and_pictures_only_where_they_are_used() -> None:
    code = "import sys; import hpc_hess.commands.run.work; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    unused = {"transformers", "accelerate", "matplotlib", "jinja2", "torch._dynamo", "torch._inductor", "scipy.optimize"}
    assert set(done.stdout.split()).isdisjoint({*unused, "scipy.stats", "scipy.sparse", "datasets", "gguf", "mpi4py"})


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"hpc-hess {__version__}\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["config", "--minimall"], "hpc-hess config: error: unknown argument '--minimall': did you mean '--minimal'?"),
        (["config", "--all"], "hpc-hess config: error: unknown argument '--all': see hpc-hess config --help"),
        (["config", "--minimal", "--markdown"], "not allowed with argument"),
        (["config", "lanczos"], "unknown argument 'lanczos'"),
        (["run", "a.toml", "b.toml"], "unknown argument 'b.toml'"),
        (["inspect", "RUN", "--verfiy"], "did you mean '--verify'?"),
        (["rn"], "invalid choice: 'rn'"),
        ([], "the following arguments are required: COMMAND"),
        (["finetune", "a.toml"], "required: --out"),
        (["finetune", "a.toml", "--out", "x", "--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["plan", "--set", "lanczos=3"], "hpc-hess: error: --set takes section.key=value"),
        (["plan", "--set", "lanczos.stepz=3"], "key 'lanczos.stepz': did you mean 'lanczos.steps'?"),
    ],
    ids=lambda case: " ".join(case) if isinstance(case, list) else "",
)
def test_bad_input_is_one_line_and_2(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code: object = main(words)
    except SystemExit as ended:
        code = ended.code
    shown = capsys.readouterr()
    assert (code, shown.out) == (2, "")
    assert said in shown.err
    assert shown.err.count("\n") == 1


def test_the_toy_takes_no_configuration() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hpc_hess", "run", "a.toml", "--toy"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "hpc-hess: error: --toy takes the place of a configuration: leave one of the two out\n"


@pytest.mark.parametrize(
    ("words", "kind", "wanted"),
    [
        ("finetune C --out d", Training, Training(Path("d"))),
        (
            "finetune --out d --save-at 0,10,50 C --steps 60 --optimizer adamw --learning-rate 1e-3",
            Training,
            Training(Path("d"), 60, 1e-3, save_at=(0, 10, 50), optimizer="adamw"),
        ),
        ("attribute query C --text words", Query, Query("words")),
        (
            "attribute query C --data text:F --precondition fisher --damping 0.5 --top 3",
            Query,
            Query(data="text:F", precondition="fisher", damping=0.5, top=3),
        ),
        ("sketch-check C", Comparison, Comparison()),
        ("sketch-check C --kinds affd qk --bits 10 13 --queries 2", Comparison, Comparison(("affd", "qk"), (10, 13), 2)),
        ("intrinsic-dimension C", Search, Search()),
        (
            "intrinsic-dimension --no-verify C --every 7 --target 30.5 --held-out 4 --metric accuracy",
            Search,
            Search(every=7, target=30.5, held_out=4, verify=False),
        ),
    ],
)
def test_arguments_are_the_fields_of_what_a_command_is_asked(words: str, kind: type[Any], wanted: Any) -> None:
    args = _parser().parse_args(words.split())
    assert args.config == "C"
    assert filled(kind, args) == wanted


def test_steps_that_are_none() -> None:
    with pytest.raises(ConfigError, match="--save-at '1,b' is not valid: it should be steps such as"):
        filled(Training, _parser().parse_args(["finetune", "C", "--out", "d", "--save-at", "1,b"]))


@pytest.mark.parametrize(
    "words",
    [
        "run C --set a.b=1 --debug",
        "run --set a.b=1 C",
        "run --set a.b=1 --debug C",
        "check --debug C --set a.b=1",
        "plan --nodes 1 2 --gpu h200 --set a.b=1 C",
    ],
)
def test_the_configuration_stands_anywhere(words: str) -> None:
    args = _parser().parse_args(words.split())
    assert (args.config, args.overrides) == ("C", ["a.b=1"])
    left_out = _parser().parse_args([word for word in words.split() if word != "C"])
    assert (left_out.config, left_out.overrides) == (None, ["a.b=1"])


def test_help_lists_every_command_in_its_group(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    groups = ["\nspectra:", "\ntraining:", "\nattribution:", "\nplanning:", "\nlooking at runs:"]
    assert [shown.index(group) for group in groups] == sorted(shown.index(group) for group in groups)
    for name in _parser()._subparsers._group_actions[0].choices:  # type: ignore[union-attr]
        assert shown.count(f"\n  {name} ") == 1
