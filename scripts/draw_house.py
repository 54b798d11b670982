"""Draws the README's pictures, the two stages and the rooms, as Mermaid: from the layering test's own list and imports.

    .venv/bin/python scripts/draw_house.py           prints them
    .venv/bin/python scripts/draw_house.py --write   puts them into README.md

`tests/project/test_readme.py` fails where README.md shows another house than the code is.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "project"))
from test_layering import ROOMS, modules, names_used, room, target_in

ROOT = Path(__file__).parents[1]

BEGIN, END = "<!-- drawn by scripts/draw_house.py -->", "<!-- /drawn -->"

# Room -> what it is for, in a few words; "" is the package's own folder.
PURPOSES = {
    "featstore": "errors, digests, machine, words",
    "featstore.files": "the HDF5 format: written whole, checked, read",
    "featstore.images": "which images, their bytes, labels, views",
    "featstore.models": "networks as named stages, their keys; frozen trunks",
    "featstore.store": "feature sets and image tables on disk",
    "featstore.extraction": "what is missing is planned, computed, filed",
    "featstore.exchange": "to and from the files of other programs",
    "featstore.pages": "what a browser shows: images, maps, tables",
    "featstore.cli": "the featstore program",
    "training.solvers": "heads found exactly: logistic, ridge, neighbours",
    "training.inputs": "where a fit reads from, and its batches",
    "training.estimators": "heads, probes, an extractor for scikit-learn",
    "training.scores": "what outputs and targets say, with intervals",
    "training.loop": "one fit, from its options to its checkpoints",
    "training.experiments": "sweeps, backbones, few shots, runs, reports",
    "training.cli": "the featstore-train program",
    "training": "heads, Learner, runs, recipes",
}

STAGES = """flowchart LR
    photos[(images)] --> views[views<br/>evaluation, seeds] --> trunk[frozen trunk<br/>up to a cut]
    trunk == "featstore extract: once" ==> parts[(feature store<br/>HDF5, by key)]
    parts == "featstore-train head: seconds" ==> tail[tail and head]
    photos -- "featstore-train finetune" --> whole[trunk, tail and head]
    tail -. "the same model" .- whole"""


def main() -> None:
    """Prints the pictures, or writes them into README.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="replace what README.md holds between its marks")
    page = ROOT / "README.md"
    if parser.parse_args().write:
        before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
        _, _, after = rest.partition(END)
        page.write_text(f"{before}{pictures()}{after}", encoding="utf-8")
    else:
        print(pictures())


def pictures() -> str:
    """Both pictures between their marks, as README.md holds them."""
    return f"{BEGIN}\n\n```mermaid\n{STAGES}\n```\n\n```mermaid\n{rooms()}\n```\n\n{END}"


def rooms() -> str:
    """The rooms, an arrow to each that a room uses, unless it is used through another one already."""
    lines = ["flowchart BT"]
    for name, purpose in PURPOSES.items():
        lines.append(f'    {_id(name)}["<b>{name.replace(".", "/")}/</b><br/>{purpose}"]')
    return "\n".join([*lines, *(f"    {_id(user)} --> {_id(used)}" for user, used in arrows())])


def arrows() -> list[tuple[str, str]]:
    """(room, room that it uses), without those that follow from others."""
    uses: dict[str, set[str]] = {name: set() for name in PURPOSES}
    for module, path in modules().items():
        package, _, name = module.partition(".")
        if name.endswith("__"):  # the fronts and the pages of rooms
            continue
        user = _room_of(package, room(name))
        for used in _used_rooms(module, path):
            uses[user] |= {used} - {user}
    reached = {name: _reach(name, uses) for name in uses}
    return [
        (user, used)
        for user, direct in uses.items()
        for used in PURPOSES
        if used in direct and not any(used in reached[other] for other in direct - {used})
    ]


def _used_rooms(module: str, path: Path) -> Iterator[str]:
    for _, used in names_used(module, path.read_text(encoding="utf-8")):
        owner, _, rest = used.partition(".")
        if owner in ROOMS:
            yield _room_of(owner, room(target_in(owner, rest)))


def _room_of(package: str, name: str) -> str:
    return f"{package}.{name}" if name else package


def _reach(start: str, uses: dict[str, set[str]]) -> set[str]:
    """All rooms that `start` uses, directly or not. training and training.inputs use each other's ground."""
    found: set[str] = set()
    left = [start]
    while left:
        for used in uses[left.pop()] - found:
            found.add(used)
            left.append(used)
    return found - {start}


def _id(name: str) -> str:
    return name.replace(".", "_")


if __name__ == "__main__":
    main()
