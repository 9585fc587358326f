"""No command dies while printing, whatever the terminal's encoding; arguments that are not UTF-8 are named."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpc_hess.commands.dynamics.page import quote
from tests.support.base_model import save_b, settings_b, tokens_b, write_config
from tests.support.launching import ROOT, environment

ASCII = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
# Each command as a process of its own, forked from one that has imported what they need; then its exit code.
ONE_BY_ONE = r"""
import json, os, sys
import tests.support.preload
from hpc_hess.__main__ import entry
for words in json.loads(sys.argv[1]):
    child = os.fork()
    if not child:
        sys.argv[1:] = words
        entry()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print("\nended with", code, flush=True)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A configuration in a directory with an accent."""
    folder = tmp_path_factory.mktemp("café")
    save_b(folder / "modèle")
    np.save(folder / "tokens.npy", np.load(tokens_b(folder / "t.npy")))
    values: dict[str, Any] = settings_b(folder / "modèle", folder / "tokens.npy", folder / "été", lanczos__steps=3)
    values["run"]["report"] = True
    values["sketch"] = {"dimension": 16}
    return write_config(folder / "réglages.toml", values), folder / "été"


@pytest.mark.slow
def test_every_command_prints_in_ascii(place: tuple[Path, Path]) -> None:
    config, out = place
    sketched = ["--set", f"run.out={out}-s"]
    commands: list[list[str | Path]] = [
        ["--help"],
        ["run", config],
        ["check", config, "--set", f"run.out={out}-c"],
        ["inspect", out, "--verify"],
        ["report", out],
        ["clean", out],
        ["plan", config, "--gpus-per-node", "1"],
        ["finetune", config, "--steps", "1", "--batch", "2", "--out", f"{out}-f"],
        ["dynamics", config, "--models", f"{out}-f/step-000000", f"{out}-f/step-000001", "--out", f"{out}-d"],
        ["attribute", "build", config, *sketched],
        ["attribute", "query", config, "--data", f"tokens:{out.parent / 'tokens.npy'}", *sketched],
        ["sketch-check", config, "--kinds", "affd", "--bits", "4", "--queries", "1", "--set", f"run.out={out}-k"],
        ["scaling", "fit", out, "--out", f"{out}-laws"],
    ]
    words = json.dumps([[*map(str, each)] for each in commands])
    done = subprocess.run(
        [sys.executable, "-c", ONE_BY_ONE, words],
        cwd=ROOT,
        env=environment(**ASCII),
        timeout=500,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.stdout.isascii()
    *printed, rest = re.split(r"\nended with (-?\d+)\n", done.stdout.decode())
    said, codes = printed[::2], [int(code) for code in printed[1::2]]
    assert (len(codes), rest) == (len(commands), ""), done.stdout[-2000:]
    failed = [
        f"{each[:2]}: exit {code}\n{text[-600:]}"
        for each, text, code in zip(commands, said, codes, strict=True)
        if "Traceback" in text or "UnicodeEncodeError" in text or code not in (0, 2)
    ]
    assert not failed, "\n".join(failed)


def test_an_argument_that_is_not_utf8_is_named() -> None:
    words = [sys.executable.encode(), b"-m", b"hpc_hess", b"attribute", b"query", b"x.toml", b"--text", b"caf\xe9"]
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, timeout=100, check=False)
    assert done.returncode == 2
    assert b"the argument 'caf\\xe9' is not UTF-8" in done.stderr


def test_links_of_pages_are_quoted() -> None:
    assert quote("a#1 50%/report.html") == "a%231%2050%25/report.html"
    assert os.sep == "/"
