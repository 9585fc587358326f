"""The command line: what parses, what is refused in one line, and that help does not wait for torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from hpc_hess import __version__
from hpc_hess.cli import main

_LOADED = "import sys; from hpc_hess.cli import main\ntry: main({words!r})\nexcept SystemExit: pass\nprint(*sys.modules)"


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["finetune", "--help"], ["plan", "--help"]], ids=" ".join)
def test_help_and_version_import_nothing_heavy(words: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", _LOADED.format(words=words)], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in done.stdout.splitlines()[-1].split()}
    assert "argparse" in loaded
    assert loaded.isdisjoint({"torch", "numpy", "scipy", "h5py", "transformers", "matplotlib", "pydantic", "rich"})


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
)  # fmt: skip
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
    done = subprocess.run([sys.executable, "-m", "hpc_hess", "run", "a.toml", "--toy"], capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "hpc-hess: error: --toy takes the place of a configuration: leave one of the two out\n"
