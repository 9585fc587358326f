"""Rows, masks and micro-batches: what every rank sees, and one clear sentence for bad data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hpc_hess.config import DataSection, ModelSection
from hpc_hess.errors import DataError
from hpc_hess.model.data import documents as documents_module
from hpc_hess.model.data.data import Samples, idle_ranks_note, load_samples, micro_batches
from hpc_hess.model.sharded.loss import CausalLMObjective
from hpc_hess.model.sharded.micro_batch import shifted_targets
from hpc_hess.model.sources.source import Source, resolve_source
from tests.support.toys import VOCAB, toy_config, toy_model

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "the", "cat", "sat", "on", "a", "mat", "and", "slept", "."]


@pytest.fixture
def toy(tmp_path: Path) -> Source:
    toy_config("llama").save_pretrained(tmp_path / "model")
    return resolve_source(ModelSection(source=str(tmp_path / "model")))


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    fast.save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def load(source: str, toy: Source, tokenizer: str = "", **settings: object) -> Samples:
    values = {"sequence_length": 6, "sequences": 4} | settings
    model = ModelSection(source=str(toy.path), tokenizer=tokenizer)
    return load_samples(DataSection(source=source, **values), model, toy)  # type: ignore[arg-type]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_text_packed(tmp_path: Path, toy: Source, tokenizer: str) -> None:
    path = write(tmp_path / "a.txt", "the cat sat on a mat .\n\nand slept .")
    samples = load(f"text:{path}", toy, tokenizer)
    assert samples.input_ids.tolist() == [[1, 4, 5, 6, 7, 8], [9, 12, 10, 11, 12, 0]]
    assert samples.labels.tolist() == [[1, 4, 5, 6, 7, 8], [9, 12, 10, 11, 12, -100]]
    assert samples.attention_mask.tolist() == [[1] * 6, [1] * 5 + [0]]
    assert samples.num_tokens == 9
    assert samples.notes == [
        "the data give 2 sequences of the 4 asked for; all of them are used",
        "the data end within sequence 1, which has 5 tokens",
    ]


def test_text_padded_takes_lines(tmp_path: Path, toy: Source, tokenizer: str) -> None:
    path = write(tmp_path / "a.txt", "the cat sat\n\n.\n\nthe cat sat on a mat and slept .\nunseen\n")
    samples = load(f"text:{path}", toy, tokenizer, rows="pad", sequences=3)
    assert samples.input_ids.tolist() == [[1, 4, 5, 6, 0, 0], [1, 12, 0, 0, 0, 0], [1, 4, 5, 6, 7, 8]]
    assert samples.num_tokens == 3 + 1 + 5
    assert samples.notes == ["1 of 3 sequences are cut after data.sequence_length = 6 tokens, by up to 4"]


def test_long_texts_are_read_only_as_far_as_needed_and_give_the_same_rows(
    tmp_path: Path, toy: Source, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(0)
    text = " ".join(WORDS[i] for i in generator.integers(4, 13, 4000))
    path = write(tmp_path / "long.txt", text)
    whole = load(f"text:{path}", toy, tokenizer, sequences=700)
    monkeypatch.setattr(documents_module, "_FIRST_CHARACTERS", 500)
    in_parts = load(f"text:{path}", toy, tokenizer, sequences=700)
    assert len(whole) == 667  # 4001 tokens: 666 rows and a ragged one
    assert torch.equal(whole.labels, in_parts.labels)
    assert whole.fingerprint == in_parts.fingerprint
    first = load(f"text:{path}", toy, tokenizer, sequences=3)
    assert torch.equal(first.input_ids, whole.input_ids[:3])


def test_jsonl_packed_has_an_end_token_between_documents(tmp_path: Path, toy: Source, tokenizer: str) -> None:
    lines = [json.dumps({"body": text}) for text in ("the cat", "sat on", "a mat")]
    path = write(tmp_path / "a.jsonl", "\n".join(lines) + "\n\n")
    samples = load(f"jsonl:{path}", toy, tokenizer, text_field="body")
    assert samples.input_ids.tolist() == [[1, 4, 5, 2, 1, 6], [7, 2, 1, 8, 9, 0]]
    padded = load(f"jsonl:{path}", toy, tokenizer, text_field="body", rows="pad")
    assert padded.input_ids.tolist() == [[1, 4, 5], [1, 6, 7], [1, 8, 9]]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_token_arrays(tmp_path: Path, toy: Source, dtype: type) -> None:
    ids = np.arange(3, 3 + 26).astype(dtype)
    np.save(tmp_path / "stream.npy", ids)
    np.savez(tmp_path / "named.npz", input_ids=ids, other=np.ones(3))
    np.savez(tmp_path / "only.npz", whatever=ids)
    np.save(tmp_path / "rows.npy", ids[:24].reshape(3, 8))
    expected = ids[:24].reshape(4, 6).tolist()
    for name in ("stream.npy", "named.npz", "only.npz", "rows.npy"):
        assert load(f"tokens:{tmp_path / name}", toy).input_ids.tolist() == expected
    rows = load(f"tokens:{tmp_path / 'rows.npy'}", toy, rows="pad", sequence_length=5)
    assert rows.input_ids.tolist() == ids[:24].reshape(3, 8)[:, :5].tolist()


def test_datasets_directory(tmp_path: Path, toy: Source, tokenizer: str) -> None:
    datasets = pytest.importorskip("datasets")
    ids = datasets.Dataset.from_dict({"input_ids": [[5, 6, 7], [8, 9], [10]], "label": [0, 1, 2]})
    ids.save_to_disk(str(tmp_path / "ids"))
    assert load(f"datasets:{tmp_path / 'ids'}", toy).input_ids.tolist() == [[5, 6, 7, 8, 9, 10]]
    padded = load(f"datasets:{tmp_path / 'ids'}", toy, rows="pad")
    assert padded.labels.tolist() == [[5, 6, 7], [8, 9, -100]]  # a row of one token predicts nothing
    text = datasets.Dataset.from_dict({"text": ["the cat sat", "on a mat"]})
    text.save_to_disk(str(tmp_path / "text"))
    assert load(f"datasets:{tmp_path / 'text'}", toy, tokenizer).input_ids.tolist() == [
        [1, 4, 5, 6, 2, 1],
        [7, 8, 9, 0, 0, 0],
    ]
    datasets.DatasetDict({"train": text}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(DataError, match=r"splits \['train'\]: set data.source = 'datasets:.*train'"):
        load(f"datasets:{tmp_path / 'splits'}", toy, tokenizer)
    with pytest.raises(DataError, match="has no field 'content'"):
        load(f"datasets:{tmp_path / 'text'}", toy, tokenizer, text_field="content")


def ragged(toy: Source, tmp_path: Path, lengths: list[int]) -> Samples:
    pytest.importorskip("datasets")
    import datasets

    generator = np.random.default_rng(1)
    rows = [generator.integers(3, VOCAB, n).tolist() for n in lengths]
    datasets.Dataset.from_dict({"input_ids": rows}).save_to_disk(str(tmp_path / "ragged"))
    return load(f"datasets:{tmp_path / 'ragged'}", toy, rows="pad", sequences=len(lengths), sequence_length=12)


@pytest.mark.parametrize(("size", "micro_batch"), [(1, 1), (1, 3), (2, 2), (3, 2), (4, 1), (7, 2), (9, 4)])
def test_every_sample_once_and_equal_shapes_on_all_ranks(tmp_path: Path, toy: Source, size: int, micro_batch: int) -> None:
    samples = ragged(toy, tmp_path, [12, 3, 7, 2, 9, 12, 5])
    ranks = [micro_batches(samples, rank, size, micro_batch) for rank in range(size)]
    assert len({tuple(tuple(b.input_ids.shape) for b in batches) for batches in ranks}) == 1
    seen = sorted(i for batches in ranks for b in batches for i in b.sample_ids if i >= 0)
    assert seen == list(range(7))
    predicted = sum(int((shifted_targets(b.labels) != -100).sum()) for batches in ranks for b in batches)
    assert predicted == samples.num_tokens == sum(n - 1 for n in [12, 3, 7, 2, 9, 12, 5])
    for batches in ranks:
        for batch in batches:
            assert batch.input_ids.shape[0] <= micro_batch
            for i, ids, mask, labels in zip(
                batch.sample_ids, batch.input_ids, batch.attention_mask, batch.labels, strict=True
            ):
                assert torch.equal(ids, samples.input_ids[max(i, 0)])
                assert int(mask.sum()) > 0
                assert torch.equal(labels, samples.labels[i]) if i >= 0 else bool((labels == -100).all())
    assert (idle_ranks_note(len(samples), size) is None) == (size <= 7)


def test_loss_and_gradient_do_not_depend_on_the_division(tmp_path: Path, toy: Source) -> None:
    samples = ragged(toy, tmp_path, [12, 3, 7, 2, 9])
    model = toy_model("llama", dtype=torch.float64)

    def gradient(size: int, micro_batch: int) -> tuple[float, torch.Tensor]:
        model.zero_grad()
        total = 0.0
        for rank in range(size):
            batches = micro_batches(samples, rank, size, micro_batch)
            objective = CausalLMObjective(batches, samples.num_tokens, torch.device("cpu"))
            for index in range(objective.num_micro_batches):
                contribution = objective.contribution(model, index)
                contribution.total.backward()
                total += contribution.total.item()
        return total, torch.cat([p.grad.flatten() for p in model.parameters()])

    model.zero_grad()
    reference = 0.0
    for row, mask in zip(samples.input_ids, samples.attention_mask, strict=True):  # each row alone, without padding
        ids = row[mask == 1].unsqueeze(0)
        logits = model(input_ids=ids).logits
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum") / samples.num_tokens
        loss.backward()
        reference += loss.item()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    for size, micro_batch in [(1, 1), (1, 5), (2, 2), (3, 1), (8, 1)]:
        loss_value, found = gradient(size, micro_batch)
        assert abs(loss_value - reference) < 1e-6
        assert float((found - expected).norm() / expected.norm()) < 1e-6


def test_fingerprint_follows_rows(tmp_path: Path, toy: Source) -> None:
    np.save(tmp_path / "a.npy", np.arange(3, 33))
    np.save(tmp_path / "b.npy", np.arange(4, 34))
    a, again, b = (load(f"tokens:{tmp_path / n}.npy", toy).fingerprint for n in ("a", "a", "b"))
    assert a == again != b
    assert load(f"tokens:{tmp_path / 'a.npy'}", toy, sequences=2).fingerprint != a


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("csv:x", "should be text:FILE, jsonl:FILES, parquet:FILES, .* datasets:DIRECTORY or hub:ORG/NAME"),
        ("parquet:x", "no such data: x"),
        ("jsonl:no/*.jsonl", "no such data"),
        ("parquet:launch/data", "holds no .parquet file"),
        ("hub:name", "should be hub:ORG/NAME"),
        ("launch/data/gpl-3.txt", "did you mean 'text:launch/data/gpl-3.txt'"),
        ("text:no/such.txt", "no such data: no/such.txt"),
        ("text:", "no such data"),
        ("text:launch/data", "should name a file"),
        ("datasets:launch/data/gpl-3.txt", "should name a directory"),
        ("datasets:launch/data", "not a directory written by datasets.save_to_disk"),
        ("tokens:launch/data/gpl-3.txt", "should be a .npy or .npz file"),
    ],
)
def test_bad_sources(toy: Source, tokenizer: str, source: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(source, toy, tokenizer)


def test_bad_content(tmp_path: Path, toy: Source, tokenizer: str) -> None:
    def fails(source: str, message: str, **settings: object) -> None:
        with pytest.raises(DataError, match=message):
            load(source, toy, tokenizer, **settings)

    fails(f"text:{write(tmp_path / 'empty.txt', '')}", "is empty")
    fails(f"text:{write(tmp_path / 'blank.txt', '   ')}", "is empty", rows="pad")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 10)
    fails(f"text:{tmp_path / 'latin.txt'}", "UTF-8")
    fails(f"jsonl:{write(tmp_path / 'a.jsonl', '{}')}", r"line 1 has no field 'text' \(it has nothing\)")
    fails(f"jsonl:{write(tmp_path / 'b.jsonl', '[1]')}", "is not an object")
    fails(f"jsonl:{write(tmp_path / 'c.jsonl', chr(10) + '{')}", "line 2 is not JSON")
    np.save(tmp_path / "float.npy", np.ones(9))
    fails(f"tokens:{tmp_path / 'float.npy'}", "integer ids")
    np.save(tmp_path / "big.npy", np.array([3, VOCAB, 4]))
    fails(f"tokens:{tmp_path / 'big.npy'}", f"token id {VOCAB} .* vocabulary of {VOCAB}")
    np.save(tmp_path / "negative.npy", np.array([3, -1, 4]))
    fails(f"tokens:{tmp_path / 'negative.npy'}", "token id -1")
    fails(f"tokens:{tmp_path / 'negative.npy'}", "data.rows = 'pack'", rows="pad")
    np.save(tmp_path / "none.npy", np.array([], dtype=np.int64))
    fails(f"tokens:{tmp_path / 'none.npy'}", "is empty")
    np.save(tmp_path / "object.npy", np.array([{}]), allow_pickle=True)
    fails(f"tokens:{tmp_path / 'object.npy'}", "cannot read")
    np.savez(tmp_path / "many.npz", a=np.arange(3), b=np.arange(3))
    fails(f"tokens:{tmp_path / 'many.npz'}", "name the one to use 'input_ids'")
    good = write(tmp_path / "good.txt", "the cat sat")
    fails(f"text:{good}", "longer than the model's 64 positions", sequence_length=65)


def test_text_without_a_tokenizer(tmp_path: Path, toy: Source) -> None:
    path = write(tmp_path / "a.txt", "the cat")
    with pytest.raises(DataError, match=r"set model\.tokenizer .* 'tokens:PATH\.npy'"):
        load(f"text:{path}", toy)
    with pytest.raises(DataError, match="no such tokenizer"):
        load(f"text:{path}", toy, "no/such/tokenizer")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="cannot read a tokenizer"):
        load(f"text:{path}", toy, str(tmp_path / "nothing"))
