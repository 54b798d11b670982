"""Images rendered by processes: the views of `render`, in its order, whatever happens to one of them."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support import own_sources
from support.own_sources import Deadly, Faulty
from support.tiny import pixels

from featstore import FeatureStoreError, ImageError, ImageSet, View
from featstore.images import processes
from featstore.images.processes import CannotShareError, Renderers, Work, renderers_for
from featstore.images.render import Job, Rendered, render
from featstore.images.sources import FolderSource

VIEW = View(size=16, resize=18)
VIEWS = (VIEW, VIEW.with_seed("flip", 0), VIEW.with_seed("side_on", 1))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    """75 photographs, of which one is damaged and another no image."""
    folder = tmp_path_factory.mktemp("photos")
    for number, each in enumerate(pixels(75)):
        Image.fromarray(each).save(folder / f"{number:02}.png")
    (folder / "33.png").write_bytes((folder / "33.png").read_bytes()[:200])
    (folder / "34.png").write_bytes(b"no image")
    return ImageSet.from_folder(folder)


def jobs(images: ImageSet, views: tuple[View, ...] = VIEWS) -> list[Job]:
    """Of each image one view more than of the one before it, and from the start again."""
    digests = images.digests().values
    return [Job(index, digests[index].tobytes(), views[: 1 + index % len(views)]) for index in range(len(images))]


def facts(rendered: Rendered) -> tuple[Any, ...]:
    views = None if rendered.views is None else [each.numpy().tobytes() for each in rendered.views]
    return (
        rendered.index,
        views,
        rendered.decoders,
        rendered.failure,
        rendered.is_lasting,
        rendered.doubt,
        rendered.look,
    )


def test_processes_give_what_one_thread_gives_in_the_order_of_the_jobs_for_as_long_as_somebody_has_it(
    images: ImageSet,
) -> None:
    work = Work(source=images.source, views=VIEWS, doubtful="refuse", memory_bytes=1 << 30)
    with Renderers(work, count=2) as renderers:
        found = list(renderers.rendered(images, jobs(images), on_error="skip"))  # their memory has room for 96
        again = list(renderers.rendered(images, jobs(images), on_error="skip"))
        assert renderers.is_idle
        unfinished = renderers.rendered(images, jobs(images), on_error="skip")
        next(unfinished)
        with pytest.raises(RuntimeError, match="still with what another iterator asked for"):
            renderers.rendered(images, jobs(images))
        assert len(list(unfinished)) == 74
        small = list(renderers.rendered(images, jobs(images)[:9]))
    alone = [facts(each) for each in render(images, jobs(images), workers=0, on_error="skip", doubtful="refuse")]
    assert [facts(each) for each in found] == alone
    assert [facts(each) for each in again] == alone
    assert [facts(each) for each in small] == alone[:9]  # all still in the memory that was shared
    sizes = [len(images.read(index)) for index in range(len(images))]
    assert [each.cost.num_bytes for each in found] == sizes
    assert all(each.cost.read_seconds > 0 and each.cost.decode_seconds > 0 for each in found)
    assert len(alone) == 75


def test_what_the_caller_has_read_is_not_read_again_where_it_has_room(tmp_path: Path) -> None:
    for number, colour in enumerate(["red", "green", "blue"]):
        Image.new("RGB", (30, 20), colour).save(tmp_path / f"{number}.png")
    Image.fromarray(pixels(1)[0]).resize((200, 200)).save(tmp_path / "3.png")
    images = ImageSet.from_folder(tmp_path)
    contents = [images.read(index) for index in range(4)]
    asked = jobs(images)
    wanted = [facts(each) for each in render(images, asked, workers=0)]
    for name in images.ids:
        (tmp_path / name).unlink()
    with images.contents.kept({*images.ids} - {"1.png"}):
        for name, content in zip(images.ids, contents, strict=True):
            assert isinstance(content, bytes)
            images.contents.keep(name, content)
    with started(images.source) as renderers:
        found = list(renderers.rendered(images, asked, on_error="skip"))
    assert len(contents[0]) < renderers.work.slot_bytes < len(contents[3])
    assert [facts(found[place]) for place in (0, 2)] == [wanted[place] for place in (0, 2)]
    assert all("no such file" in (found[place].failure or "") for place in (1, 3))
    assert images.contents.taken("0.png") is None


def test_the_first_image_that_fails_is_named_and_nobody_stays_behind(images: ImageSet) -> None:
    before = children()
    with started(images.source) as renderers:
        rendered = renderers.rendered(images, jobs(images))
        found = [next(rendered) for _ in range(33)]
        assert len(children()) == len(before) + 1  # which has the others
        with pytest.raises(ImageError, match=r"33\.png: a truncated PNG"):
            next(rendered)
        assert not renderers.is_idle
    assert [each.index for each in found] == list(range(33))
    assert children() == before


def test_a_process_that_ends_by_itself_is_said_with_the_images_that_it_had(images: ImageSet) -> None:
    with started(like(Deadly, images.source)) as renderers:
        rendered = renderers.rendered(images, jobs(images), on_error="skip")
        found = [next(rendered) for _ in range(48)]
        message = r"ended by itself, at one of 48\.png and the 7 after it: it was killed"
        with pytest.raises(FeatureStoreError, match=message):
            next(rendered)
    assert [each.index for each in found] == list(range(48))


def test_an_error_of_the_callers_own_code_comes_as_it_was_with_its_place(images: ImageSet) -> None:
    with (
        started(like(Faulty, images.source)) as renderers,
        pytest.raises(LookupError, match=r"no drawer for 00\.png") as raised,
    ):
        next(renderers.rendered(images, jobs(images)))
    assert "in read" in "".join(raised.value.__notes__)
    assert "while rendering 00.png" in raised.value.__notes__


def test_what_other_processes_can_not_know_is_said_before_anything_is_drawn(
    images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "MANY_IMAGES", 1)
    views = (VIEW.with_seed(lambda image, generator: image // 2, 0),)  # which doesn't pickle
    assert renderers_for(images.source, views, num_images=75, workers=5) is None
    monkeypatch.setattr(own_sources, "STRENGTH", 50)  # which the view's key holds, and nobody else knows
    with (
        started(images.source, (VIEW.with_seed(own_sources.darker, 0),)) as renderers,
        pytest.raises(CannotShareError, match="has changed since"),
    ):
        renderers.rendered(images, iter(jobs(images)))
    monkeypatch.setattr(sys.modules["__main__"], "Deadly", Deadly, raising=False)
    monkeypatch.setattr(Deadly, "__module__", "__main__")  # as in a script of the caller's own
    with (
        started(like(Deadly, images.source)) as renderers,
        pytest.raises(CannotShareError, match="Can't get attribute 'Deadly'"),
    ):
        renderers.rendered(images, iter(jobs(images)))


def test_threads_do_for_few_workers_few_images_and_images_in_memory(images: ImageSet) -> None:
    def asked(workers: int = 5, num_images: int = 2000, source: Any = images.source) -> Renderers | None:
        return renderers_for(source, VIEWS, num_images=num_images, workers=workers)

    assert asked(workers=4) is None
    assert asked(num_images=1999) is None
    assert asked(source=ImageSet.from_arrays(pixels(3)).source) is None
    found = asked()
    assert found is not None
    found.close()


def started(source: Any, views: tuple[View, ...] = VIEWS) -> Renderers:
    return Renderers(Work(source=source, views=views, doubtful="note", memory_bytes=1 << 30), count=5)


def like(kind: type[FolderSource], source: Any) -> FolderSource:
    return kind(**{each.name: getattr(source, each.name) for each in fields(source)})


def children() -> set[int]:
    """The processes that this one has started."""
    time.sleep(0.05)
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == os.getpid() and fields[0] != "Z":
            found.add(int(folder.name))
    return found
