"""Attribution: examples that are not finite, ids, whole queries, two at once, how far scores can be trusted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpc_hess.commands.attribute.work import Query, build, query
from hpc_hess.config import make_config
from hpc_hess.errors import NumericsError
from hpc_hess.parallel.world import World
from hpc_hess.storage.examples import Examples
from tests.support.base_model import model_b, settings_b, write_config
from tests.support.launching import ROOT, environment

LINES = ["aa ab", "", "x", "ba bb ab", "bb ba", "ab aa ba"]


def _save(directory: Path, spoilt: bool = False) -> None:
    """Save B with a tokenizer of letters; ``spoilt``: the embedding of "x" is not a number."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    model = model_b()
    if spoilt:
        model.model.embed_tokens.weight.data[5] = float("nan")
    model.save_pretrained(directory)
    tokenizer = Tokenizer(models.WordLevel({"?": 3, "a": 4, "x": 5, "b": 6, " ": 7}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def _settings(folder: Path, out: Path, **changes: Any) -> dict[str, Any]:
    values = settings_b(folder / "model", folder / "none", out, **changes)
    values["data"] = {"source": f"text:{folder / 'lines.txt'}", "rows": "pad", "sequence_length": 10, "sequences": 6}
    values["sketch"] = {"dimension": 256}
    return values


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("attribution")
    _save(folder / "model")
    (folder / "lines.txt").write_text("\n".join(LINES) + "\n")
    return folder


@pytest.fixture(scope="module")
def built(folder: Path, world: World) -> Path:
    assert build(make_config(_settings(folder, folder / "run")), world) == 0
    return folder


def _answer(built: Path, world: World, **asked: Any) -> dict[str, Any]:
    assert query(make_config(_settings(built, built / "run")), world, Query(**asked)) == 0
    return dict(json.loads((built / "run" / "attribution.json").read_text()))


def test_an_example_that_is_not_finite_ends_the_build_with_its_number(world: World, tmp_path: Path) -> None:
    _save(tmp_path / "model", spoilt=True)
    (tmp_path / "lines.txt").write_text("aa ab\nbb\nax b\nab\n")
    with pytest.raises(NumericsError, match=r"example 2 \(lines.txt, line 3\) is not finite|sample 2"):
        build(make_config(_settings(tmp_path, tmp_path / "run")), world)
    with Examples(tmp_path / "run" / "sketches.h5") as examples:
        assert examples.done.tolist() == [True, True, False, False]
        assert np.isfinite(examples.sketches).all()


def test_sketches_of_a_batch_that_is_not_finite_are_refused() -> None:
    import hpc_hess

    model, x = torch.nn.Linear(3, 1), torch.full((2, 3), float("nan"))
    with pytest.raises(NumericsError, match="batch 1 is not finite"):
        hpc_hess.gradient_sketches(model, [torch.ones(2, 3), x], lambda m, b: m(b).square().mean(), dimension=16)


def test_ids_lead_back_to_lines(built: Path, world: World) -> None:
    rows = _answer(built, world, text="ab ba")["top"]
    assert {row["place"]: row["text"].replace(" ", "") for row in rows} == {
        f"lines.txt, line {k + 1}": line.replace(" ", "") for k, line in enumerate(LINES) if len(line) > 1
    }


def test_all_of_a_query_is_asked_about_and_tokens_weigh_alike(built: Path, world: World) -> None:
    text = "ab ba bb aa b"  # 13 tokens: rows of 10 and 3, which predict 9 and 2
    whole = _answer(built, world, text=text, top=4)
    parts = [_answer(built, world, text=part, top=4) for part in (text[:10], text[10:])]
    scores = [{row["id"]: row["score"] for row in each["top"]} for each in (whole, *parts)]
    assert len(whole["query"]) == 2
    for example, score in scores[0].items():
        assert score == pytest.approx((9 * scores[1][example] + 2 * scores[2][example]) / 11, rel=1e-4)


def test_an_answer_says_how_far_its_dimension_can_be_trusted(
    built: Path, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = _settings(built, built / "run")
    settings["run"]["report"] = True
    assert query(make_config(settings), world, Query(text="ab ba", top=4)) == 0
    record = json.loads((built / "run" / "attribution.json").read_text())
    shown = capsys.readouterr().out
    assert "A score is known to about" in shown
    assert "against it" not in shown  # the first list has them all
    assert record["score_error"] > 0
    assert 0 <= record["told_apart"] <= 1
    page = built / "run" / "attribution.html"
    assert "A score is known to about" in page.read_text()
    page.unlink()
    settings["run"]["report"] = False
    assert query(make_config(settings), world, Query(text="ab")) == 0
    assert not page.exists()


@pytest.mark.slow
def test_two_queries_at_once_answer_their_own(built: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.toml", _settings(built, built / "run"))
    command = [sys.executable, "-m", "hpc_hess", "attribute", "query", str(config), "--text"]
    texts = ["ab ba ab", "bb aa"]
    started = [
        subprocess.Popen([*command, text], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True) for text in texts
    ]
    for text, process in zip(texts, started, strict=True):
        printed, _ = process.communicate(timeout=240)
        assert process.returncode == 0
        query_line = next(line for line in printed.splitlines() if line.startswith("query:"))
        assert query_line.replace(" ", "") == f"query:{text}".replace(" ", "")
