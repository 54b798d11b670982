"""A page: sections of words, tables, images and figures as HTML that needs nothing else, and that runs nothing else.

All text from files and tables is escaped. Scripts are the page's own two, which its content security policy names by
their digests: what came in otherwise isn't run, and nothing is loaded from anywhere.
"""

from __future__ import annotations

import json
import math
import os
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from featstore.digest import Json
from featstore.files.disk import whole_or_nothing, write_at
from featstore.pages import figures
from featstore.words import printable

if TYPE_CHECKING:
    from featstore.pages.figures import Figure


@dataclass(frozen=True, kw_only=True)
class Link:
    """Words that lead to another page of the same server.

    Attributes:
        text: the words.
        address: from the server's root on: it begins with one slash.
    """

    text: str
    address: str

    def __post_init__(self) -> None:
        if not self.address.startswith("/") or self.address.startswith("//"):
            raise ValueError(f"{self.address!r} leads to another server. Expected an address that begins with one /.")


Cell = str | int | float | Link | None


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows under the names of their columns, which a click on a name sorts; None is shown as ``-``."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Images, each with words below it; a click shows its neighbours.

    Attributes:
        pictures: (place among the page's pictures, words).
    """

    pictures: Sequence[tuple[int, str]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Drawing:
    """A figure; of a map the points are images, as `figures.point_map` makes it."""

    figure: Figure
    is_map: bool = False


@dataclass(frozen=True, kw_only=True)
class Links:
    """Words that lead elsewhere, in a line; what is plain text is where the reader is."""

    links: Sequence[Link | str]


Block = str | Table | Gallery | Drawing | Links
"""A text is a paragraph."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a page under a title."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """The images of a page, by their places.

    Attributes:
        names: place -> id.
        labels: place -> what it is said to be.
        thumbnails: place -> its thumbnail as a ``data:`` address; who has none is shown as its id.
        near: place -> (place, similarity) of its nearest neighbours.
        near_words: what kind of neighbours these are, in a sentence.
        thumbnails_at: on a server: the address below which thumbnails are, by places.
        near_at: on a server: the address below which neighbours are.
    """

    names: Mapping[int, str] = field(default_factory=dict)
    labels: Mapping[int, str] = field(default_factory=dict)
    thumbnails: Mapping[int, str] = field(default_factory=dict)
    near: Mapping[int, Sequence[tuple[int, float]]] = field(default_factory=dict)
    near_words: str = "By the cosine of their features."
    thumbnails_at: str | None = None
    near_at: str | None = None

    def facts(self) -> dict[str, Json]:
        """As the page's script reads them."""
        return {
            "names": {str(place): _plain(name) for place, name in self.names.items()},
            "labels": {str(place): _plain(label) for place, label in self.labels.items()},
            "thumbnails": {str(place): address for place, address in self.thumbnails.items()},
            "near": {
                str(place): [[other, round(similarity, 4)] for other, similarity in others]
                for place, others in self.near.items()
            },
            "nearWords": self.near_words,
            "thumbnailsAt": self.thumbnails_at,
            "nearAt": self.near_at,
        }


@dataclass(frozen=True, kw_only=True)
class Page:
    """Sections under a title.

    Attributes:
        title: of the page.
        about: a sentence on it.
        sections: in order.
        pictures: all images that its galleries and maps name.
        footer: the last line.
    """

    title: str
    about: str
    sections: Sequence[Section]
    pictures: Pictures = field(default_factory=Pictures)
    footer: str = ""

    def html(self) -> str:
        """The page as one file: styles, scripts, figures and thumbnails are in it."""
        drawing = [figures.program()] if self._has_figures else []
        scripts = [inside_script(each) for each in (*drawing, asset("page.js"))]
        policy = content_policy(*map(script_source, scripts))
        embedded = "".join(f"<script>{each}</script>" for each in scripts)
        return self._html(
            f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">',
            f"<style>{asset('page.css')}</style>",
            embedded,
        )

    def served(self, assets: str) -> str:
        """The page as a server gives it, whose headers hold the policy; styles and scripts lie below `assets`."""
        names = ["plotly.js"] * self._has_figures + ["page.js"]
        scripts = "".join(f'<script src="{escape(assets)}/{name}"></script>' for name in names)
        return self._html("", f'<link rel="stylesheet" href="{escape(assets)}/page.css">', scripts)

    def write(self, path: str | os.PathLike[str]) -> int:
        """Writes `html` to a file, whole or not at all, in the place of one of that name; gives its number of bytes."""
        content = self.html().encode("utf-8")
        with whole_or_nothing(Path(path), len(content), replaces=True) as fd:
            write_at(fd, memoryview(content), 0)
        return len(content)

    @property
    def _has_figures(self) -> bool:
        return any(isinstance(block, Drawing) for section in self.sections for block in section.blocks)

    def _html(self, policy: str, styles: str, scripts: str) -> str:
        links = "".join(
            f'<a href="#s{number}">{_text(section.title)}</a>' for number, section in enumerate(self.sections)
        )
        sections = "".join(_section(number, section, self.pictures) for number, section in enumerate(self.sections))
        return (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8">{policy}'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            '<meta name="referrer" content="no-referrer"><link rel="icon" href="data:,">'
            f"<title>{_text(self.title)}</title>{styles}</head><body>"
            f"<header><h1>{_text(self.title)}</h1><p>{_text(self.about)}</p></header>"
            f"<nav><div>{links}</div></nav><main>{sections}</main><footer>{_text(self.footer)}</footer>"
            '<aside id="chosen" hidden></aside><div id="hover" hidden></div>'
            f'<script type="application/json" id="pictures">{_json(self.pictures.facts())}</script>'
            f"{scripts}</body></html>"
        )


def content_policy(*scripts: str, connects: bool = False) -> str:
    """A content security policy: nothing is loaded or run but what it names.

    Styles may be in the page, as plotly.js writes some; images may be in it or of the same origin.

    Args:
        scripts: sources of scripts: digests, or ``'self'``.
        connects: whether the page's script may ask the server that it is from.
    """
    own = " 'self'" * connects
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src {' '.join(scripts)}",
            f"style-src 'unsafe-inline'{own}",
            f"img-src data:{own}",
            *(["connect-src 'self'"] * connects),
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )


def script_source(source: str) -> str:
    """A script in a page, as a content security policy names it: by its digest."""
    return f"'sha256-{b64encode(sha256(source.encode('utf-8')).digest()).decode('ascii')}'"


def inside_script(source: str) -> str:
    """JavaScript that means the same and can stand in a page: nothing in it ends the element, or begins a comment."""
    return source.replace("</script", "<\\/script").replace("<!--", "\\x3C!--")


@cache
def asset(name: str) -> str:
    """A style sheet or script that lies beside this module."""
    return files("featstore.pages").joinpath(name).read_text(encoding="utf-8")


def _section(number: int, section: Section, pictures: Pictures) -> str:
    blocks = "".join(_block(block, pictures) for block in section.blocks)
    return f'<section id="s{number}"><h2>{_text(section.title)}</h2>{blocks}</section>'


def _block(block: Block, pictures: Pictures) -> str:
    if isinstance(block, str):
        return f"<p>{_text(block)}</p>"
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Links):
        return f'<div class="pages">{"".join(f"<span>{_linked(each)}</span>" for each in block.links)}</div>'
    if isinstance(block, Drawing):
        kind = "figure map" if block.is_map else "figure"
        facts = _escaped_json(figures.as_json(block.figure))
        return f'<div class="{kind}"><script type="application/json">{facts}</script></div>'
    shown = "".join(
        f'<button class="picture" data-place="{place:d}" title="{_text(pictures.names[place])}">'
        f'<span>{_text(words)}</span><span class="name">{_text(pictures.names[place])}</span></button>'
        for place, words in block.pictures
    )
    return f'<div class="gallery">{shown}</div>'


def _table(table: Table) -> str:
    are_numbers = [
        any(isinstance(row[place], int | float) for row in table.rows)
        and not any(isinstance(row[place], str | Link) for row in table.rows)
        for place in range(len(table.columns))
    ]
    kinds = ["number" if each else "text" for each in are_numbers]
    head = "".join(
        f'<th class="{kind}"><button>{_text(name)}</button></th>'
        for kind, name in zip(kinds, table.columns, strict=True)
    )
    body = "".join(f"<tr>{''.join(_cells(row, kinds))}</tr>" for row in table.rows)
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cells(row: Sequence[Cell], kinds: Sequence[str]) -> Iterator[str]:
    for value, kind in zip(row, kinds, strict=True):
        if isinstance(value, Link):
            sorts_by, shown = value.text, _linked(value)
        elif value is None or (isinstance(value, float) and math.isnan(value)):
            sorts_by, shown = "", "-"
        elif isinstance(value, float):
            sorts_by, shown = repr(value), f"{value:.4g}"
        else:
            sorts_by, shown = str(value), f"{value:,}" if isinstance(value, int) else _text(value)
        yield f'<td class="{kind}" data-value="{_text(sorts_by)}">{shown}</td>'


def _linked(link: Link | str) -> str:
    if isinstance(link, str):
        return _text(link)
    return f'<a href="{_text(link.address)}">{_text(link.text)}</a>'


def _plain(text: str) -> str:
    """Text without control characters, and as UTF-8 has it, whatever bytes a file name is of."""
    return printable(text, is_one_line=True).encode("utf-8", "backslashreplace").decode("utf-8")


def _text(text: str) -> str:
    """As HTML's text, and as the value of an attribute between quotes."""
    return escape(_plain(text))


def _json(value: Json) -> str:
    return _escaped_json(json.dumps(value, ensure_ascii=False, allow_nan=False))


def _escaped_json(text: str) -> str:
    """JSON that means the same, and that no tag ends or begins in."""
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
