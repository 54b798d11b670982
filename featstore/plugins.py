"""Plug-ins: what other installed packages add to the backbones, policies and sources that have names, by entry points.

A package names an object in its own pyproject.toml:

    [project.entry-points."featstore.backbones"]
    anything = "my_package.backbones"
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from featstore.errors import FeatureStoreError

BACKBONES, POLICIES, SOURCES = "featstore.backbones", "featstore.policies", "featstore.sources"
"""The groups: of a `models.backbones.Library`, an `images.policies.BuiltIn`, an `images.origins.Origin`."""


_NEEDED = {
    BACKBONES: ("knows", "names", "weight_names", "about", "outline", "initial", "pretrained", "class_names"),
    POLICIES: ("method", "version", "params", "checked"),
    SOURCES: ("constructor", "options", "is_named_by", "make", "flags"),
}
"""Attributes without which an object isn't what its group holds."""


class Plugin(NamedTuple):
    """What a package brings under one name: the object, and the package with its version."""

    value: Any
    package: str


def names_of(group: str) -> list[str]:
    """What `group` has names of, sorted; nothing is loaded, so that a shell may be answered at once."""
    from importlib import metadata  # takes a tenth of what help and completion may

    return sorted(metadata.entry_points(group=group).names)


@cache
def plugged_in(group: str) -> dict[str, Plugin]:
    """What is registered in `group`, by name. It is looked up and loaded once a process.

    Raises:
        FeatureStoreError: for what can't be loaded, and a name that two packages claim.
    """
    from importlib import metadata  # takes a tenth of what help and completion may

    found: dict[str, Plugin] = {}
    for point in sorted(metadata.entry_points(group=group), key=lambda each: each.name):
        package = "unknown" if point.dist is None else f"{point.dist.name} {point.dist.version}"
        if point.name in found:
            raise FeatureStoreError(
                f"Two packages bring {point.name} for {group}: {found[point.name].package} and {package}. Expected "
                "one of that name. Uninstall one."
            )
        try:
            value = point.load()
            if lacking := [name for name in _NEEDED[group] if not hasattr(value, name)]:
                raise TypeError(f"it has no {', '.join(lacking)}")
            found[point.name] = Plugin(value, package)
        except Exception as error:
            raise FeatureStoreError(
                f"{point.name} for {group} can't be loaded: {type(error).__name__}: {error}. {package} brings it; "
                "mend or uninstall that."
            ) from error
    return found
