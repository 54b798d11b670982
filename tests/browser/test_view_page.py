"""A store in a browser: its pages load from its server alone, and a click asks it for neighbours."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from support.browsing import visit
from support.extracting import run
from support.tiny import photos

from featstore import FeatureStore, ImageSet
from featstore.pages.server import Viewing

if TYPE_CHECKING:
    from playwright.sync_api import Browser

for library in ("plotly", "starlette", "uvicorn"):
    pytest.importorskip(library, reason=f"{library} isn't installed")


@pytest.fixture(scope="module")
def viewing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Viewing]:
    folder = tmp_path_factory.mktemp("view")
    images = ImageSet.from_folder(photos(folder / "photos", 12)).split(0.3)
    store = FeatureStore(folder / "feats")
    run(images, store)
    viewing = Viewing(store, images)
    thread = threading.Thread(target=viewing.run)
    thread.start()
    yield viewing
    viewing.end()
    thread.join(30)


def test_a_store_is_looked_through_and_a_click_asks_for_neighbours(browser: Browser, viewing: Viewing) -> None:
    with visit(browser, width=800) as seen:
        seen.go(viewing.address)
        seen.page.get_by_role("link", name="photos").click()
        seen.page.wait_for_selector("html[data-ready=true]")
        assert seen.page.locator(".gallery .picture").count() == 12
        seen.page.get_by_role("link", name="valid", exact=True).click()
        seen.page.wait_for_selector("html[data-ready=true]")
        assert 0 < seen.page.locator(".gallery .picture").count() < 12
        seen.page.locator(".gallery .picture").first.click()
        seen.page.wait_for_selector("#chosen:not([hidden])")
        assert seen.page.locator("#chosen .picture").count() == 12  # itself, and all others
        seen.until("[...document.images].every((each) => each.complete && each.naturalWidth)")
        seen.page.keyboard.press("Escape")
        seen.page.get_by_role("link", name="net@layer2").click()
        seen.page.wait_for_selector("html[data-ready=true]")
        seen.page.mouse.click(*seen.point(4))
        seen.page.wait_for_selector("#chosen:not([hidden])")
        assert seen.page.locator("#chosen .picture").count() == 12
        assert seen.page.evaluate("document.documentElement.scrollWidth") == 800
        assert seen.said == []
        assert seen.asked
        assert all(each.startswith(viewing.address) for each in seen.asked)
