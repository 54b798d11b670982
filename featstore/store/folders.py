"""What the folders of a feature set are called, and what their names tell of it.

::

    <root>/<backbone>@<cut>-<trunk12>/<reduction>-<view>-<dtype>-<key8>[-seed3]/part-*.h5

A set is known by what its parts say, not by what folders are called. `docs/format.md` is normative.
"""

from __future__ import annotations

import re
from pathlib import Path

from featstore.store.spec import FeatureSpec

PART_NAME = re.compile(r"part-.*\.h5", re.DOTALL)
"""Of files that are parts."""

_TRUNK_DIGITS, _KEY_DIGITS = 12, 8


def folder_name(spec: FeatureSpec, backbone: str, cut: str) -> Path:
    """Where a new set goes, below the root."""
    view = spec.rendered
    words = [
        spec.reduction,
        "evaluation" if view.policy is None else view.policy.name,
        spec.dtype,
        short_key(spec.key),
    ]
    seed = [] if view.seed is None else [f"seed{view.seed}"]
    return Path(f"{_safe(backbone)}@{_safe(cut)}-{short_trunk(spec.trunk)}", "-".join([*map(_safe, words), *seed]))


def short_trunk(trunk: str) -> str:
    """The digits of a trunk's digest with which the name of its folder ends."""
    return trunk[:_TRUNK_DIGITS]


def short_key(key: str) -> str:
    """The digits of a key (or of its beginning) in the name of a set's folder."""
    return key[:_KEY_DIGITS]


def key_in(name: str) -> str:
    """The digits of the key in the name of a set's folder; none if someone has renamed it."""
    found = re.search(rf"-([0-9a-f]{{{_KEY_DIGITS}}})(-seed\d+)?$", name)
    return found[1] if found else ""


def is_trunk_folder(name: str) -> bool:
    """Whether a folder is called as those that hold the sets of one trunk."""
    return re.search(rf"@.*-[0-9a-f]{{{_TRUNK_DIGITS}}}$", name) is not None


def _safe(text: str) -> str:
    """`text` as a part of a folder's name, which never begins with a dot: nobody looks into hidden folders."""
    return re.sub(r"^\.+|[^A-Za-z0-9._]+", "_", text)[:80]
