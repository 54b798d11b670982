"""Pages in a browser: what they say on the console, what they ask the network for, where a map's points are."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Dialog, Page, Request

SECONDS = 60
"""That a busy machine may take to draw a page."""


class Visit:
    """A page that was opened, and what it did.

    Attributes:
        page: as playwright drives it.
        said: what it wrote to the console, and errors.
        asked: addresses of its requests, without those that hold what they name.
        dialogs: what it wanted to show in a box.
    """

    def __init__(self, page: Page) -> None:
        self.page = page
        self.said: list[str] = []
        self.asked: list[str] = []
        self.dialogs: list[str] = []
        page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.said.append(str(error)))
        page.on("request", self._request)
        page.on("dialog", self._dialog)

    def go(self, address: str) -> None:
        """Opens an address and waits until its figures are drawn."""
        self.page.goto(address)
        self.page.wait_for_selector("html[data-ready=true]", timeout=SECONDS * 1000)

    def until(self, truth: str) -> None:
        """Waits until an expression is true. A page's policy forbids what playwright itself would wait with."""
        ends = time.monotonic() + SECONDS
        while not self.page.evaluate(truth):
            assert time.monotonic() < ends, f"{truth} is not true after {SECONDS} s"
            time.sleep(0.005)

    def point(self, place: int) -> tuple[float, float]:
        """Where on the screen the image number `place` is on the first map, which is scrolled to."""
        x, y = self.page.evaluate(
            """(place) => {
                const map = document.querySelector(".figure.map");
                map.scrollIntoView({block: "start"});
                scrollBy(0, -80);
                const trace = map.data.find((each) => (each.customdata || []).includes(place));
                const row = trace.customdata.indexOf(place);
                const { xaxis, yaxis } = map._fullLayout;
                const { left, top } = map.getBoundingClientRect();
                const [x, y] = [xaxis.d2p(trace.x[row]), yaxis.d2p(trace.y[row])];
                return [left + xaxis._offset + x, top + yaxis._offset + y];
            }""",
            place,
        )
        return x, y

    def _request(self, request: Request) -> None:
        if not request.url.startswith("data:"):
            self.asked.append(request.url)

    def _dialog(self, dialog: Dialog) -> None:
        self.dialogs.append(dialog.message)
        dialog.dismiss()


@contextmanager
def visit(browser: Browser, *, width: int = 1280, scheme: str = "light") -> Iterator[Visit]:
    """A new page in a profile of its own."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)  # type: ignore[arg-type]
    try:
        yield Visit(context.new_page())
    finally:
        context.close()
