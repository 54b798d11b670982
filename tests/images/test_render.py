"""Rendering: the same views in order with any number of threads, one decode an image, failures with name and reason."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from support.processes import Processes
from torch import Tensor

import featstore.images.render as render_module
from featstore.errors import ImageError
from featstore.images.decode import Decoded, decode
from featstore.images.decoders import PILLOW, SIMPLEJPEG
from featstore.images.digests import content_digest
from featstore.images.image_set import ImageSet
from featstore.images.render import Job, doubts_note, render
from featstore.images.views import View

VIEW = View(size=16, resize=18)
VIEWS = (VIEW, VIEW.with_seed("flip", 0), VIEW.with_seed("random_resized_crop", 0))
WORKERS = [0, 1, 3]


def digit(number: int) -> NDArray[np.uint8]:
    return np.ascontiguousarray(load_digits().images[number].repeat(4, 0).repeat(3, 1) * 15).astype(
        np.uint8
    )  # (32, 24)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight images, JPEG and PNG by turns."""
    for number in range(8):
        (tmp_path / "a").mkdir(exist_ok=True)
        suffix = ("jpg", "png")[number % 2]
        Image.fromarray(digit(number)).save(tmp_path / "a" / f"{number}.{suffix}")
    return tmp_path


def jobs_of(images: ImageSet, views: tuple[View, ...] = VIEWS) -> list[Job]:
    return [Job(index, digest.tobytes(), views) for index, digest in enumerate(images.digests().values)]


def no_render_threads() -> bool:
    return not [each for each in threading.enumerate() if each.name.startswith("featstore-render")]


@pytest.mark.parametrize("workers", [*WORKERS, None])
def test_views_come_in_order_and_equal_those_rendered_one_by_one(folder: Path, workers: int | None) -> None:
    images = ImageSet.from_folder(folder)
    jobs = list(reversed(jobs_of(images)))

    results = list(render(images, jobs, workers=workers))

    assert [result.index for result in results] == [7, 6, 5, 4, 3, 2, 1, 0]
    for job, result in zip(jobs, results, strict=True):
        data = images.read(job.index)
        assert result.views is not None
        assert result.failure is None
        assert result.decoders == ((SIMPLEJPEG, PILLOW)[job.index % 2],) * 3
        for view, rendered in zip(VIEWS, result.views, strict=True):
            assert torch.equal(rendered, view.render(decode(data)[0], content_digest(data)))
    assert no_render_threads()


@pytest.mark.parametrize("workers", WORKERS)
def test_arrays_are_rendered_too(workers: int) -> None:
    images = ImageSet.from_arrays(np.stack([digit(number) for number in range(5)]))

    results = list(render(images, jobs_of(images), workers=workers))

    assert [result.decoders for result in results] == [(0, 0, 0)] * 5
    assert all(result.views is not None and len(result.views) == 3 for result in results)


def test_an_image_is_decoded_once_for_all_its_views(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[dict[str, Any]] = []

    def counted(data: bytes, **rules: Any) -> Decoded:
        decoded.append(rules)
        return decode(data, **rules)

    monkeypatch.setattr(render_module, "decode", counted)
    images = ImageSet.from_folder(folder)
    as_it_lies = View(size=16, resize=18, apply_exif=False)

    list(render(images, jobs_of(images, VIEWS)))
    assert len(decoded) == 8
    list(render(images, jobs_of(images, (*VIEWS, as_it_lies))))  # that view needs other pixels
    assert len(decoded) == 8 + 16


@pytest.mark.parametrize("workers", WORKERS)
def test_bad_images_shift_nothing_when_skipped(folder: Path, workers: int) -> None:
    whole = list(render(ImageSet.from_folder(folder), jobs_of(ImageSet.from_folder(folder)), workers=0))
    (folder / "a" / "2.jpg").write_bytes(b"not an image")
    (folder / "a" / "5.png").write_bytes((folder / "a" / "5.png").read_bytes()[:-20])
    images = ImageSet.from_folder(folder)
    jobs = jobs_of(images)
    (folder / "a" / "6.jpg").unlink()

    results = list(render(images, jobs, workers=workers, on_error="skip"))

    assert [result.index for result in results] == list(range(8))
    failures = {result.index: result.failure for result in results if result.failure is not None}
    assert failures.keys() == {2, 5, 6}
    assert {result.index for result in results if result.is_lasting} == {2, 5}  # the sixth may be back tomorrow
    assert "starts with b'not an image'" in str(failures[2])
    assert "truncated PNG" in str(failures[5])
    for before, result in zip(whole, results, strict=True):
        if result.failure is None:
            assert result.views is not None
            assert before.views is not None
            assert all(torch.equal(*pair) for pair in zip(before.views, result.views, strict=True))
        else:
            assert (result.views, result.decoders) == (None, ())


@pytest.mark.parametrize("workers", WORKERS)
def test_a_bad_image_is_raised_by_name_after_those_before_it(folder: Path, workers: int) -> None:
    (folder / "a" / "3.png").write_bytes(b"")
    images = ImageSet.from_folder(folder)
    seen: list[int] = []

    with pytest.raises(ImageError) as caught:
        seen.extend(result.index for result in render(images, jobs_of(images), workers=workers))

    assert (caught.value.image, caught.value.reason) == ("a/3.png", "the file is empty")
    assert seen == [0, 1, 2]
    assert no_render_threads()


@pytest.mark.parametrize("workers", WORKERS)
def test_an_image_that_changed_meanwhile_is_refused(folder: Path, workers: int) -> None:
    images = ImageSet.from_folder(folder)
    jobs = jobs_of(images)
    Image.fromarray(digit(9)).save(folder / "a" / "1.png")

    with pytest.raises(ImageError, match=r"a/1.png: it was changed while the job ran"):
        list(render(images, jobs, workers=workers))
    skipped = list(render(images, jobs, workers=workers, on_error="skip"))
    assert [(result.index, result.is_lasting) for result in skipped if result.failure is not None] == [(1, False)]


def dim(number: int) -> Image.Image:
    """Gray values of 12 bits in 16."""
    return Image.fromarray(digit(number).astype(np.uint16) * 16)


@pytest.mark.parametrize("workers", WORKERS)
def test_a_doubtful_image_is_rendered_or_refused_as_one_that_cannot_be_decoded(folder: Path, workers: int) -> None:
    dim(3).save(folder / "a" / "3.png")
    images = ImageSet.from_folder(folder)
    noted = list(render(images, jobs_of(images), workers=workers))
    assert [each.index for each in noted if each.doubt is not None] == [3]
    assert all(each.views is not None for each in noted)
    with pytest.raises(ImageError, match=r"^a/3\.png: doubtful: its 16-bit values reach"):
        list(render(images, jobs_of(images), workers=workers, doubtful="refuse"))
    skipped = list(render(images, jobs_of(images), workers=workers, on_error="skip", doubtful="refuse"))
    assert [each.index for each in skipped if each.views is None] == [3]
    assert (skipped[3].failure, skipped[3].is_lasting) == (f"doubtful: {noted[3].doubt}", True)
    with pytest.raises(ValueError, match="doubtful is 'maybe'; expected note or refuse"):
        next(render(images, [], doubtful="maybe"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, None),
        (1, "1 image was decoded with doubts (0: dim)"),
        (3, "3 images were decoded with doubts (0: dim; 1: dim; 2: dim)"),
        (2000, "2,000 images were decoded with doubts (0: dim; 1: dim; 2: dim; ...)"),
    ],
)
def test_a_note_of_doubts_counts_them_and_names_the_first(count: int, words: str | None) -> None:
    assert doubts_note({str(number): "dim" for number in range(count)}) == words


def picky(image: Tensor, generator: torch.Generator) -> Tensor:
    if image.shape[1] == 32 and image.float().mean() > 0:
        raise RuntimeError("not today")
    return image


@pytest.mark.parametrize("workers", WORKERS)
def test_a_failing_policy_is_named_with_its_image(folder: Path, workers: int) -> None:
    images = ImageSet.from_folder(folder)
    jobs = jobs_of(images, (VIEW.with_seed(picky, 0),))

    with pytest.raises(ImageError, match=r"^a/0.jpg: the policy picky failed: RuntimeError: not today$"):
        list(render(images, jobs, workers=workers))
    assert all(result.is_lasting for result in render(images, jobs, workers=workers, on_error="skip"))


class Counting:
    """Arrays that count how many were read, and can be slow or broken."""

    def __init__(self, length: int, *, seconds: float = 0, broken: bool = False) -> None:
        self.ids = [f"image {number}" for number in range(length)]
        self.num_read = 0
        self._seconds, self._broken = seconds, broken
        self._lock = threading.Lock()

    def read(self, index: int) -> NDArray[np.uint8]:
        with self._lock:
            self.num_read += 1
        time.sleep(self._seconds * (index % 3))
        if self._broken:
            raise KeyError(index)
        return np.full((20, 20), index % 256, np.uint8)

    def jobs(self) -> Iterator[Job]:
        for index in range(len(self.ids)):
            yield Job(index, content_digest(np.full((20, 20), index % 256, np.uint8)), (VIEW,))


@pytest.mark.parametrize("workers", [1, 4])
def test_at_most_two_images_a_worker_are_ahead(workers: int) -> None:
    images = Counting(100)
    rendered = render(images, images.jobs(), workers=workers)

    for taken in range(1, 11):
        next(rendered)
        time.sleep(0.005)
        assert images.num_read <= taken + 2 * workers
    rendered.close()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system pins no process to a processor")
def test_by_default_there_is_a_thread_for_each_processor_that_may_be_used() -> None:
    allowed, images = os.sched_getaffinity(0), Counting(40, seconds=0.002)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        rendered = render(images, images.jobs())
    finally:
        os.sched_setaffinity(0, allowed)

    with closing(rendered):
        num_threads = [
            sum(each.name.startswith("featstore-render") for each in threading.enumerate()) for _ in rendered
        ]
    assert max(num_threads) == 1


def test_slow_images_dont_change_the_order() -> None:
    images = Counting(30, seconds=0.004)

    assert [result.index for result in render(images, images.jobs(), workers=5)] == list(range(30))


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_consumer_that_stops_early_leaves_no_thread_behind(on_error: Any) -> None:
    images = Counting(1000, seconds=0.001)
    rendered = render(images, images.jobs(), workers=4, on_error=on_error)
    assert no_render_threads()  # not before they are needed

    for result in rendered:
        if result.index == 3:
            break
    rendered.close()

    assert no_render_threads()
    assert images.num_read < 20


def test_jobs_that_fail_to_come_leave_no_thread_behind() -> None:
    def jobs() -> Iterator[Job]:
        yield from list(images.jobs())[:3]
        raise OSError("no more jobs")

    images = Counting(10)
    with pytest.raises(OSError, match="no more jobs"):
        list(render(images, jobs(), workers=2))
    assert no_render_threads()


@pytest.mark.parametrize("workers", WORKERS)
def test_a_fault_of_the_images_themselves_is_not_skipped_and_names_the_image(workers: int) -> None:
    images = Counting(3, broken=True)

    with pytest.raises(KeyError) as caught:
        list(render(images, images.jobs(), workers=workers, on_error="skip"))

    assert caught.value.__notes__ == ["while rendering image 0"]
    assert no_render_threads()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_memory_lacks_for_is_named_or_left_out_this_time(
    tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featstore.images.decode.available_bytes", lambda: 100 << 20)
    Image.new("L", (3000, 3000)).save(tmp_path / "large.png")
    Image.new("L", (30, 30)).save(tmp_path / "small.png")
    images = ImageSet.from_folder(tmp_path)
    digests = images.digests().values
    jobs = [Job(index, digests[index].tobytes(), (View(size=16, resize=16),)) for index in range(2)]
    with pytest.raises(ImageError, match=r"^large\.png: decoding this PNG takes about 0.126 GB, and 0.105 GB of"):
        list(render(images, jobs, workers=workers))
    large, small = render(images, jobs, workers=workers, on_error="skip")
    assert (large.views, large.is_lasting, small.failure) == (None, False, None)


def test_nothing_to_do_is_done() -> None:
    for workers in WORKERS:
        assert list(render(Counting(0), [], workers=workers)) == []


def test_wrong_arguments_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match="on_error is 'ignore'"):
        render(Counting(0), [], on_error="ignore")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="workers is -1"):
        render(Counting(0), [], workers=-1)


def test_torchs_thread_count_is_left_alone_also_for_new_threads(processes: Processes) -> None:
    # In a process of its own: the count that new threads start with can't be set back once it is wrong.
    program = """
import threading, numpy as np, torch
from featstore.images.digests import content_digest
from featstore.images.render import Job, render
from featstore.images.views import View

class Images:
    ids = [str(index) for index in range(20)]
    def read(self, index):
        return np.full((300, 300), index, np.uint8)

torch.set_num_threads(3)
jobs = [Job(index, content_digest(Images().read(index)), (View(),)) for index in range(20)]
list(render(Images(), jobs, workers=4))
counts = [torch.get_num_threads()]
thread = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
thread.start()
thread.join()
print(counts)
"""
    assert processes.answer(program) == "[3, 3]"
