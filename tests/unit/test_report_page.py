import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from hpc_hess.console.words import count, duration, number, size, trace_text
from hpc_hess.errors import ConfigError
from hpc_hess.report.spectrum import story, warnings
from hpc_hess.storage.run_files import read_run, step_events
from hpc_hess.studies.run_figures import Plot
from hpc_hess.studies.run_page import render, write_report
from tests.support.report_case import llm_like, make_result, write_run

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """The page's text, images and tags; fails on a tag that is not closed."""

    def __init__(self, html):
        super().__init__()
        self.text, self.images, self.tags, self._open = "", [], [], []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "img":
            self.images.append(dict(attrs)["src"])
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] != "style":
            self.text += data


def text_of(tmp_path, result, config=None):
    """The page without figures, which cost most of the time."""
    return Page(render(read_run(write_run(tmp_path / "run", result, config)), []))


def page_of(tmp_path, result, config=None):
    path = write_report(write_run(tmp_path / "run", result, config))
    assert path == tmp_path / "run" / "report.html"
    html = path.read_text(encoding="utf-8")
    return Page(html), html


def test_page_shows_numbers_figures_and_settings_and_needs_no_network(tmp_path):
    result = make_result(llm_like(), 12, 2)
    page, html = page_of(tmp_path, result, {"lanczos": {"steps": 12}})
    assert "Hessian spectrum of toy" in page.text
    assert "The largest eigenvalue in magnitude is negative (\u22121396; 1.6 times the largest positive one)" in page.text
    for expected in ("893", "\u22121396", "12 steps", "2 probes", "3 GiB", "2.13.0", "torchrun --nproc-per-node 2", "steps"):
        assert expected in page.text, expected
    assert "± " + number(result["trace"]["stderr"], 2) in page.text
    assert len(page.images) == 6
    for source in page.images:
        kind, data = source.split(",", 1)
        assert kind == "data:image/svg+xml;base64"
        assert b"<svg" in base64.b64decode(data)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    assert not re.search(r"(src|href)=[\"']?https?:|@import|url\(", html)
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "result.json",
        "config.toml",
        "events.jsonl",
        "figures",
        "report.html",
    }


def test_one_probe_has_no_error_estimate(tmp_path):
    result = make_result(llm_like(), 5)
    assert result["trace"]["stderr"] is None
    page = text_of(tmp_path, result)
    assert "one probe: no error estimate" in page.text
    assert "None" not in page.text


def test_everything_from_the_run_is_escaped(tmp_path):
    evil = "<script>alert('x')</script>&\""
    result = make_result(llm_like(), 4, model=evil, errors={evil: evil}, versions={evil: evil}, hardware={"gpu": evil})
    result["operator"]["name"] = evil
    run = read_run(write_run(tmp_path / "run", result, {"data": {"source": evil}}))
    html = render(run, [Plot("x", evil, evil, tmp_path / "x.png", Path(__file__))])
    page = Page(html)
    assert "<script" not in html
    assert page.text.count("alert('x')") >= 6


@pytest.mark.parametrize("keys", [[], ["probes"], ["probes", "lambda_max", "trace"]])
def test_optional_keys_may_be_missing(tmp_path, keys):
    full = make_result(llm_like(), 4)
    page, _ = page_of(tmp_path, {key: full[key] for key in keys})
    assert (number(full["lambda_max"]) in page.text) == ("probes" in keys)
    assert len(page.images) == (5 if keys else 0)
    assert "To repeat this run" in page.text


def test_odd_values_are_shown_not_fatal(tmp_path):
    errors = {
        "hvp_relative": None,
        "realised_step": {"mean": 0.99, "worst": 0.9},
        "list": list(range(20)),
        "nan": float("nan"),
    }
    result = make_result(llm_like(), 4, errors=errors, timing={"hvp_s": 5000.0}, memory=None, world_size=1)
    page, _ = page_of(tmp_path, result)
    for expected in ("not measured", "Step not realised, worst", "… (20 in all)", "1 h 23 min", "python -m hpc_hess run"):
        assert expected in page.text, expected


def test_a_page_is_rewritten(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "report.html").write_text("old")
    page, _ = page_of(tmp_path, make_result(llm_like(), 4))
    assert "old" not in page.text.split()


def test_run_directories_that_cannot_be_reported(tmp_path):
    with pytest.raises(ConfigError, match="no such run directory"):
        write_report(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"no result\.json yet.*inspect"):
        write_report(tmp_path)
    (tmp_path / "result.json").write_text('{"format": 1')
    with pytest.raises(ConfigError, match="cannot read"):
        write_report(tmp_path)
    (tmp_path / "result.json").write_text("[1]")
    with pytest.raises(ConfigError, match="JSON object"):
        write_report(tmp_path)


def test_events_survive_a_cut_line_and_a_repeated_step(tmp_path):
    run = write_run(tmp_path, make_result(llm_like(), 3))
    again = {"event": "step", "probe": 0, "step": 2, "hvp_s": 99.0}
    (run / "events.jsonl").write_text((run / "events.jsonl").read_text() + "\n" + json.dumps(again) + "\n7\n")
    steps = step_events(read_run(run).events)
    assert [s["step"] for s in steps] == [1, 2, 3]
    assert steps[1]["hvp_s"] == 99.0


def test_story_follows_the_data():
    assert "negative (-1396; 1.6 times the largest positive one), while 99 %" in story(make_result(llm_like(), 12))
    assert "magnitude is positive (1396; 1.6 times the largest negative" in story(make_result(-llm_like(), 12))
    positive = story(make_result(np.append(np.linspace(0.5, 1, 300), 40.0), 8))
    assert positive.startswith("No negative curvature was found; the largest eigenvalue is 40")
    assert "without outliers" in story(make_result(np.linspace(1.0, 2.0, 100), 8))
    assert story(make_result(-np.linspace(1.0, 2.0, 100), 8)).startswith("No positive curvature was found")
    assert "the product with the random vector of this run vanishes" in story(make_result(np.zeros(20), 3))
    assert story({}) == "No Ritz values are stored in this run."


def test_warnings_name_what_a_reader_should_know():
    assert any("λ min has not converged" in w for w in warnings(make_result(llm_like(), 3)))
    assert warnings(make_result(llm_like(), 14)) == []
    noisy = make_result(llm_like(), 14, errors={"hvp_relative": 0.22})
    assert ["22 %" in w for w in warnings(noisy)] == [True]
    wrong = make_result(llm_like(), 14, operator={"name": "gauss_newton"})
    assert any("positive semi-definite" in w for w in warnings(wrong))


def test_words():
    assert [number(x) for x in (None, -1396.04, 0.00012346, 3, 2.0, 123456, float("nan"))] == [
        "n/a",
        "-1396",
        "0.0001235",
        "3",
        "2",
        "123,456",
        "nan",
    ]
    assert [number(x, 2) for x in (130.4, -1396.0, 2.5e7, 0.13)] == ["130", "-1396", "2.5e+07", "0.13"]
    assert [duration(x) for x in (None, 0.0123, 5.0, 99.96, 245.4, 11220, 187200)] == [
        "n/a",
        "12.3 ms",
        "5 s",
        "1 min 40 s",
        "4 min 05 s",
        "3 h 07 min",
        "2 d 04 h",
    ]
    assert [size(x) for x in (None, 512, 1536, 3 << 30, 1 << 50)] == ["n/a", "512 B", "1.5 KiB", "3 GiB", "1 PiB"]
    assert count(134_515_008) == "134,515,008 (134.5 M)"
    assert trace_text({"mean": 2.5, "stderr": 0.125}) == "2.5 ± 0.12 (standard error over probes)"
