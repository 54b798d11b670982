"""HTML: what a notebook shows of an object, as a title above a table; all text in it is escaped, and nothing runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from featstore.words import printable

MOST_ROWS = 20


def titled_table(title: str, rows: Sequence[Mapping[str, object]] = ()) -> str:
    """A title, and below it rows of equal columns under their names, at most `MOST_ROWS` of them; None as ``-``.

    >>> titled_table("1 < 2", [{"train": 1_200}])
    '<div><pre>1 &lt; 2</pre><table><tr><th>train</th></tr><tr><td>1,200</td></tr></table></div>'
    """
    head = "".join(f"<th>{_escaped(name)}</th>" for name in (rows[0] if rows else ()))
    body = [[_cell(value) for value in row.values()] for row in rows[:MOST_ROWS]]
    if len(rows) > MOST_ROWS:
        body.append([f"... {len(rows) - MOST_ROWS:,} more"])
    lines = "".join(f"<tr>{''.join(f'<td>{_escaped(cell)}</td>' for cell in row)}</tr>" for row in body)
    table = f"<table><tr>{head}</tr>{lines}</table>" if rows else ""
    return f"<div><pre>{_escaped(title)}</pre>{table}</div>"


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _escaped(text: str) -> str:
    """As HTML's text, whatever bytes a file name is of."""
    return escape(printable(text).encode("utf-8", "backslashreplace").decode("utf-8"))
