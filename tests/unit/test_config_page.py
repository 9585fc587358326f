"""The configuration described: every key has a meaning, what is printed is valid, the page is up to date."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from hpc_hess import cli
from hpc_hess.commands.config_page import FIRST, commented_toml, markdown, tables
from hpc_hess.config import Config, make_config

ROOT = Path(__file__).parents[2]


def test_every_key_and_table_has_a_meaning_of_whole_sentences() -> None:
    for table in tables():
        assert table.meaning.endswith("."), table.name
        for key in table.keys:
            assert key.meaning.endswith("."), f"{table.name}.{key.name} has no text under it in config.py"
            assert "|" not in key.meaning  # it would end a cell of the page


def test_every_key_is_printed_with_its_default() -> None:
    text = commented_toml()
    assert tomllib.loads(text) == Config().model_dump()
    assert make_config(tomllib.loads(text)) == make_config({})
    assert max(map(len, text.splitlines())) <= 125


def test_the_keys_that_matter_first() -> None:
    values = tomllib.loads(commented_toml(minimal=True))
    studies = {f"studies.{name}": keys for name, keys in values.pop("studies").items()}
    found = {f"{section}.{key}" for section, keys in (values | studies).items() for key in keys}
    assert found == set(FIRST)
    assert make_config(tomllib.loads(commented_toml(minimal=True))) == make_config({})


def test_values_are_said_in_words() -> None:
    values = {f"{table.name}.{key.name}": key.values for table in tables() for key in table.keys}
    assert values["lanczos.reorthogonalise"] == '"full", "none" or integer'
    assert values["lanczos.seed"] == "integer, at least 0, below 2^63"
    assert values["parameters.include"] == "list of text"


def test_the_page_is_up_to_date() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert page == markdown(), "run: hpc-hess config --markdown > docs/configuration.md"


def test_the_command_prints_each(capsys: pytest.CaptureFixture[str]) -> None:
    for words, text in (([], commented_toml()), (["--minimal"], commented_toml(minimal=True)), (["--markdown"], markdown())):
        assert cli.main(["config", *words]) == 0
        assert capsys.readouterr().out == text
