"""Hostile names and outputs stay text in every file of a report."""

from __future__ import annotations

import csv
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from synthetic import Fake, edit_summary, replace_plan, write_study

from trilemma.compare.records import StudyDirectory
from trilemma.compare.report import markdown_text, write_report

HOSTILE = '<script>alert(1)</script><img src=x onerror="alert(2)">'
NASTY_NAME = "=cmd|' /C calc'!A0 $\\frac{1}{$ | `x` [a](javascript:alert(1)) \u202e\x07\n\"'<b>"


ALLOWED_TAGS = frozenset(
    {"html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "div", "ul", "li", "table", "caption"}
    | {"thead", "tbody", "tr", "th", "td", "bdi", "code", "figure", "img", "figcaption", "dl", "dt", "dd"}
)


class Elements(HTMLParser):
    """Collects every tag, attribute and style of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(tag, key, value or "") for key, value in attrs]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> StudyDirectory:
    directory = write_study(
        tmp_path_factory.mktemp("hostile"),
        {NASTY_NAME: Fake(output=HOSTILE), HOSTILE: Fake(accuracy=0.5, output="]]> {{ 7*7 }} {% x %}")},
        study={"name": HOSTILE},
        source=HOSTILE,
    )
    replace_plan(directory, command=HOSTILE, sweep_notes={NASTY_NAME: HOSTILE})
    edit_summary(directory, "00-seed1", environment={HOSTILE: HOSTILE})
    write_report(directory)
    return directory


def test_hostile_text_is_inert_in_html(hostile: StudyDirectory) -> None:
    text = (hostile.path / "report.html").read_text(encoding="utf-8")
    page = Elements()
    page.feed(text)
    assert page.tags <= ALLOWED_TAGS
    for tag, key, value in page.attributes:
        assert not key.startswith("on")
        assert key not in ("href", "style")
        if key == "src":
            assert tag == "img" and value.startswith("data:image/svg+xml;base64,")
    assert "default-src 'none'" in text and "{{ 7*7 }}" in text and "49" not in re.findall(r"<bdi>(.*?)</bdi>", text)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text


def test_the_page_asks_for_nothing_from_outside(hostile: StudyDirectory) -> None:
    text = (hostile.path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"""(?:src|href|action|poster|data)\s*=\s*["']?(?:https?:)?//""", text)
    style = re.search(r"<style>(.*?)</style>", text, re.S)
    assert style is not None and "url(" not in style[1] and "@import" not in style[1]


def test_hostile_text_is_inert_in_markdown_svg_and_csv(hostile: StudyDirectory) -> None:
    markdown = (hostile.path / "report.md").read_text(encoding="utf-8")
    assert "<script" not in markdown and "<img" not in markdown and "](javascript:" not in markdown
    assert "\u202e" not in markdown and "\x07" not in markdown
    for file in (hostile.path / "plots").glob("*.svg"):
        svg = file.read_text(encoding="utf-8")
        assert "<script" not in svg and "onerror=" not in re.sub(r"<!--.*?-->", "", svg, flags=re.S)
    with (hostile.path / "tables" / "results.csv").open(encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            assert row["candidate"][0] not in "=+-@\t\r"


def test_markdown_text_leaves_nothing_active() -> None:
    assert markdown_text("a|b\n*c* <i> & [x](y)") == "a\\|b\\\\n\\*c\\* &lt;i&gt; &amp; \\[x\\]\\(y\\)"
