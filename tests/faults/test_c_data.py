"""Data as people have them: masks, columns, encodings, tokenisers. Losses are transformers' own, in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpc_hess.config import load_config, make_config
from hpc_hess.errors import DataError
from hpc_hess.model.data.data import Samples, load_samples, micro_batches
from hpc_hess.model.sharded.loss import CausalLMObjective
from hpc_hess.model.sources.source import resolve_source
from tests.support.base_model import edit_config, ids_b, model_b, save_b, write_config

TEXT = "the cat sat on the mat 12345  sat on the cat"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """B with a byte-level tokenizer of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    directory = tmp_path_factory.mktemp("model")
    save_b(directory)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=96, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator([TEXT] * 50, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "pad_token": "<pad>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def load(model: Path, source: str, **data: Any) -> Samples:
    config = make_config(
        {"model": {"source": str(model)}, "data": {"source": source, "sequence_length": 10, "sequences": 4, **data}}
    )
    return load_samples(config.data, config.model, resolve_source(config.model))


def loss_of(samples: Samples) -> float:
    """The program's own loss of the samples, in float64."""
    objective = CausalLMObjective(micro_batches(samples, 0, 1, 1), samples.num_tokens, torch.device("cpu"))
    with torch.no_grad():
        parts = [objective.contribution(model_b().double(), k).total for k in range(objective.num_micro_batches)]
    return float(sum(parts))


def saved(path: Path, columns: dict[str, Any], form: str | None = None) -> str:
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(columns).with_format(form).save_to_disk(str(path))
    return f"datasets:{path}"


def notes(samples: Samples, check: str) -> list[str]:
    return [f.text for f in samples.findings if f.check == check and f.verdict == "noted"]


# -- C1 ----------------------------------------------------------------------------------------------------------------

MASK = torch.tensor([[1] * 10, [1] * 8 + [0] * 2, [0] * 3 + [1] * 7])
LABELS = ids_b().masked_fill(MASK == 0, -100)
LABELS[:, :5] = -100


@pytest.mark.parametrize("rows", ["pack", "pad"])
@pytest.mark.parametrize("form", ["datasets", "npz"])
def test_labels_and_masks_of_saved_data_are_honoured(model: Path, tmp_path: Path, rows: str, form: str) -> None:
    columns = {"input_ids": ids_b(), "labels": LABELS, "attention_mask": MASK}
    if form == "npz":
        np.savez(tmp_path / "d.npz", **{name: each.numpy() for name, each in columns.items()})
        source = f"tokens:{tmp_path / 'd.npz'}"
    else:
        source = saved(tmp_path / "d", {name: each.tolist() for name, each in columns.items()})
    samples = load(model, source, rows=rows)
    reference = model_b().double()
    total = 0.0
    for ids, labels, kept in zip(ids_b(), LABELS, MASK.bool(), strict=True):  # each row by itself, without its padding
        alone = labels[kept][None]
        with torch.no_grad():
            total += float(reference(input_ids=ids[kept][None], labels=alone).loss) * int((alone[:, 1:] != -100).sum())
    assert samples.num_tokens == int((LABELS[:, 1:] != -100).sum()) == 13
    assert loss_of(samples) == pytest.approx(total / 13, rel=1e-6)  # transformers takes its loss in float32
    assert notes(samples, "data.mask") or form == "npz"


def test_masks_reach_every_rank(model: Path, tmp_path: Path) -> None:
    samples = load(model, saved(tmp_path / "d", {"input_ids": ids_b().tolist(), "labels": LABELS.tolist()}))
    parts = [batch.num_tokens for rank in range(2) for batch in micro_batches(samples, rank, 2, 1)]
    assert sum(parts) == samples.num_tokens == int((LABELS[:, 1:] != -100).sum())


def test_masks_that_mask_nothing_leave_rows_packed(model: Path, tmp_path: Path) -> None:
    rows = ids_b().tolist()
    masked = saved(tmp_path / "a", {"input_ids": rows, "labels": rows, "attention_mask": [[1] * 10] * 3})
    plain = saved(tmp_path / "b", {"input_ids": rows})
    assert load(model, masked, sequence_length=7).fingerprint == load(model, plain, sequence_length=7).fingerprint


@pytest.mark.parametrize("name", ["assistant_masks", "completion_mask"])
def test_masks_of_completions_are_labels(model: Path, tmp_path: Path, name: str) -> None:
    rows, chosen = ids_b().tolist(), [[0] * 5 + [1] * 5] * 3
    samples = load(model, saved(tmp_path / "d", {"input_ids": rows, name: chosen}))
    assert samples.num_tokens == 15


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("loss_mask", [[0] * 5 + [1] * 5] * 3, "column 'loss_mask' looks as if"),
        ("weights", [[1] * 10] * 3, "column 'weights' looks as if"),
        ("position_ids", [[*range(5), *range(5)]] * 3, "column 'position_ids' looks as if"),
        ("seq_lengths", [[5, 5]] * 3, "column 'seq_lengths' looks as if"),
        ("labels", [0, 1, 0], "one number a row"),
        ("labels", [[3] * 5] * 3, "has 5 entries for 10 tokens"),
        ("labels", [[3] * 10] * 3, "hold other ids than input_ids"),
        ("labels", [[-100] * 10] * 3, "leave no token"),
        ("attention_mask", [[1, 1, 0, 1, 1, 1, 1, 1, 1, 1]] * 3, "zeros between tokens"),
    ],
)
def test_columns_that_cannot_be_honoured_are_named(model: Path, tmp_path: Path, name: str, value: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        load(model, saved(tmp_path / "d", {"input_ids": ids_b().tolist(), name: value}))


def test_harmless_columns_are_noted(model: Path, tmp_path: Path) -> None:
    columns = {"input_ids": ids_b().tolist(), "position_ids": [list(range(10))] * 3, "url": ["a", "b", "c"]}
    assert notes(load(model, saved(tmp_path / "d", columns)), "data.columns") == [
        "d: only 'input_ids' is read; left out: url"
    ]


# -- C2 ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["torch", "numpy", "pandas", "arrow"])
def test_every_format_of_saved_data_is_read(model: Path, tmp_path: Path, form: str) -> None:
    rows = ids_b().tolist()
    samples = load(model, saved(tmp_path / "d", {"input_ids": rows}, form), rows="pad")
    assert samples.input_ids.tolist() == rows


# -- C3 ----------------------------------------------------------------------------------------------------------------


def test_a_byte_order_mark_is_no_token(model: Path, tmp_path: Path) -> None:
    for name, head in (("plain", b""), ("marked", b"\xef\xbb\xbf")):
        (tmp_path / f"{name}.txt").write_bytes(head + TEXT.encode())
        (tmp_path / f"{name}.jsonl").write_bytes(head + json.dumps({"text": TEXT}).encode())
        (tmp_path / f"{name}.toml").write_bytes(head + b"[lanczos]\nsteps = 3\n")
    for kind, ending, rows in (("text", "txt", "pack"), ("text", "txt", "pad"), ("jsonl", "jsonl", "pack")):
        found = [load(model, f"{kind}:{tmp_path / name}.{ending}", rows=rows).input_ids for name in ("plain", "marked")]
        assert found[0].equal(found[1])
    assert load_config(tmp_path / "marked.toml").lanczos.steps == 3
    assert "byte order mark" in notes(load(model, f"text:{tmp_path / 'marked.txt'}"), "data.encoding")[0]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (TEXT.encode("utf-16"), "is UTF-16 text: convert it"),
        (("caf\xe9 " + TEXT).encode("latin-1"), "iconv -f LATIN1"),
        (b"\x1f\x8b\x08" + bytes(40), "is compressed"),
    ],
)
def test_other_encodings_are_named(model: Path, tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    for rows in ("pack", "pad"):
        with pytest.raises(DataError, match=says):
            load(model, f"text:{tmp_path / 'a.txt'}", rows=rows)


# -- C4 ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"text": "ok \ud83d"}, "line 2, field 'text' is not valid Unicode"),
        ({"text": None}, "line 2, field 'text' is null"),
        ({"text": ["a"]}, "line 2, field 'text' is a list"),
        ({"text": 3}, "line 2, field 'text' is a number"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "line 2 is a conversation, the records before it a text"),
        ({"prompt": "a", "completion": "b"}, "line 2 is a prompt, the records before it a text"),
        ({"chosen": "a", "rejected": "b"}, "set data.text_field to the one that the loss is over"),
        ({"body": "a"}, "set data.text_field to one of: body"),
        ({"text": TEXT, "loss_mask": [0, 1]}, "'loss_mask' is a list beside a text"),
        ([1], "line 2 is not an object"),
    ],
)
def test_lines_that_hold_no_text_are_named(model: Path, tmp_path: Path, record: Any, says: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "the"}) + "\n" + json.dumps(record) + "\n")
    with pytest.raises(DataError, match=says):
        load(model, f"jsonl:{tmp_path / 'a.jsonl'}")


# -- C5 ----------------------------------------------------------------------------------------------------------------


def test_ids_are_those_of_tokenizer_json(model: Path, tmp_path: Path) -> None:
    import shutil

    from tokenizers import Tokenizer

    other = tmp_path / "model"
    shutil.copytree(model, other)
    edit_config(other, model_type="qwen2", architectures=["Qwen2ForCausalLM"])
    (other / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizerFast", "eos_token": "</s>"}))
    (tmp_path / "a.txt").write_text(TEXT)
    right = Tokenizer.from_file(str(model / "tokenizer.json")).encode(TEXT).ids
    for directory in (model, other):
        samples = load(directory, f"text:{tmp_path / 'a.txt'}", sequence_length=len(right), sequences=1)
        assert samples.input_ids[0].tolist() == right
    assert f"tokenizer.json itself {len(right)}" in notes(samples, "data.tokenizer")[0]


def test_findings_of_the_data_stand_in_the_result(model: Path, tmp_path: Path) -> None:
    from hpc_hess.console.progress import Progress
    from hpc_hess.parallel.world import World
    from hpc_hess.session.problem import load_problem

    (tmp_path / "a.txt").write_text(TEXT)
    values = {"model": {"source": str(model)}, "data": {"source": f"text:{tmp_path / 'a.txt'}", "sequence_length": 10}}
    config = load_config(write_config(tmp_path / "c.toml", values))
    checks = {f["check"] for f in load_problem(config, World.alone("cpu"), Progress(0)).intake.to_json()}
    assert checks >= {"data.source", "data.tokenizer"}
