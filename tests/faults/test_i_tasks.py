"""I: tasks beside causal language models whose model, labels or data do not suit: one sentence with the remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpc_hess.config import make_config
from hpc_hess.console.progress import Progress
from hpc_hess.errors import ConfigError, DataError, HpcHessError, ModelError
from hpc_hess.parallel.world import World
from hpc_hess.session.problem import load_problem
from tests.support.base_model import edit_config
from tests.support.spawn import run_ranks
from tests.support.task_models import records, save_tokenizer, save_toy, settings_of


def _load(settings: dict[str, Any]) -> Any:
    return load_problem(make_config(settings), World.alone(), Progress(0))


def _rows(directory: Path, rows: list[dict[str, Any]]) -> None:
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _with(name: str, **change: Any) -> list[dict[str, Any]]:
    """Return the toy's rows with another third one."""
    rows = records(name)
    rows[2] = {key: value for key, value in {**rows[2], **change}.items() if value is not ...}
    return rows


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("roberta", {"label": ...}, "rows.jsonl, line 3: column 'label' is not there (there is a, b): set data.label_c"),
        ("roberta", {"label": None}, "line 3: column 'label' is empty: set data.label_column"),
        ("roberta", {"label": 3}, "column 'label' holds the label 3, and the model has 3 classes, 0 to 2"),
        ("roberta", {"label": -2}, "holds the label -2"),
        ("roberta", {"label": True}, "is bool: it should be a class number"),
        ("roberta", {"label": 0.5}, "is float: it should be a class number"),
        ("roberta", {"label": "neutral"}, "holds 'neutral', which label2id of config.json does not have (it has LABEL_0"),
        ("roberta", {"a": ...}, "column 'a' is not there (there is b, label): set data.text_columns"),
        ("roberta", {"a": 7}, "field 'a' is a number: it should be a text"),
        ("bert-pairs", {"b": None}, "line 3: column 'b' is empty: set data.text_columns"),
        ("regression", {"label": [1.0, 2.0]}, "it should be a number for each of the model's 1 outputs"),
        ("regression", {"label": "high"}, "holds 'high': it should be a number for each"),
        ("several", {"label": [0, 2, 1]}, "it should be 0 or 1 for each of the model's 3 outputs"),
        ("bart", {"label": ...}, "column 'label' is not there (there is a, b): set data.label_column"),
        ("bart", {"label": 4}, "field 'label' is a number: it should be a text"),
    ],
)
def test_records_that_do_not_suit(name: str, change: dict[str, Any], words: str, tmp_path: Path) -> None:
    save_toy(tmp_path, name)
    settings = settings_of(tmp_path, name)
    _rows(tmp_path, _with(name, **change))
    with pytest.raises(DataError) as caught:
        _load(settings)
    assert words in str(caught.value)


def test_samples_without_a_label_are_left_out(tmp_path: Path) -> None:
    """SNLI has -1 where annotators did not agree."""
    save_toy(tmp_path, "roberta")
    settings = settings_of(tmp_path, "roberta")
    _rows(tmp_path, _with("roberta", label=-1))
    problem = _load(settings)
    assert len(problem.samples) == problem.samples.num_tokens == 4
    assert "1 samples without a label (-1) are left out" in str(problem.intake.to_json())


def test_names_of_labels_are_those_of_the_model(tmp_path: Path) -> None:
    save_toy(tmp_path, "roberta")
    settings = settings_of(tmp_path, "roberta")
    _rows(tmp_path, _with("roberta", label="LABEL_1"))
    assert _load(settings).samples.labels[2] == 1


def test_a_source_without_columns(tmp_path: Path) -> None:
    save_toy(tmp_path, "roberta")
    with pytest.raises(DataError, match=r"needs data with columns.*set data.source to one of jsonl:FILES, parquet:FILES"):
        _load(settings_of(tmp_path, "roberta", data__source="text:launch/data/gpl-3.txt"))


def test_a_head_that_the_checkpoint_has_not(tmp_path: Path) -> None:
    save_toy(tmp_path, "masked")
    names = {"0": "no", "1": "perhaps", "2": "yes"}
    edit_config(tmp_path, id2label=names, label2id={name: int(number) for number, name in names.items()})
    settings = settings_of(tmp_path, "roberta", model__source=str(tmp_path))
    with pytest.raises(
        ModelError, match=r"no tensor for parameter 'classifier.*this is the head of model.task: train it first"
    ):
        _load(settings)


def test_a_causal_model_as_a_masked_one(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    LlamaConfig(vocab_size=60, hidden_size=8, num_hidden_layers=1, num_attention_heads=2).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    settings = settings_of(tmp_path, "masked", model__source=str(tmp_path / "config.json"))
    with pytest.raises(ModelError, match=r'is not a Hugging Face masked language model: set model.task = "causal-lm" or'):
        _load(settings)


def test_a_decoder_as_a_masked_model(tmp_path: Path) -> None:
    save_toy(tmp_path, "masked")
    edit_config(tmp_path, is_decoder=True)
    with pytest.raises(
        ModelError, match=r'causal language model \("is_decoder" in config.json\): set model.task = "causal-lm"'
    ):
        _load(settings_of(tmp_path, "masked"))


def test_a_tokenizer_without_a_mask(tmp_path: Path) -> None:
    save_toy(tmp_path, "masked")
    save_tokenizer(tmp_path, mask=False)
    with pytest.raises(DataError, match="needs a mask token, which the tokenizer of .* has not: set model.tokenizer"):
        _load(settings_of(tmp_path, "masked"))


def test_masks_that_choose_nothing(tmp_path: Path) -> None:
    save_toy(tmp_path, "masked")
    with pytest.raises(DataError, match=r"data.masked = 1e-09 leaves no token that is predicted: raise it"):
        _load(settings_of(tmp_path, "masked", data__masked=1e-9))


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (np.zeros((3, 8, 8, 3)), r"row 0, 'pixel_values' holds float64 of shape \[8, 8, 3\]: .* \[3 channels, height,"),
        (np.full((3, 3, 8, 8), np.nan), "holds numbers that are not finite"),
        (np.zeros((2, 3, 8, 8)), "have different numbers of rows"),
    ],
)
def test_images_that_do_not_suit(images: np.ndarray, words: str, tmp_path: Path) -> None:
    save_toy(tmp_path, "vit")
    settings = settings_of(tmp_path, "vit")
    np.savez(tmp_path / "images.npz", pixel_values=images, label=np.zeros(3, int))
    with pytest.raises(DataError, match=words):
        _load(settings)


def test_images_without_labels(tmp_path: Path) -> None:
    save_toy(tmp_path, "resnet")
    settings = settings_of(tmp_path, "resnet")
    np.savez(tmp_path / "images.npz", x=np.zeros((3, 3, 8, 8)), label=np.zeros(3, int))
    with pytest.raises(DataError, match=r"column 'pixel_values' is not there \(there is x, label\): set data.image_column"):
        _load(settings)


def test_what_is_of_tokens_alone(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='"perplexity" is of a loss over tokens, and model.task = "sequence-class'):
        make_config({"model": {"task": "sequence-classification"}, "operator": {"kind": "perplexity"}})
    with pytest.raises(ConfigError, match=r"model.task = 'classify' is not valid: it should be 'causal-lm', 'masked-lm'"):
        make_config({"model": {"task": "classify"}})


def test_matrices_of_classes_are_refused_for_numbers(tmp_path: Path) -> None:
    from hpc_hess.session.operators import exact_operator

    save_toy(tmp_path, "regression")
    settings = settings_of(tmp_path, "regression", operator__kind="gauss_newton", operator__method="exact")
    with pytest.raises(ModelError, match="the labels are numbers, of which only the Hessian is known"):
        exact_operator(make_config(settings), _load(settings))


def _refusal(world: World, settings: dict[str, Any]) -> str:
    world.make_mesh()
    try:
        load_problem(make_config(settings), world, Progress(0))
    except HpcHessError as error:
        world.barrier("all have failed together")
        return f"{error.exit_code} {error}"
    return "loaded"


def test_every_rank_says_so(tmp_path: Path) -> None:
    save_toy(tmp_path, "roberta")
    settings = settings_of(tmp_path, "roberta")
    _rows(tmp_path, _with("roberta", label=9))
    said = run_ranks(_refusal, 2, settings)
    assert said[0] == said[1]
    assert said[0].startswith("2 rows.jsonl, line 3, column 'label' holds the label 9")


def test_labels_given_with_the_tokens(tmp_path: Path) -> None:
    save_toy(tmp_path, "masked")
    settings = settings_of(tmp_path, "masked")
    _rows(
        tmp_path, [{"input_ids": [1, 3, 9, 2], "labels": [-100, 7, -100, -100]}, {"input_ids": [1, 3], "labels": [-100, 5]}]
    )
    samples = _load(settings).samples
    assert samples.labels.tolist() == [[-100, 7, -100, -100], [-100, 5, -100, -100]]
    assert samples.num_tokens == 2
    assert samples.input_ids[0].tolist() == [1, 3, 9, 2]
    _rows(tmp_path, [{"input_ids": [1, 3], "labels": [-100, 99]}])
    with pytest.raises(DataError, match="holds the id 99, outside the model's vocabulary of 60 tokens"):
        _load(settings)


def test_masks_are_those_of_the_seed(tmp_path: Path) -> None:
    save_toy(tmp_path, "masked")
    first, again, other = (
        _load(settings_of(tmp_path, "masked", data__masked=0.5, data__mask_seed=seed)).samples for seed in (0, 0, 1)
    )
    assert torch.equal(first.labels, again.labels)
    assert torch.equal(first.input_ids, again.input_ids)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    chosen = first.labels != -100
    assert not torch.isin(first.labels[chosen], torch.tensor([0, 1, 2, 3, 4])).any(), "special tokens are not predicted"
    assert (first.input_ids[chosen] == 3).float().mean() > 0.5
