"""Draws the gallery of docs/guides/augmentation.md from real photographs: every policy, four seeds, its parameters.

    .venv/bin/python scripts/draw_augmentations.py           prints the page's gallery
    .venv/bin/python scripts/draw_augmentations.py --write   puts it into the page, and the pictures beside it

`tests/project/test_augmentation_page.py` fails where the page shows other policies or parameters than there are.
"""

from __future__ import annotations

import argparse
import sys
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from featstore.digest import digest_bytes
from featstore.images.parameters import Parameter
from featstore.images.policies import BUILT_IN
from featstore.images.views import View

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "guides" / "augmentation.md"
PICTURES = PAGE.with_suffix("")

BEGIN, END = "<!-- drawn by scripts/draw_augmentations.py -->", "<!-- /drawn -->"

VIEW = View(size=112, resize=128)
SEEDS = range(4)
CHAIN = "random_resized_crop+trivial_augment"
SHOWN = {  # where the defaults show nothing
    "basic": "basic:max_zoom=1.1",
    "side_on": "side_on:max_zoom=1.1",
    "top_down": "top_down:max_zoom=1.1",
    "random_crop": "random_crop:max_zoom=1.1",
    "zoom": "zoom:amount=0..0.5",
    "stretch": "stretch:max_stretch=0.5",
    "rotate_zoom": "rotate_zoom:max_zoom=1.5,max_stretch=0.5",
    "lighting": "lighting:brightness=0.2,contrast=0.2",
}
GAP = 4


def main() -> None:
    """Prints the gallery, or writes it and its pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="replace what the page holds between its marks")
    if not parser.parse_args().write:
        print(gallery())
        return
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{gallery()}{after}", encoding="utf-8")
    PICTURES.mkdir(exist_ok=True)
    for word, photos in zip(words(), cycle(pairs()), strict=False):
        Image.fromarray(picture(word, photos)).save(file_of(word), quality=80)
    print(f"{sum(file.stat().st_size for file in PICTURES.iterdir()):,} bytes of pictures", file=sys.stderr)


def words() -> list[str]:
    """What is shown, as --augment has it."""
    return [*(SHOWN.get(name, name) for name in BUILT_IN if name != "none"), CHAIN]


def file_of(word: str) -> Path:
    """The picture of a policy."""
    return PICTURES / f"{word.partition(':')[0].replace('+', '_')}.jpg"


def gallery() -> str:
    """All policies between their marks, as the page holds them."""
    return "\n\n".join([BEGIN, *map(section, words()), END])


def section(word: str) -> str:
    """Of one policy: what it does, a picture, what it can be told."""
    name = word.partition(":")[0]
    image = f"![{word}, seeds 0 to 3](augmentation/{file_of(word).name})"
    if name not in BUILT_IN:
        return f"### `{name}`\n\nThe two, one after the other.\n\n`{word}`\n\n{image}"
    policy = BUILT_IN[name]
    does = (policy.method.__doc__ or "").partition("\n")[0]
    lines = [f"### `{name}`", f"{does} *Elsewhere:* {policy.elsewhere}.", f"`{word}`", image]
    if policy.params:
        rows = [row(each, parameter) for each, parameter in policy.params.items()]
        lines.append("\n".join(["| parameter | default | may be |", "| --- | --- | --- |", *rows]))
    return "\n\n".join(lines)


def row(name: str, parameter: Parameter) -> str:
    """One parameter in a table."""
    return f"| `{name}` | `{parameter.text(parameter.default)}` | {parameter.expected} |"


def pairs() -> list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    """Two photographs for each picture, in turns."""
    import skimage.data
    from sklearn.datasets import load_sample_images

    data: Any = skimage.data  # without types
    china, flower = load_sample_images().images
    return [(data.chelsea(), data.rocket()), (data.coffee(), data.astronaut()), (flower, china)]


def picture(word: str, photos: tuple[NDArray[np.uint8], ...]) -> NDArray[np.uint8]:
    """The evaluation view and that of each seed, a row for each photograph."""
    views = [VIEW, *(VIEW.with_seed(word, seed) for seed in SEEDS)]
    step = VIEW.size + GAP
    page = np.full((len(photos) * step - GAP, len(views) * step - GAP, 3), 255, np.uint8)
    for top, photo in enumerate(photos):
        digest = bytes.fromhex(digest_bytes(photo.tobytes()))
        image = torch.from_numpy(photo.copy()).permute(2, 0, 1)
        for left, view in enumerate(views):
            square = view.render(image, digest).permute(1, 2, 0).numpy()
            page[top * step :, left * step :][: VIEW.size, : VIEW.size] = square
    return page


if __name__ == "__main__":
    main()
