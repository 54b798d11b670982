"""The signature of a file: which program wrote it, for whom, where and when."""

from __future__ import annotations

import getpass
import socket
from datetime import UTC, datetime
from functools import cache
from importlib import metadata

from featstore.digest import Json


def signature() -> dict[str, Json]:
    """The facts `who` and `when` of `docs/format.md`, for a file that is written now."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container without a user database
        user = "unknown"
    return {
        "who": f"featstore {_version()}, {user}@{socket.gethostname()}",
        "when": datetime.now(UTC).isoformat(timespec="microseconds"),
    }


@cache
def _version() -> str:
    """Looked up once: where featstore isn't installed, all of the environment's packages are searched for it."""
    try:
        return metadata.version("featstore")
    except metadata.PackageNotFoundError:  # run from its source, not installed
        return "of unknown version"
