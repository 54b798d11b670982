"""Sizes, counts and lists as people read them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise


def size_text(num_bytes: int) -> str:
    """A number of bytes in the unit that suits it.

    >>> size_text(20_100_000_000), size_text(410_000_000), size_text(13_100_000), size_text(28_800)
    ('20.1 GB', '0.41 GB', '13.1 MB', '28,800 bytes')
    """
    if num_bytes < 100_000:
        return f"{num_bytes:,} bytes"
    value, unit = (num_bytes / 1e9, "GB") if num_bytes >= 100_000_000 else (num_bytes / 1e6, "MB")
    return f"{value:.3g} {unit}" if value < 100 else f"{value:,.0f} {unit}"


_UNITS = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))


def duration_text(seconds: float) -> str:
    """A stretch of time in the two units that suit it.

    >>> duration_text(4.26), duration_text(45.2), duration_text(754), duration_text(12_000), duration_text(400_000)
    ('4.3 s', '45 s', '12 min 34 s', '3 h 20 min', '4 d 15 h')
    """
    whole = round(seconds)
    for (unit, size), (smaller, part) in pairwise(_UNITS):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // part} {smaller}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"


def counted(number: int, noun: str) -> str:
    """A number of things.

    >>> counted(1, "image"), counted(2_000, "class")
    ('1 image', '2,000 classes')
    """
    ending = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{ending}"


def listed(names: Sequence[str]) -> str:
    """The first few names, and how many more there are.

    >>> listed("abcdefg")
    "'a', 'b', 'c', 'd', 'e', 2 more"
    """
    more = [f"{len(names) - 5:,} more"] if len(names) > 5 else []
    return ", ".join([*map(repr, names[:5]), *more])


def some(names: Sequence[str]) -> str:
    """The first few names as they are, and how many there are.

    >>> some("abcdefgh")
    'a, b, c, d, e, f, ... (8 in all)'
    """
    return ", ".join(names[:6]) + (f", ... ({len(names):,} in all)" if len(names) > 6 else "")


_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def printable(text: str, *, is_one_line: bool = False) -> str:
    r"""`text` with control characters shown, not obeyed: names come from files, and a terminal obeys what it is sent.

    >>> printable("cat\x1b[2J\tdog")
    'cat\\x1b[2J\tdog'

    Args:
        text: may hold tabs and line breaks.
        is_one_line: shows these too.
    """
    shown = _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)
    return shown.replace("\n", "\\n").replace("\t", "\\t") if is_one_line else shown
