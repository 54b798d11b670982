"""One image table: the frame of a part around other columns, without features, all of it checked when opened."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from featstore.digest import Json
from featstore.files import disk
from featstore.files.hdf5 import Frame, check_columns, opened_checked
from featstore.files.header import check_kind, read_regions, read_user_block
from featstore.files.plain_reads import damaged, opened


def write_table(path: Path, *, columns: Mapping[str, NDArray[Any]], facts: Mapping[str, Json]) -> None:
    """Writes an image table that appears at `path` whole and synced, or not at all.

    Args:
        path: the final name, which must be free, in a folder that exists (see `write_part`).
        columns: up to 61 arrays of integers or floats, of any shape; their names are up to 40 of `a-z` and `_`, and
            not `facts`.
        facts: everything else there is to say.

    Raises:
        ValueError: for other names, and more columns.
        TypeError: for other dtypes, and facts that are not JSON.
        FileExistsError: if `path` is taken.
        OSError: as the system gave it; no file is left then.
    """
    check_columns(columns)
    frame = Frame.of("images", columns, facts)
    with disk.whole_or_nothing(path, frame.layout.length) as fd:
        frame.write(fd)


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """An image table that `Table.open` found sound, in memory.

    Attributes:
        path: the file.
        columns: the arrays by name.
        facts: the JSON facts.
    """

    path: Path
    columns: dict[str, NDArray[Any]]
    facts: dict[str, Json]

    @classmethod
    def open(cls, path: Path) -> Table:
        """The image table at `path`, once its version, its length and every byte are checked.

        Raises:
            FileNotFoundError: if there is no such file.
            DamagedFileError: if it is not an image table, of a newer version, truncated, or altered.
        """
        with opened_checked(path, "images") as structure:
            return cls(path=path, columns=structure.columns(), facts=structure.facts())

    @classmethod
    def read_facts(cls, path: Path) -> dict[str, Json]:
        """The facts alone, which fit their own checksum; of a file of version 1, which has none, all is checked.

        Raises:
            FileNotFoundError: if there is no such file.
            DamagedFileError: if it is not an image table, of a newer version, or its facts are truncated or altered.
        """
        with opened(path) as file:
            head = read_user_block(file)
            check_kind(path, head, "images")
            found = [(extent, crc) for name, extent, crc in read_regions(head) if name == "facts"]
            if not found:  # version 1
                return cls.open(path).facts
            ((extent, crc),) = found
            text = bytearray(len(extent))
            file.read([(extent.start, [memoryview(text)])])
            if zlib.crc32(text) != crc:
                raise damaged(path, "bytes are altered in its facts")
            facts: dict[str, Json] = json.loads(text.rstrip(b"\0"))
            return facts
