"""Pages: what comes from files and tables is text in them, whatever it says; nothing else runs or is loaded."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featstore.pages import figures
from featstore.pages.page import (
    Block,
    Drawing,
    Gallery,
    Link,
    Links,
    Page,
    Pictures,
    Section,
    Table,
    content_policy,
    inside_script,
    script_source,
)

pytest.importorskip("plotly", reason="plotly isn't installed")

EVIL = """</script><script>alert(1)</script><img src=x onerror="alert('2')">&amp;<!--\x1b]0;\u2028"""


class Reader(HTMLParser):
    """The elements of a page, in order, with the text of each."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1][0] == "script":
            attributes, text = self.scripts[-1]
            self.scripts[-1] = attributes, text + data
        else:
            self.texts.append(data)


def page(text: str, **options: Any) -> Page:
    counts = np.array([[2, 1], [0, 3]])
    drawn = [
        Drawing(figure=figures.confusion(counts, [text, f"{text} 2"])),
        Drawing(figure=figures.curves({text: ([1, 2], [3, float("nan")])}, x=text, y=text, marks={text: 1.5})),
        Drawing(figure=figures.point_map(np.eye(2), np.arange(2), [text, "b"]), is_map=True),
        Drawing(figure=figures.bars({text: [1.0]}, [text], y=text)),
    ]
    pictures = Pictures(
        names={0: text, 1: "b"}, labels={0: text, 1: "c"}, thumbnails={1: "data:x"}, near={0: [(1, 0.98765)]}
    )
    table = Table(columns=(text, "n"), rows=[(text, 1), (Link(text=text, address="/x?" + text), None)])
    blocks: list[Block] = [text, table, Gallery(pictures=[(0, text)]), Links(links=[text]), *drawn]
    return Page(title=text, about=text, sections=[Section(title=text, blocks=blocks)], pictures=pictures, footer=text)


@pytest.fixture(scope="module")
def plain() -> str:
    return page("plain").html()


@pytest.fixture(scope="module")
def evil() -> str:
    return page(EVIL).html()


def test_text_of_files_adds_no_element_no_attribute_and_no_script(plain: str, evil: str) -> None:
    expected, found = Reader(plain), Reader(evil)
    assert [(tag, attributes.keys()) for tag, attributes in found.elements] == [
        (tag, attributes.keys()) for tag, attributes in expected.elements
    ]
    assert len(found.scripts) == len(expected.scripts)
    shown = EVIL.replace("\x1b", "\\x1b").replace("\u2028", "\\u2028")
    assert found.texts.count(shown) > 5
    assert not re.search("[\x1b\u2028]", "".join(found.texts))


def test_the_scripts_of_a_page_are_its_own_two_and_its_policy_names_them(evil: str) -> None:
    found = Reader(evil)
    run = [text for attributes, text in found.scripts if attributes.get("type") != "application/json"]
    assert len(run) == 2
    (policy,) = [
        attributes["content"]
        for tag, attributes in found.elements
        if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy == content_policy(*map(script_source, run))
    rules = dict(rule.split(" ", 1) for rule in str(policy).split("; "))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert rules["img-src"] == "data:"
    assert "unsafe" not in rules["script-src"]
    assert "http" not in str(policy)
    assert "connect-src" not in rules


def test_nothing_in_a_page_is_loaded_from_elsewhere(evil: str) -> None:
    loading = {"src", "href", "srcset", "data", "action", "poster", "background"}
    addresses = [
        value
        for tag, attributes in Reader(evil).elements
        for name, value in attributes.items()
        if name in loading and tag != "a"
    ]
    assert addresses == ["data:,"]
    assert not re.search(r"@import|url\(", evil.partition("<style>")[2].partition("</style>")[0])


def test_the_facts_of_a_page_are_what_was_given(evil: str) -> None:
    facts = [json.loads(text) for attributes, text in Reader(evil).scripts if attributes.get("type")]
    (pictures,) = [each for each in facts if "names" in each]
    shown = EVIL.replace("\x1b", "\\x1b").replace("\u2028", "\\u2028")
    assert pictures["names"] == {"0": shown, "1": "b"}
    assert pictures["near"] == {"0": [[1, 0.9877]]}
    drawn = [each for each in facts if "layout" in each]
    assert len(drawn) == 4
    # The kinds that end so make programs of texts, which the policy of a page forbids.
    assert not [trace["type"] for each in drawn for trace in each["data"] if trace["type"].endswith("gl")]
    # plotly obeys tags in its texts and reads entities: so names come as entities.
    texts = json.dumps(drawn)
    assert "<script" not in texts
    assert "&lt;/script&gt;" in texts


def test_javascript_that_would_end_its_element_means_the_same_without() -> None:
    assert inside_script("x = '</script><!--'") == "x = '<\\/script>\\x3C!--'"


def test_names_of_any_bytes_can_be_written(tmp_path: Path) -> None:
    name = b"caf\xe9.jpg".decode("utf-8", "surrogateescape")
    size = page(name).write(tmp_path / "page.html")
    content = (tmp_path / "page.html").read_bytes()
    assert len(content) == size
    assert "caf\\udce9.jpg" in content.decode("utf-8")
    assert [each.name for each in tmp_path.iterdir()] == ["page.html"]


def test_a_page_without_figures_is_small_and_needs_no_plotly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "program", lambda: pytest.fail("asked for plotly.js"))
    html = Page(title="a", about="b", sections=[Section(title="c", blocks=["d"])]).html()
    assert len(html) < 20_000


def test_a_served_page_has_its_scripts_from_its_server() -> None:
    found = Reader(page(EVIL).served("/token/assets"))
    sources = [attributes["src"] for attributes, text in found.scripts if "src" in attributes]
    assert sources == ["/token/assets/plotly.js", "/token/assets/page.js"]
    assert all(attributes.get("type") == "application/json" for attributes, text in found.scripts if text)
    assert content_policy("'self'", connects=True).split("; ")[1:5] == [
        "script-src 'self'",
        "style-src 'unsafe-inline' 'self'",
        "img-src data: 'self'",
        "connect-src 'self'",
    ]


@pytest.mark.parametrize("address", ["https://example.org", "//example.org", "javascript:alert(1)", "sets"])
def test_a_link_leads_to_the_same_server(address: str) -> None:
    with pytest.raises(ValueError, match="leads to another server"):
        Link(text="x", address=address)


def test_bins_of_confidence_are_those_of_the_calibration_error() -> None:
    from training.scores.metrics import calibration_error

    rng = np.random.default_rng(0)
    sure = np.concatenate([rng.random(500), [0.0, 1.0, 0.2, 0.4]])
    is_right = rng.random(504) < sure
    counts, said, right = figures.by_confidence(sure, is_right, 10)
    has_some = counts > 0
    assert counts.sum() == 504
    gaps = np.abs(said - right)[has_some] * counts[has_some] / 504
    np.testing.assert_allclose(gaps.sum(), calibration_error(sure, is_right, 10), rtol=1e-12)


def test_a_map_colours_the_commonest_groups_and_keeps_each_image() -> None:
    names = [f"class {number % 40}" for number in range(100)]
    figure = figures.point_map(np.random.default_rng(0).normal(size=(100, 2)), np.arange(100) + 7, names)
    assert len(figure.data) == figures.MOST_COLOURS + 1
    assert figure.data[0].name == f"{40 - figures.MOST_COLOURS} others"
    assert sorted(place for trace in figure.data for place in trace.customdata) == list(range(7, 107))


def test_where_plotly_is_missing_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from featstore.errors import FeatureStoreError

    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(FeatureStoreError, match=r"pip install 'featstore\[report\]'"):
        figures.program()
