"""Whatever a configuration holds, it is accepted or refused by one sentence; what is accepted reads back the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_hess.commands.config_page import commented_toml
from hpc_hess.config import Config, load_config
from hpc_hess.errors import ConfigError

DEFAULTS: dict[str, dict[str, Any]] = Config().model_dump()
KEYS = sorted((section, key) for section, values in DEFAULTS.items() for key in values)

scalars = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.text(max_size=8),
    st.datetimes(),
    st.dates(),
    st.sampled_from(["auto", "full", "none", "exact", "bfloat16", "float64", "00:00:00", "1-00:00:01", "layer", "must"]),
)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2)
)
# one of each key's own kind too, or most would be refused for their types
near = st.sampled_from(KEYS).flatmap(
    lambda place: st.tuples(st.just(place), anything | st.sampled_from([DEFAULTS[place[0]][place[1]], 1, 2, 7, 0.5, True]))
)
options = st.one_of(
    st.text(max_size=12),
    near.map(lambda c: f"{c[0][0]}.{c[0][1]}={c[1]}"),
    near.map(lambda c: f"{c[0][0]}.{c[0][1]}={c[1]!r}"),
)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("config") / "config.toml"


def read(file: Path, text: bytes, overrides: list[str]) -> Config | None:
    """The configuration, or None where it is refused as it should be."""
    file.write_bytes(text)
    config, refusal = None, ""
    try:
        config = load_config(file, overrides)
    except ConfigError as error:
        refusal = str(error)
    if config is None:
        assert refusal
        assert len(refusal.splitlines()) == 1
        return None
    config.identity()
    file.write_text(config.to_toml(), encoding="utf-8")
    assert load_config(file).to_toml() == config.to_toml()
    return config


@settings(max_examples=400, deadline=None)
@given(
    changes=st.lists(near, max_size=4),
    tables=st.dictionaries(st.text(max_size=6), anything, max_size=1),
    overrides=st.lists(options, max_size=2),
)
def test_keys_that_were_changed(
    file: Path, changes: list[tuple[tuple[str, str], Any]], tables: dict[str, Any], overrides: list[str]
) -> None:
    values: dict[str, Any] = {}
    for (section, key), value in changes:
        values.setdefault(section, {})[key] = value
    read(file, tomli_w.dumps(values | tables).encode(), overrides)


@settings(max_examples=300, deadline=None)
@given(at=st.integers(0, len(commented_toml().encode())), length=st.integers(0, 40), put=st.binary(max_size=6))
def test_files_that_were_damaged(file: Path, at: int, length: int, put: bytes) -> None:
    text = commented_toml().encode()
    read(file, text[:at] + put + text[at + length :], [])


@settings(max_examples=100, deadline=None)
@given(steps=st.integers(1, 2**40), probes=st.integers(1, 99), window=st.just("full") | st.just("none") | st.integers(1, 99))
def test_what_makes_sense_is_accepted(file: Path, steps: int, probes: int, window: str | int) -> None:
    values = {"lanczos": {"steps": steps, "probes": probes, "reorthogonalise": window}}
    config = read(file, tomli_w.dumps(values).encode(), [])
    assert config is not None
    assert (config.lanczos.steps, config.lanczos.probes, config.lanczos.reorthogonalise) == (steps, probes, window)
