"""Sentences that are tried: what a message of the program names exists and can be followed."""

from __future__ import annotations

import argparse
import ast
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from hpc_hess.cli import _parser
from hpc_hess.config import make_config, sections
from hpc_hess.errors import ConfigError
from hpc_hess.intake.findings import CHECKS

ROOT = Path(__file__).resolve().parents[2]
SECTIONS = sections()
_SECTIONS = "|".join(re.escape(name) for name in SECTIONS)
_VALUE = r"\"[^\"{]*\"|'[^'{]*'|\[[^\]{]*\]|\d(?:[\d.]*\d)?|true|false"
_SETTING = re.compile(rf"(?<![\w./`-])({_SECTIONS})\.([a-z]\w*)(?![\w(])(?:\s*=\s*({_VALUE}))?")
_COMMAND = re.compile(
    r"(?:hpc-hess|python -m hpc_hess) (?!takes)([a-z][a-z-]*(?: [a-z]+)?)((?: (?:--[a-z-]+|[A-Z<{][\w./>}]*))*)"
)
_OPTION = re.compile(r"(?<![\w-])(--[a-z][a-z_-]+)")
_SCRIPT = re.compile(r"\b((?:launch|slurm|docs|benchmarks)/[\w./-]+\.(?:sh|md|toml|py))")
_EXTRA = re.compile(r"hpc-hess\[(\w+)\]")
# what the sentences of other programs name: their own options
_FOREIGN = {
    "--hf_assets_path",
    "--model_name",
    "--model_flavor",
    "--no-deps",
    "--local-dir",
    "--mpi",
    "--mpi=pmix",
    "--include",
    "--output-dir",
    "--signal",
    "--test",
    "--nodes",
    "--ntasks",
    "--ntasks-per-node",
    "--pty",
    "--export",
    "--revision",
    "--nproc-per-node",
    "--no-binary",
    "--overlap",
}
_NOT_SETTINGS = {  # files, parameters, attributes in Python, checks of the intake
    "model.safetensors",
    "model.layers",
    "operator.intake",
    "operator.notes",
    *CHECKS,
}


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]


class Text(NamedTuple):
    place: str
    text: str


def _joined(node: ast.JoinedStr) -> str:
    return "".join(str(v.value) if isinstance(v, ast.Constant) else "{}" for v in node.values)


def texts() -> Iterator[Text]:
    """Every string of the package that is no docstring, f-strings as one text with {} for what is filled in."""
    for path in sorted((ROOT / "hpc_hess").rglob("*.py")):
        tree = ast.parse(path.read_text())
        docstrings = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        joined = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
        inside = {id(inner) for node in joined for inner in ast.walk(node) if inner is not node}
        for node in ast.walk(tree):
            where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.JoinedStr) and id(node) not in inside:
                yield Text(where, _joined(node))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside | docstrings:
                yield Text(where, node.value)
    for path in sorted((ROOT / "hpc_hess").rglob("*.html")):
        yield Text(str(path.relative_to(ROOT)), path.read_text())
    for path in PAGES:
        yield Text(str(path.relative_to(ROOT)), sentences(path.read_text()))
    for path in sorted([*(ROOT / "launch").glob("*.sh"), *(ROOT / "slurm").glob("*.sh")]):
        yield Text(str(path.relative_to(ROOT)), path.read_text().replace("launch/X.sh", ""))


def sentences(page: str) -> str:
    """Return a page as a message would read: without Python, drawings, targets of links, backquotes, ends of lines."""
    page = re.sub(r"^```(\w*)\n(.*?)^```", lambda m: m[2] if m[1] == "bash" else "", page, flags=re.DOTALL | re.MULTILINE)
    page = re.sub(r"\]\([^)]*\)|`", "", page)
    return re.sub(r"(?<=\S)\n(?=[\w(])", " ", page)


def settings_named(text: str) -> Iterator[tuple[str, str, str | None]]:
    """Every section.key that a text names, with the value that it gives it, as TOML."""
    for section, key, value in _SETTING.findall(text) if " " in text else ():  # a single word is a file's name
        if f"{section}.{key}" not in _NOT_SETTINGS:
            yield section, key, value.replace("'", '"') or None


def _subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for inner in _subcommands(parser).values():
        yield from _parsers(inner)


ALL = list(texts())


def test_messages_were_found() -> None:
    assert sum(1 for t in ALL for _ in settings_named(t.text)) > 100
    assert sum(1 for t in ALL if _COMMAND.search(t.text)) > 5


def test_every_setting_that_a_message_names_exists_and_takes_the_value_it_names() -> None:
    wrong = []
    for place, text in ALL:
        for section, key, value in settings_named(text):
            kind = SECTIONS[section]
            if key not in kind.model_fields:
                wrong.append(f"{place}: {section}.{key} does not exist")
            elif value is not None:
                try:
                    kind.model_validate({key: tomllib.loads(f"x = {value}")["x"]})
                except ValueError as error:
                    wrong.append(f"{place}: {section}.{key} = {value}: {error}")
    assert not wrong, "\n".join(wrong)


def test_every_command_that_a_message_names_exists() -> None:
    parser, wrong = _parser(), []
    for place, text in ALL:
        for words, rest in _COMMAND.findall(text):
            name, _, part = words.partition(" ")
            found = _subcommands(parser).get(name)
            if found is None:
                wrong.append(f"{place}: hpc-hess {name} does not exist")
                continue
            parts = _subcommands(found)
            if parts:
                if part not in parts:
                    wrong.append(f"{place}: hpc-hess {words} does not exist")
                    continue
                found = parts[part]
            known = set(found._option_string_actions)
            wrong += [f"{place}: {words} has no {o}" for o in _OPTION.findall(rest) if o not in known]
    assert not wrong, "\n".join(wrong)


def test_every_option_that_a_message_names_belongs_to_some_command() -> None:
    known = {option for parser in _parsers(_parser()) for option in parser._option_string_actions} | _FOREIGN
    wrong = [
        f"{place}: {option}"
        for place, text in ALL
        if place.startswith("hpc_hess")
        for option in _OPTION.findall(text)
        if option not in known and "html" not in place
    ]
    assert not wrong, "\n".join(wrong)


def test_every_script_page_and_extra_that_a_message_names_exists() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wrong = [f"{place}: {file}" for place, text in ALL for file in _SCRIPT.findall(text) if not (ROOT / file).exists()]
    wrong += [f"{place}: hpc-hess[{name}]" for place, text in ALL for name in _EXTRA.findall(text) if name not in extras]
    assert not wrong, "\n".join(wrong)


# -- following them ----------------------------------------------------------------------------------------------------

# Configurations that are refused: what the sentence advises, done, is no longer refused for the same reason.
REFUSED: list[list[str]] = [
    ["model.compute_dtype=bfloat16"],
    ["model.compute_dtype=tf32"],
    ["operator.kind=gauss_newton"],
    ["operator.kind=fisher"],
    ["operator.step=-1.0"],
    ["lanczos.reorthogonalise=0"],
    ["lanczos.lock_step=0"],
    ["lanczos.lock_step=2"],
    ["model.master_dtype=float64"],
    ["model.compute_dtype=float64"],
    ["store.checkpoint_every=1", "operator.method=exact", "parallel.replicate=2"],
    ["studies.eigenpairs.count=3", "studies.eigenpairs.basis_size=4"],
    ["operator.sketched=true", "studies.diagonal.method=xdiag"],
    ["studies.class_structure.groups=3"],
    ["studies.deflated.steps=3"],
    ["run.time_limit=soon"],
    ["lanczos.stepz=3"],
    ["lancsoz.steps=3"],
]


def refusal(overrides: list[str]) -> str:
    try:
        make_config({}, overrides)
    except ConfigError as error:
        return str(error)
    return ""


def advised(sentence: str) -> list[list[str]]:
    """The settings that a sentence advises, after its colon: together where joined by "and", else each by itself."""
    advice = sentence[sentence.find(": ") + 2 :] if ": " in sentence else sentence
    advice = advice.split("(", 1)[0]
    ways = re.split(r",? or ", advice)
    return [[f"{s}.{k}={v}" for s, k, v in settings_named(way) if v is not None] for way in ways]


@pytest.mark.parametrize("overrides", REFUSED, ids=lambda o: " ".join(o))
def test_advice_about_the_configuration_can_be_followed(overrides: list[str]) -> None:
    sentence = refusal(overrides)
    assert sentence
    ways = [way for way in advised(sentence) if way]
    for way in ways:
        after = refusal([*overrides, *way])
        assert after != sentence, f"{sentence}\n-> {way} changes nothing"
        assert not after, f"{sentence}\n-> {way} is refused: {after}"


def test_unknown_keys_are_answered_with_one_that_exists() -> None:
    for name in ("lanczos.stepz", "studies.eigenpairs.cound", "data.seqlen", "run.output"):
        near = re.search(r"did you mean '([\w.]+)'", refusal([f"{name}=1"]))
        assert near is not None
        assert "unknown" not in refusal([f"{near[1]}=1"])


def commands_shown(page: str) -> Iterator[str]:
    """The commands of a page, in its blocks of code and between backquotes, without the program's name."""
    for block in re.findall(r"^```bash\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        yield from re.findall(r"^(?:python -m hpc_hess|hpc-hess) (.*)", block, re.MULTILINE)
    for shown in re.findall(r"`([^`\n]+)`", page):
        match = re.match(r"(?:python -m hpc_hess|hpc-hess) ([a-z-]+ .*)", shown)
        if match:
            yield match[1]
    yield from re.findall(r"(?:launch/(?:torchrun|mpirun|srun)\.sh)((?: +-{1,2}n\w* \d+)* \S+\.toml[^#`\n]*)", page)


def test_the_commands_of_the_pages_parse() -> None:
    parser, seen = _parser(), 0
    for page in PAGES:
        for command in commands_shown(page.read_text()):
            words = shlex.split(command, comments=True)
            if "COMMAND" in words:
                continue
            words = words[: words.index(">")] if ">" in words else words
            if words[0].startswith("-") or words[0].endswith(".toml"):  # of a launcher: its own options, then run's
                first = next(k for k, word in enumerate(words) if word.endswith(".toml"))
                words = ["run", *words[first:]]
            parser.parse_args(words)  # SystemExit: it does not parse
            seen += 1
    assert seen > 50


def test_every_key_of_the_tables_exists() -> None:
    """Also those written short: `lanczos.steps`, `.probes`."""
    seen, wrong = 0, []
    for page in PAGES:
        for cell in re.findall(r"^\| (`[a-z]\w*(?:\.\w+)+`(?:, `\.\w+`)*) \|", page.read_text(), re.MULTILINE):
            first, *others = re.findall(r"`\.?([\w.]+)`", cell)
            section, _, key = first.rpartition(".")
            if section in SECTIONS and first not in _NOT_SETTINGS:
                keys = [key, *others]
                wrong += [f"{page.name}: {section}.{key}" for key in keys if key not in SECTIONS[section].model_fields]
                seen += len(keys)
    assert not wrong, "\n".join(wrong)
    assert seen
