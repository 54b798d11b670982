"""The command `view` of the `featstore` program: a store in a browser, on this machine and for its user alone."""

from __future__ import annotations

import os
import sys
import webbrowser
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated

import typer

from featstore.cli.flags import ImageFlags, OutputFlags, StoreOption, open_store, spread
from featstore.cli.program import show, show_json, tell, tell_all

if TYPE_CHECKING:
    from featstore.images.image_set import ImageSet


@dataclass(frozen=True, kw_only=True)
class ViewImageFlags(ImageFlags):
    """The images that a store has features of, if their files are to be shown."""

    images: Annotated[
        str,
        typer.Option(
            metavar="FOLDER|TABLE|SHARDS",
            help="Where the images are; without, their names stand in their places.",
            show_default=False,
        ),
    ] = ""

    def given_if_any(self) -> ImageSet | None:
        """The images, and what their owner should read about them is said; None if none are given."""
        if not self.images:
            told = [each.name for each in fields(self) if getattr(self, each.name) != each.default]
            if told:
                raise ValueError(f"--{told[0].replace('_', '-')} belongs to images. Give these with --images.")
            return None
        given = self.given(held_out_classes=True)
        tell_all(given.about)
        return given.images


@spread
def view(
    store: StoreOption,
    images: ViewImageFlags,
    output: OutputFlags,
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="N", help="Of this machine; 0: one that is free.")] = 0,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Print the address only.")] = False,
) -> None:
    """Show a store in a browser: sets, images, labels, maps, neighbours; reads only, needs Starlette (extra view).

    It answers on this machine alone, at an address with a secret in it, until Ctrl-C ends it.
    """
    filed = open_store(store)
    filed.check_exists()
    given = images.given_if_any()
    from featstore.pages.server import Viewing

    viewing = Viewing(filed, given, port=port)
    if output.json:
        show_json({"address": viewing.address})
    else:
        show(viewing.address)
        tell("Ctrl-C ends it")
    if not no_browser and _has_screen():
        webbrowser.open(viewing.address)
    with suppress(KeyboardInterrupt):  # which a server that ends by itself doesn't always hand on
        viewing.run()
    tell("closed")


def _has_screen() -> bool:
    """Whether a browser would open a window; else it might take the terminal."""
    return sys.platform != "linux" or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
