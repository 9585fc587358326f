"""Models of the Hub by name, from a server on the loopback: the cache, the ranks, downloads that break off, refusals."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from safetensors.torch import save_file

from hpc_hess.cli import main
from hpc_hess.config import DataSection, ModelSection
from hpc_hess.errors import DataError, ModelError
from hpc_hess.model.data.data import Samples, load_samples
from hpc_hess.model.sources import hub as hub_module
from hpc_hess.model.sources.hub import named, reaching
from hpc_hess.model.sources.source import resolve_source
from tests.support.adapters import copy_case, edit_settings
from tests.support.base_model import result_of, save_b, settings_b, tokens_b
from tests.support.hub_server import Hub, Repository, ask_here, asking, serving
from tests.support.launching import complete

pytestmark = pytest.mark.slow
COMMIT = "a" * 40
WEIGHTS = "model.safetensors"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A repository with more than a model needs."""
    folder = tmp_path / "served"
    save_b(folder)
    (folder / "README.md").write_text("read me")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "config.json").write_text("{}")
    return folder


@pytest.fixture
def hub(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A server with org/b, which this process asks, with a cache of its own."""
    with serving(org__b=model) as hub:
        ask_here(hub, tmp_path / "home", monkeypatch)
        yield hub


def config(tmp_path: Path, **changes: Any) -> Path:
    """Write a configuration of the name org/b."""
    values = settings_b(Path("org/b"), tokens_b(tmp_path / "tokens.npy"), tmp_path / "run", **changes)
    path = tmp_path / "config.toml"
    path.write_bytes(tomli_w.dumps(values).encode())
    return path


def fetched(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[Path, str]:
    """Run hpc-hess fetch; return the directory that it prints, and what it says besides."""
    assert main(["fetch", *arguments]) == 0
    out, err = capsys.readouterr()
    return Path(out.strip()), err


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that ends with exit code 2; return the one line of its error."""
    assert main([*arguments]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hpc-hess: error")]
    assert len(errors) == 1
    return errors[0]


def files_in(home: Path) -> set[str]:
    return {path.name for path in home.glob("hub/*/snapshots/*/*") if path.is_file()}


def test_only_what_is_needed_is_fetched_and_once(
    hub: Hub, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, _ = fetched(capsys, "org/b")
    assert directory.name == COMMIT
    assert {path.name for path in directory.iterdir()} == {"config.json", "generation_config.json", WEIGHTS}
    assert (directory / WEIGHTS).read_bytes() == (model / WEIGHTS).read_bytes()
    assert len(hub.asked(WEIGHTS)) == 1
    assert not hub.asked(".bin") + hub.asked("README.md") + hub.asked("onnx/config.json")
    hub.requests.clear()
    source = resolve_source(ModelSection(source="org/b"))
    assert not hub.requests  # the cache has it
    assert (source.name, source.commit, source.fingerprint) == ("org/b", COMMIT, f"commit:{COMMIT}")
    by_path = resolve_source(ModelSection(source=str(model)))
    assert source.fingerprint.accepts(str(by_path.fingerprint))  # a run by path goes on by name
    assert not source.fingerprint.accepts("commit:" + "b" * 40)


def test_two_ranks_by_name_are_two_ranks_by_path(model: Path, tmp_path: Path) -> None:
    by_name = config(tmp_path, run__report=True, lanczos__steps=4)
    with serving(org__b=model) as hub:
        code, output = complete("torchrun.sh", "-n", "2", by_name, **asking(hub, tmp_path / "home"), timeout_s=500)
        assert code == 0, output
        assert len(hub.asked(WEIGHTS)) == len(hub.asked("/config.json")) == 1  # one rank downloads
    found = result_of(tmp_path / "run")
    assert found["model"]["commit"] == COMMIT
    assert found["model"]["fingerprint"] == f"commit:{COMMIT}"
    assert COMMIT in (tmp_path / "run" / "report.html").read_text()
    changes = ["--set", f"model.source={model}", "--set", f"run.out={tmp_path / 'path'}", "--set", "run.report=false"]
    code, output = complete("torchrun.sh", "-n", "2", by_name, *changes, timeout_s=500)
    assert code == 0, output
    other = result_of(tmp_path / "path")
    assert found["loss"] == other["loss"]
    assert found["probes"] == other["probes"]


def test_an_answer_that_is_cut_is_gone_on_with(
    hub: Hub, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The library writes pieces of 10 MiB, and asks for what comes after the last one."""
    save_file({"lm_head.weight": torch.arange(4 << 20, dtype=torch.float32)}, model / WEIGHTS)
    hub.cut_at = 11 << 20
    directory, _ = fetched(capsys, "org/b")
    assert [each[2] for each in hub.asked(WEIGHTS)] == ["", f"bytes={10 << 20}-"]
    assert (directory / WEIGHTS).read_bytes() == (model / WEIGHTS).read_bytes()


def test_a_server_that_dies_half_way(model: Path, tmp_path: Path) -> None:
    """One sentence from both ranks; nothing half-written counts; the same command goes on where there is a server again."""
    arguments = ["torchrun.sh", "-n", "2", config(tmp_path, lanczos__steps=4)]
    with serving(org__b=model) as hub:
        hub.dies_at = 20000
        code, output = complete(*arguments, **asking(hub, tmp_path / "home"), timeout_s=500)
        assert code == 2, output
        errors = [line for line in output.splitlines() if "hpc-hess: error" in line]
        assert len(errors) == 1
        assert "could not be downloaded" in errors[0]
        assert "`hpc-hess fetch org/b`" in errors[0]
        assert "Traceback" not in output
        assert WEIGHTS not in files_in(tmp_path / "home")
        assert not list((tmp_path / "home").rglob("*.incomplete"))
        hub.dies_at, hub.stopped = 0, False
        hub.requests.clear()
        code, output = complete(*arguments, **asking(hub, tmp_path / "home"), timeout_s=500)
        assert code == 0, output
        assert len(hub.asked(WEIGHTS)) == 1
        assert not hub.asked("/config.json")  # it was whole


def _unknown(hub: Hub) -> None:
    hub.repositories.clear()


def _gated(hub: Hub) -> None:
    hub.repositories["org/b"].gated = True


def _pickles(hub: Hub) -> None:
    (hub.repositories["org/b"].folder / WEIGHTS).unlink()


def _gguf(hub: Hub) -> None:
    _pickles(hub)
    folder = hub.repositories["org/b"].folder
    (folder / "pytorch_model.bin").rename(folder / "b.gguf")


def _nothing(hub: Hub) -> None:
    _pickles(hub)
    (hub.repositories["org/b"].folder / "pytorch_model.bin").unlink()


def _adapter(hub: Hub) -> None:
    (hub.repositories["org/b"].folder / "adapter_config.json").write_text('{"peft_type": "IA3"}')


def _corrupt(hub: Hub) -> None:
    hub.wrong_bytes = True


def _broken(hub: Hub) -> None:
    hub.fails = 503


def _refused(hub: Hub) -> None:
    hub.fails = 403


def test_an_adapter_brings_its_base(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter = copy_case("patterns", tmp_path / "case")
    edit_settings(adapter, base_model_name_or_path="org/base", revision="v1")
    hub.repositories |= {"org/base": Repository(base, {"v1": "c" * 40}), "org/lora": Repository(adapter)}
    directory, _ = fetched(capsys, "org/lora")
    assert {path.name for path in directory.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    hub.requests.clear()
    source = resolve_source(ModelSection(source="org/lora"))
    assert not hub.requests  # both are in the cache
    assert source.base is not None
    assert (source.name, source.commit, source.base.name, source.base.commit) == ("org/lora", COMMIT, "org/base", "c" * 40)
    by_path = resolve_source(ModelSection(source=str(adapter), base=str(base)))
    assert source.fingerprint == by_path.fingerprint


@pytest.mark.parametrize(
    ("fault", "name", "more", "words"),
    [
        (_unknown, "org/b", {}, ["'org/b' is no path here and not a model of http", "HF_TOKEN"]),
        (_gated, "org/b", {}, ["is gated", "hf auth login", "HF_TOKEN"]),
        (_gated, "org/b", {"HF_TOKEN": "hf_wrong"}, ["is gated", "hf auth login", "HF_TOKEN"]),
        (_refused, "org/b", {}, ["refuses access to org/b (403)", "HF_TOKEN"]),
        (_broken, "org/b", {}, ["it answers 503", "hpc-hess fetch org/b"]),
        (None, "org/b@v9", {}, ["no revision 'v9'", "model.revision"]),
        (None, "org/b--c", {}, ["cannot be a name on the Hub"]),
        (None, "org/b", {"HPC_HESS_NAMES_ONLINE": ""}, ["not in the cache", "HF_HUB_OFFLINE", "`hpc-hess fetch org/b`"]),
        (None, "org/b", {"TRANSFORMERS_OFFLINE": "1"}, ["not in the cache", "`hpc-hess fetch org/b`"]),
        (_pickles, "org/b", {}, ["pickled weights only", "model.revision"]),
        (_gguf, "org/b", {}, ["hf download org/b b.gguf", "model.source = 'DIR/b.gguf'"]),
        (_nothing, "org/b", {}, ["holds no safetensors weights"]),
        (_adapter, "org/b", {}, ["PEFT adapter of type IA3", "only LoRA is read"]),
        (_corrupt, "org/b", {}, ["wrong checksum", "run the same command again"]),
        (None, "nothing", {}, ["is no name of the Hub: give ORG/NAME"]),
        (None, "/tmp", {}, ["is a path here: give ORG/NAME"]),
    ],
)
def test_what_is_refused(
    fault: Any,
    name: str,
    more: dict[str, str],
    words: list[str],
    hub: Hub,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One sentence, exit code 2, and no weights that a later run would take."""
    for key, value in more.items():
        monkeypatch.setenv(key, value)
    if fault is not None:
        fault(hub)
    line = refused(capsys, "fetch", name)
    assert all(word in line for word in words), line
    assert WEIGHTS not in files_in(tmp_path / "home")
    if fault is not _corrupt:
        assert not hub.asked(WEIGHTS)


def test_no_network(
    tmp_path: Path, model: Path, hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched(capsys, "org/b")
    hub.url = "http://127.0.0.1:9"
    ask_here(hub, tmp_path / "home", monkeypatch)
    assert resolve_source(ModelSection(source="org/b")).commit == COMMIT  # the cache is enough
    line = refused(capsys, "fetch", "org/c")
    assert "org/c could not be downloaded from http://127.0.0.1:9 (ConnectError" in line
    assert "where there is a network" in line


def test_a_configuration_that_cannot_be_used_is_refused_before_its_weights(hub: Hub, model: Path) -> None:
    file = model / "config.json"
    file.write_text(file.read_text().replace('"llama"', '"nothing"'))
    with pytest.raises(ModelError, match="cannot read the model configuration"):
        resolve_source(ModelSection(source="org/b"))
    assert not hub.asked(WEIGHTS)


def test_the_hub_may_ask_to_wait(hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories["org/b"].gated, hub.token, hub.busy = True, "hf_right", 2
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert "the Hub asks to wait 1 s (429, try 1 of 5)" in fetched(capsys, "org/b@main")[1]


def test_a_plan_reads_no_weights_and_a_revision_is_another_model(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.repositories["org/b"].revisions["step1000"] = "b" * 40
    with reaching("small"):
        planned = resolve_source(ModelSection(source="org/b", revision="step1000"))
    assert not hub.asked(WEIGHTS)
    assert planned.commit == "b" * 40
    assert planned.findings[0].text == "the weights of org/b@step1000 are not in the cache"
    assert fetched(capsys, "org/b@step1000")[0].name == "b" * 40
    assert fetched(capsys, "org/b")[0].name == COMMIT
    assert len(hub.asked(WEIGHTS)) == 1  # the same file of both commits
    assert resolve_source(ModelSection(source="org/b@step1000")).commit == "b" * 40


def test_rows_of_a_data_set_come_file_by_file(hub: Hub, model: Path, tmp_path: Path) -> None:
    """Which files are which split, its card says; those that are not needed are not downloaded; then the cache is enough."""
    import datasets

    folder = tmp_path / "rows"
    (folder / "data").mkdir(parents=True)
    for number in range(3):
        rows = {"input_ids": [[5 + number, 6, 7, 8]] * 2, "labels": [[-100, 6, 7, 8]] * 2}
        datasets.Dataset.from_dict(rows).to_parquet(folder / "data" / f"train-{number}.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: small\n  data_files:\n  - split: train\n    path: data/train-*.parquet\n"
        "  - split: test\n    path: data/train-2.parquet\n- config_name: other\n  data_files: data/train-1.parquet\n---\n"
    )
    hub.repositories["datasets/org/rows"] = Repository(folder, {"main": "c" * 40})
    source = resolve_source(ModelSection(source=str(model)))

    def load(**changes: Any) -> Samples:
        values = {"source": "hub:org/rows", "config": "small", "sequence_length": 8, "sequences": 3, **changes}
        return load_samples(DataSection(**values), ModelSection(source=str(model)), source)

    found = load()
    assert found.commit == "c" * 40
    assert found.input_ids[:, 0].tolist() == [5, 5, 6]
    assert found.labels[0].tolist() == [-100, 6, 7, 8]
    assert [len(hub.asked(f"train-{number}.parquet")) for number in range(3)] == [1, 1, 0]
    assert load(split="test").input_ids[:, 0].tolist() == [7, 7]
    hub.requests.clear()
    with reaching("none"):
        assert load().fingerprint == found.fingerprint
    assert not hub.requests
    for changes, says in (
        ({"split": "validation"}, "set data.split to one of 'train', 'test'"),
        ({"config": "large"}, r"no configuration 'large': set data.config to one of \['small', 'other'\]"),
        ({"config": ""}, r"no configuration '': set data.config to one of \['small', 'other'\]"),
        ({"source": "hub:org/none"}, "not a data set of"),
        ({"revision": "v9"}, "no revision 'v9': set data.revision"),
    ):
        with pytest.raises(DataError, match=says):
            load(**changes)
    with reaching("none"), pytest.raises(DataError, match="hpc-hess fetch CONFIG.toml"):
        load(revision="v9")


def test_a_path_wins_over_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert named("org/b", "", "model") is not None
    assert named("org/b@v1", "", "model") == ("org/b", "v1", "model")
    (tmp_path / "org" / "b").mkdir(parents=True)
    assert named("org/b", "", "model") is None
    for text in ("b", "./org/c", "~/c", "/org/c", "org/c.gguf", "org/c/config.json", "org/config.json", "a/b/c"):
        assert named(text, "", "model") is None
    with pytest.raises(ModelError, match="two revisions"):
        named("org/c@v1", "v2", "model")


def test_a_full_disk_is_seen_before(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "may_ask", lambda: True)
    monkeypatch.setattr(hub_module, "cached", lambda name: None)
    monkeypatch.setattr(hub_module, "files_of", lambda name, commit: {WEIGHTS: 1 << 60})
    name = named("org/b", "", "model")
    assert name is not None
    with pytest.raises(ModelError, match="needs 1.15e\\+09 GB more in .* free some, or set HF_HOME"):
        hub_module.bring(name, COMMIT, [WEIGHTS])
