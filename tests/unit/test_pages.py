"""The pages that people read: short enough, linked, in order, and as the program and the results are."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from benchmarks import results_page

ROOT = Path(__file__).resolve().parents[2]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS, ROOT / "benchmarks" / "README.md"]
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def links(page: Path) -> list[tuple[Path, str]]:
    """Return the files (with their anchors) that a page leads to."""
    found = []
    for target in _LINK.findall(_FENCE.sub("", page.read_text())):
        if not re.match(r"\w+:", target):
            path, _, anchor = target.partition("#")
            found.append(((page.parent / path).resolve() if path else page, anchor))
    return found


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as they are made where Markdown is shown."""
    titles = re.findall(r"^#+ (.*)", _FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    dead = [
        f"{path}#{anchor}" for path, anchor in links(page) if not path.exists() or (anchor and anchor not in anchors(path))
    ]
    assert not dead, dead


def test_every_page_is_reached_from_the_readme() -> None:
    reached, todo = set[Path](), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        if page not in reached and page.suffix == ".md" and page.exists():
            reached.add(page)
            todo += [path for path, _ in links(page)]
    assert not {*DOCS} - reached
    results = {path.with_suffix("") for page in reached for path, _ in links(page)}
    shown = {path.with_suffix("") for path in (ROOT / "benchmarks" / "results").glob("*.md")}
    assert not shown - results


@pytest.mark.parametrize("page", results_page.PAGES, ids=lambda p: p.name)
def test_tables_are_those_of_the_results(page: Path) -> None:
    text = page.read_text()
    assert "<!-- table: " in text
    assert results_page.fill(text) == text, "python -m benchmarks.results_page makes the tables anew"


def test_every_table_is_shown() -> None:
    shown = re.findall(r"<!-- table: ([\w-]+) -->", "".join(page.read_text() for page in results_page.PAGES))
    assert sorted(shown) == sorted(results_page.TABLES)


def test_a_stale_table_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "README.md").read_text()
    stale = re.sub(r"at most [\d.e-]+ off", "at most 1e-12 off", text)
    assert stale != text
    assert results_page.fill(stale) == text


def test_the_python_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert sum(bool(line.strip()) for line in code.splitlines()) == 12
    exec(code, {"__name__": "readme"})
    assert len(capsys.readouterr().out.splitlines()) >= 5


def test_the_python_of_the_pages_names_what_exists() -> None:
    import hpc_hess

    text = "".join(block for page in PAGES for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.S | re.M))
    calls = [
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "hpc_hess"
    ]
    assert {node.attr for node in calls} >= {name for name in hpc_hess.__all__ if name.islower()}  # but types
    for node in calls:
        assert callable(getattr(hpc_hess, node.attr))


def test_the_glossary_is_in_order() -> None:
    terms = re.findall(r"^\*\*(.+?)\.?\*\*", (ROOT / "docs" / "glossary.md").read_text(), re.MULTILINE)
    assert len(terms) > 40
    assert terms == sorted(terms, key=str.lower)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_numbers_in_sentences_have_three_digits_at_most(page: Path) -> None:
    text = _FENCE.sub("", page.read_text())
    text = re.sub(r"<!-- table: .*?<!-- end -->|`[^`\n]*`|\]\([^)]*\)", "", text, flags=re.DOTALL)
    numbers = re.findall(r"(?<![\w.])\d+\.\d+(?![\w.]*\.\d)", text)
    assert not [n for n in numbers if len(n.replace(".", "").lstrip("0")) > 3]


def test_every_benchmark_is_listed() -> None:
    page = (ROOT / "benchmarks" / "README.md").read_text()
    programs = [p.stem for p in (ROOT / "benchmarks").glob("*.py") if '__name__ == "__main__"' in p.read_text()]
    listed = [name for name in programs if f"python -m benchmarks.{name}" in page]
    assert len(listed) > 30
    assert not [name for name in {*programs} - {*listed} if not name.startswith(("peer_", "regimes_", "processes"))]
