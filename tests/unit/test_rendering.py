"""Conversations, prompts with completions, files of many forms: which tokens there are, and which the loss is over."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from hpc_hess.commands.show_data import show_data
from hpc_hess.config import DataSection, ModelSection, make_config
from hpc_hess.errors import ConfigError, DataError
from hpc_hess.intake.masks import IGNORED
from hpc_hess.model.data.data import Samples, load_samples
from hpc_hess.model.sources.source import Source, resolve_source
from tests.support.base_model import config_b
from tests.support.chat_models import CHATML, directory

MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORGETFUL = (  # as templates that leave out earlier reasoning: the last turn is written otherwise
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if loop.last and m['role'] == 'assistant' %}<think>{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FAILING = "{{ raise_exception('roles must alternate') }}"
TURNS = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Hello there"},
    {"role": "assistant", "content": "Hi!"},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "No  idea,\nsorry "},
]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return directory(tmp_path / "model", CHATML)


def load(model: Path, source: str, **settings: Any) -> Samples:
    section = ModelSection(source=str(model))
    data = DataSection(source=source, **{"sequence_length": 400, "sequences": 8, **settings})
    return load_samples(data, section, resolve_source(section))


def source_of(model: Path) -> Source:
    return resolve_source(ModelSection(source=str(model)))


def tokenizer_of(model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def written(path: Path, *records: Any) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return f"jsonl:{path}"


def ids_of(samples: Samples, row: int = 0) -> list[int]:
    return samples.input_ids[row][samples.attention_mask[row] == 1].tolist()


def said(samples: Samples, model: Path, row: int = 0) -> str:
    """Return the text of the predicted tokens, gaps as |."""
    decode, text = tokenizer_of(model).decode, ""
    for token, label in zip(ids_of(samples, row), samples.labels[row].tolist(), strict=False):
        text += decode([token]) if label != IGNORED else "|"
    while "||" in text:
        text = text.replace("||", "|")
    return text


def notes(samples: Samples, check: str) -> list[str]:
    return [finding.text for finding in samples.findings if finding.check == check]


def test_a_conversation_by_differences_of_renderings(model: Path, tmp_path: Path) -> None:
    samples = load(model, written(tmp_path / "a.jsonl", {"messages": TURNS}))
    rendered = tokenizer_of(model).apply_chat_template(TURNS, tokenize=False)
    assert ids_of(samples) == tokenizer_of(model)(rendered, add_special_tokens=False)["input_ids"]
    assert said(samples, model) == "|Hi!<|im_end|>|No  idea,\nsorry <|im_end|>|"
    assert notes(samples, "data.mask")[0] == "the loss is over the assistant's tokens (data.loss_on = 'auto')"


def test_a_conversation_by_marks_is_as_transformers_has_it(tmp_path: Path) -> None:
    model = directory(tmp_path / "model", MARKED)
    samples = load(model, written(tmp_path / "a.jsonl", {"messages": TURNS}))
    found = tokenizer_of(model).apply_chat_template(
        TURNS, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert ids_of(samples) == found["input_ids"]
    assert [int(label != IGNORED) for label in samples.labels[0].tolist()] == found["assistant_masks"]
    plain = load(directory(tmp_path / "plain", CHATML), written(tmp_path / "a.jsonl", {"messages": TURNS}))
    assert samples.fingerprint == plain.fingerprint  # marks and differences agree


def test_a_real_tokenizer_and_its_template(tmp_path: Path) -> None:
    """Merges go over the ends of texts; a token that overlaps the assistant's text is its own, in both ways."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=299, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    words.train_from_iterator(["assistant: Hi! Hello there, no  idea"] * 9, trainer)
    prefix = "{% for m in messages %}\n{{ m['role'] }}:{% if m['role'] == 'assistant' %}"
    suffix = "{{ m['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}\nassistant:{% endif %}"
    marked = prefix + "{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}" + suffix
    found = {}
    for name, template in (("marked", marked), ("plain", prefix + "{{ m['content'] }}{% else %}" + suffix)):
        fast = PreTrainedTokenizerFast(tokenizer_object=words)
        fast.chat_template = template
        fast.save_pretrained(tmp_path / name)
        config_b(vocab_size=300, max_position_embeddings=2048).save_pretrained(tmp_path / name)
        found[name] = load(tmp_path / name, written(tmp_path / "a.jsonl", {"messages": TURNS}))
    assert found["marked"].labels.tolist() == found["plain"].labels.tolist()
    assert 0 < found["plain"].num_tokens < found["plain"].input_ids.shape[1]


def test_a_template_that_writes_earlier_turns_otherwise_is_refused(tmp_path: Path) -> None:
    model = directory(tmp_path / "model", FORGETFUL)
    source = written(tmp_path / "a.jsonl", {"messages": TURNS})
    with pytest.raises(DataError, match=r"a.jsonl, line 1: .* turn 3 otherwise .* \{% generation %\} marks"):
        load(model, source)
    assert load(model, source, loss_on="all").num_tokens > 50
    alone = load(model, written(tmp_path / "b.jsonl", {"messages": TURNS[:3]}))
    assert said(alone, model) == "|<think>Hi!<|im_end|>|"


def test_sharegpt_tools_and_parts_of_text(model: Path, tmp_path: Path) -> None:
    theirs = [
        {"from": "system", "value": "Be short."},
        {"from": "human", "value": "Hello there"},
        {"from": "gpt", "value": "Hi!", "weight": None},
        {"role": "user", "content": [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?"}], "tool_calls": None},
        {"role": "assistant", "content": "No  idea,\nsorry "},
    ]
    ours = load(model, written(tmp_path / "a.jsonl", {"messages": TURNS}))
    assert load(model, written(tmp_path / "b.jsonl", {"conversations": theirs})).fingerprint == ours.fingerprint
    named = written(tmp_path / "c.jsonl", {"chat": TURNS, "id": 3})
    found = load(model, named, text_field="chat")
    assert found.fingerprint == ours.fingerprint
    assert notes(found, "data.columns") == ["c.jsonl: only 'chat' is read; left out: id"]


def test_prompts_and_completions(model: Path, tmp_path: Path) -> None:
    source = written(tmp_path / "a.jsonl", {"prompt": "2 + 2 =", "completion": " 4"}, {"prompt": "a", "completion": "bc"})
    samples = load(model, source)
    assert [said(samples, model, row) for row in (0, 1)] == ["| 4", "|bc"]
    assert len(samples) == 2  # not packed
    assert notes(samples, "data.mask")[0] == "the loss is over the completions (data.loss_on = 'auto')"
    packed = load(model, source, loss_on="all")
    assert tokenizer_of(model).decode(ids_of(packed)) == "2 + 2 = 4<|im_end|>abc"
    chat = {"prompt": TURNS[:4], "completion": TURNS[4:]}
    assert said(load(model, written(tmp_path / "b.jsonl", chat)), model) == "|No  idea,\nsorry <|im_end|>|"
    assert said(load(model, written(tmp_path / "b.jsonl", chat), loss_on="assistant"), model).startswith("|Hi!<|im_end|>|No")


def test_ids_with_masks(model: Path, tmp_path: Path) -> None:
    record = {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8], "attention_mask": [1, 1, 1, 0]}
    source = written(tmp_path / "a.jsonl", record)
    samples = load(model, source)
    assert samples.labels.tolist() == [[-100, -100, 7]]
    assert load(model, source, loss_on="all", rows="pad").labels.tolist() == [[5, 6, 7]]
    with pytest.raises(DataError, match="'assistant' does not fit .* no column 'assistant_masks'"):
        load(model, source, loss_on="assistant")


def test_a_mask_that_comes_late_is_not_lost(model: Path, tmp_path: Path) -> None:
    records = [{"input_ids": [5, 6]}, {"input_ids": [5, 6]}, {"input_ids": [7, 8, 9], "labels": [-100, 8, 9]}]
    source = written(tmp_path / "a.jsonl", *records)
    with pytest.raises(DataError, match="line 3 has a mask, which the first records have not: set data.rows = 'pad'"):
        load(model, source, sequences=2)
    assert load(model, source, rows="pad").labels.tolist() == [[5, 6, -100], [5, 6, -100], [-100, 8, 9]]


@pytest.mark.parametrize(
    ("record", "settings", "says"),
    [
        ({"messages": []}, {}, "line 1, field 'messages' should be a list of turns"),
        ({"messages": "hello"}, {}, "field 'messages' should be a list of turns"),
        ({"messages": ["hello"]}, {}, "turn 1 should be an object with 'role' and 'content'"),
        ({"messages": [{"speaker": "a", "content": "b"}]}, {}, "turn 1 has speaker, content: it should have 'role'"),
        ({"messages": [{"role": "user", "content": 3}]}, {}, "'content' is int"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}, {}, "a part of type 'image'"),
        ({"messages": [{"role": "user", "content": "\ud83d"}, TURNS[2]]}, {}, "lone surrogate"),
        ({"messages": TURNS, "tools": "{"}, {}, "field 'tools' is no JSON"),
        ({"messages": TURNS[:2]}, {}, "the masks leave no token that is predicted"),
        ({"messages": TURNS}, {"sequence_length": 20}, "the masks leave no token that is predicted"),
        ({"messages": TURNS}, {"loss_on": "completion"}, "set it to 'auto' or 'assistant' or 'all'"),
        ({"text": "the"}, {"loss_on": "assistant"}, "set it to 'auto' or 'all'"),
        ({"prompt": "a", "completion": "b"}, {"loss_on": "assistant"}, "set it to 'auto' or 'completion' or 'all'"),
        ({"prompt": "a", "completion": None}, {}, "field 'completion' is null"),
        ({"prompt": "a"}, {}, "set data.text_field to one of: prompt"),
        ({"chosen": TURNS, "rejected": TURNS}, {}, "holds answers to prefer"),
        ({"messages": TURNS, "label_mask": [1]}, {}, "is a list beside a conversation"),
    ],
)
def test_what_is_refused(record: Any, settings: dict[str, Any], says: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=says):
        load(model, written(tmp_path / "a.jsonl", record), **settings)


def test_templates_that_are_missing_or_fail(tmp_path: Path) -> None:
    source = written(tmp_path / "a.jsonl", {"messages": TURNS})
    with pytest.raises(DataError, match="has no chat template: set model.tokenizer"):
        load(directory(tmp_path / "none"), source)
    with pytest.raises(DataError, match="the chat template fails: roles must alternate; mend the turns"):
        load(directory(tmp_path / "failing", FAILING), source)


def test_files_of_all_forms_give_the_same_rows(model: Path, tmp_path: Path) -> None:
    """One file, shards in a directory, a pattern; JSON lines, an array, Parquet, a saved data set."""
    import datasets

    records = [{"messages": TURNS[: 3 + 2 * (k % 2)]} for k in range(6)]
    wanted = load(model, written(tmp_path / "all.jsonl", *records))
    for name in ("lines", "parquet", "deep/er"):
        (tmp_path / name).mkdir(parents=True)
    written(tmp_path / "lines" / "b.jsonl", *records[4:])
    written(tmp_path / "lines" / "a.jsonl", *records[:4])
    (tmp_path / "all.json").write_text(json.dumps(records, indent=1), encoding="utf-8-sig")
    table = datasets.Dataset.from_list(records)
    table.to_parquet(tmp_path / "all.parquet")
    table.select(range(4)).to_parquet(tmp_path / "parquet" / "p-00000.parquet")
    table.select(range(4, 6)).to_parquet(tmp_path / "parquet" / "p-00001.parquet")
    table.save_to_disk(tmp_path / "saved")
    for source in (
        f"jsonl:{tmp_path}/lines",
        f"jsonl:{tmp_path}/lines/*.jsonl",
        f"jsonl:{tmp_path}/all.json",
        f"parquet:{tmp_path}/all.parquet",
        f"parquet:{tmp_path}/parquet",
        f"parquet:{tmp_path}/**/p-*.parquet",
        f"datasets:{tmp_path}/saved",
        f"hub:{tmp_path}/parquet",
    ):
        assert load(model, source).fingerprint == wanted.fingerprint, source
    (tmp_path / "parquet" / "p-00001.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="cannot read .*p-00001.parquet as Parquet"):
        load(model, f"parquet:{tmp_path}/parquet")


def test_awkward_files_have_the_tokens_that_datasets_gives(model: Path, tmp_path: Path) -> None:
    """A byte order mark, CRLF, empty lines, separators of lines within texts, escapes, letters beyond the first plane."""
    import datasets

    texts = ["the\r\ncat", "a\u2028b\x85c", "caf\u00e9 \U0001f600", '\ttab \\n "quoted"', "\x00\x1f", 'nested {"a": [1]}']
    lines = [
        json.dumps(
            {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": text}]},
            ensure_ascii=bool(k % 2),
        )
        for k, text in enumerate(texts)
    ]
    file = tmp_path / "awkward.jsonl"
    for k, (start, end) in enumerate([("", "\n"), ("\ufeff", "\n"), ("", "\r\n"), ("", "\n\n"), ("\n\n", "\r\n\r\n")]):
        file.write_bytes((start + end.join(lines) + end * (k % 2)).encode())
        samples = load(model, f"jsonl:{file}")
        plain = tmp_path / "plain.jsonl"  # the library itself minds a byte order mark and blank lines
        plain.write_bytes("\n".join(lines).encode())
        rows = datasets.load_dataset("json", data_files=str(plain), split="train", cache_dir=str(tmp_path / "cache"))
        found = [tokenizer_of(model).apply_chat_template(row["messages"], tokenize=True, return_dict=True) for row in rows]
        assert [ids_of(samples, row) for row in range(len(samples))] == [each["input_ids"] for each in found]


def test_the_command_shows_what_is_predicted(model: Path, tmp_path: Path) -> None:
    source = written(tmp_path / "a.jsonl", {"messages": TURNS[:3]}, {"messages": TURNS}, {"messages": TURNS[:2]})
    data = {"source": source, "sequence_length": 80, "sequences": 8}
    config = make_config({"model": {"source": str(model)}, "data": data})
    out = io.StringIO()
    assert show_data(config, 1, out) == 0
    text = out.getvalue()
    assert "<|im_start|>assistant\\n\n[H][i][!][<|im_end|>]\\n\n" in text
    assert "-- sequence 0 (a.jsonl, line 1)" in text
    assert "-- sequence 1" not in text
    # the first one has 54 tokens, the last one 38; within 80 tokens come "Hi!", its end, and "No " of the answer after it
    assert "3 sequences, 172 tokens, of which 11 are predicted (6.4 %); 1 sequence cut" in text
    assert "1 of 3 sequences have no token that is predicted" in text
    with pytest.raises(ConfigError, match="at least 0"):
        show_data(config, -1, out)


def test_the_command_does_not_let_data_write_to_the_terminal(tmp_path: Path) -> None:
    model = directory(tmp_path / "model")
    source = written(tmp_path / "a.jsonl", {"text": "\x1b[31mred\x07"})
    out = io.StringIO()
    show_data(make_config({"model": {"source": str(model)}, "data": {"source": source, "rows": "pad"}}), 1, out)
    assert "\x1b" not in out.getvalue()
    assert "\x07" not in out.getvalue()
