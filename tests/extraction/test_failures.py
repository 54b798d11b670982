"""Failures: a limit to the images that may fail, and a report beside the store of those that were left out."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.extracting import counts, run
from support.operations import replace_operation
from support.tiny import VIEW, arrays, photos, pixels, staged
from torch import Tensor, nn

from featstore import FeatureStore, FeatureStoreError, ImageError, ImageSet, StagedModel, plan
from featstore.extraction import failures as failures_module
from featstore.extraction.estimate import estimate_plan
from featstore.extraction.extract import run_plan
from featstore.extraction.failures import Failing, TooManyFailedError
from featstore.extraction.filed import Filed
from featstore.extraction.opening import open_plan
from featstore.files import disk
from featstore.files.index import Places


def with_bad(folder: Path, count: int) -> ImageSet:
    """Six photographs, and in their midst as many files, all different, that are none."""
    photos(folder)
    for number in range(count):
        (folder / f"cat/bad{number}.jpg").write_bytes(b"no image %d" % number)
    return ImageSet.from_folder(folder)


def report_of(store: FeatureStore, images: ImageSet) -> list[dict[str, Any]]:
    """The lines of the report beside the store."""
    return [json.loads(line) for line in (store.root / f"failures/{images.name}.jsonl").read_text().splitlines()]


# ---- a limit


def test_as_many_failures_as_are_allowed_stop_nothing_and_one_more_does(store: FeatureStore, tmp_path: Path) -> None:
    images = with_bad(tmp_path / "photos", 3)
    assert counts(run(images, store, on_error="skip", max_errors=3)) == (6, 0, 3)
    other = FeatureStore(tmp_path / "other")
    with pytest.raises(FeatureStoreError) as stopped:
        run(images, other, on_error="skip", max_errors=2)
    named = "; ".join(f"{each['id']}: {each['reason']}" for each in report_of(store, images))
    assert str(stopped.value) == (
        f"3 images failed ({named}). Expected 2 at most. What was computed is filed. Repair, remove or bring back the "
        "files, or allow more with --max-errors, and run it again. What was left out, and why, "
        f"is in {other.root}/failures/photos.jsonl."
    )
    with pytest.raises(FeatureStoreError, match=r"^1 image failed \(cat/bad0\.jpg: "):
        run(images, other, on_error="skip", max_errors=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_was_decoded_before_too_many_failed_is_filed(store: FeatureStore, tmp_path: Path, workers: int) -> None:
    images = with_bad(tmp_path / "photos", 5)
    first = images.ids.index("cat/bad0.jpg")
    with pytest.raises(FeatureStoreError, match=r"^4 images failed \(.*bad0.*bad1.*bad2\.jpg: [^\n]*; \.\.\.\)\. "):
        run(images, store, on_error="skip", max_errors=3, workers=workers)
    (found,) = store.sets()
    before = sum(not name.startswith("cat/bad") for name in images.ids[: first + 4])
    assert (found.index.num_images, len(found.failed), len(report_of(store, images))) == (before, 4, 4)
    assert counts(run(images, store, on_error="skip")) == (6 - before, before, 5)


def test_what_could_not_be_read_and_what_repeats_counts_as_well(store: FeatureStore, tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos")
    for name in ("bad", "copy"):
        (folder / f"dog/{name}.jpg").write_bytes(b"no image")
    (folder / "dog/absent.jpg").symlink_to("nowhere")
    images = ImageSet.from_folder(folder)
    planned = plan(staged(), images, store, cuts=["layer2"])
    (folder / "cat/2.jpg").unlink()
    named = r"dog/absent\.jpg: there is .*; cat/2\.jpg: there is .*; dog/bad\.jpg: .*; \.\.\."
    with pytest.raises(FeatureStoreError, match=rf"^4 images failed \({named}\)\. Expected 3 at most"):
        run_plan(planned, store, on_error="skip", max_errors=3, device="cpu")
    report = run_plan(planned, store, on_error="skip", max_errors=4, device="cpu")
    assert (report.failed, report.missing) == (2, 2)


def test_failures_are_counted_without_a_look_at_all_images_for_each(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Places] = []

    def noted(digests: NDArray[np.uint8]) -> Places:
        made.append(Places(digests))
        return made[-1]

    def refused(*_: object) -> NoReturn:
        raise AssertionError("all images were looked at")

    monkeypatch.setattr(failures_module, "Places", noted)
    monkeypatch.setattr(failures_module, "is_among", refused)
    planned = plan(staged(), ImageSet.from_arrays(pixels(5)[[0, 1, 2, 1, 3, 4]]), store, cuts=["layer2"])
    failing, filed = Failing(planned, 4), Filed.nothing(planned)
    digests = [bytes(row).hex() for row in planned.digests.values]
    failing.add(3, "of two images")
    filed.failures[digests[0]] = "of one"
    failing.add_all(filed)
    filed.unfit[0][digests[1]], filed.unread[digests[4]] = "counted already", ("4", "of one")
    failing.add_all(filed)
    assert not failing.are_too_many
    failing.add(5, "of one")
    with pytest.raises(TooManyFailedError, match=r"^5 images failed \(1: of two images; 3: of two images; 0: of one; "):
        failing.check(filed)
    assert len(made) == 1


def test_files_that_are_gone_stop_a_job_before_anything_is_computed(store: FeatureStore, tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos")
    images = ImageSet.from_folder(folder)
    for path in folder.rglob("*.png"):
        path.unlink()
    with pytest.raises(FeatureStoreError, match=r"^2 images failed \(cat/0\.png: there is no such file"):
        run(images, store, on_error="skip", max_errors=1)
    assert list(store.root.rglob("*.h5")) == []


def test_an_image_that_was_unreadable_at_planning_stops_whatever_carries_out_the_plan(
    store: FeatureStore, tmp_path: Path
) -> None:
    folder = photos(tmp_path / "photos")
    (folder / "dog/absent.jpg").symlink_to("nowhere")
    images = ImageSet.from_folder(folder)
    planned = plan(staged(), images, store, cuts=["layer2"])
    for carry_out in (open_plan, estimate_plan):
        with pytest.raises(ImageError, match=r"^dog/absent\.jpg: there is no such file"):
            carry_out(planned, store, device="cpu", workers=0)
        with pytest.raises(ValueError, match="on_error is 'no'"):
            carry_out(planned, store, on_error="no")  # type: ignore[arg-type]
    others = plan(staged(), images.select([name != "dog/absent.jpg" for name in images.ids]), store, cuts=["layer2"])
    open_plan(others, store, device="cpu", workers=0).close()


class Bright(nn.Module):
    """The values of a white image don't fit into float16."""

    def forward(self, images: Tensor) -> Tensor:
        is_bright = images.amin((1, 2, 3), keepdim=True) > 2
        return torch.where(is_bright, images * 1e6, images)


def bright() -> StagedModel:
    return StagedModel.from_stages({"stem": nn.Identity(), "bright": Bright()}, view=VIEW, name="net")


def white_last() -> ImageSet:
    return ImageSet.from_arrays(np.concatenate([pixels(3), np.full((1, 24, 24, 3), 255, np.uint8)]))


def test_a_piece_of_a_plan_counts_its_own(store: FeatureStore, tmp_path: Path) -> None:
    images = with_bad(tmp_path / "photos", 4)
    bad = [images.ids.index(f"cat/bad{number}.jpg") for number in range(4)]
    planned = plan(staged(), images, store, cuts=["layer2"], dtype="float32")
    with open_plan(planned, store, on_error="skip", max_errors=2, device="cpu", workers=0) as session:
        for two in (bad[:2], bad[2:]):
            assert len(session.run(two).failures) == 2
        rest = sorted({*range(len(images))} - {bad[0]})
        with pytest.raises(TooManyFailedError, match=r"^3 images failed") as stopped:
            session.run(rest)
    sent = pickle.loads(pickle.dumps(stopped.value))
    assert str(sent) == str(stopped.value)
    assert stopped.value.filed is not None
    assert sent.filed.parts == stopped.value.filed.parts != [[]]
    assert len(sent.filed.failures) == 3


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"max_errors": 3}, ValueError, "max_errors is 3, but with on_error='raise' the first image that fails"),
        ({"max_errors": -1, "on_error": "skip"}, ValueError, "max_errors is -1; expected 0 or more"),
        ({"max_errors": 0.1, "on_error": "skip"}, TypeError, r"max_errors is 0\.1; expected a number of images"),
    ],
)
def test_a_limit_that_is_none_is_refused(
    store: FeatureStore, options: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=f"^{said}"):
        run(arrays(2), store, **options)
    assert not store.root.exists()


# ---- the report


def test_the_report_has_each_image_that_was_left_out_and_of_one_that_some_sets_cannot_hold_which(
    store: FeatureStore, tmp_path: Path
) -> None:
    folder = photos(tmp_path / "photos")
    (folder / "cat/bad.jpg").write_bytes(b"no image")
    os.symlink("nowhere", os.fsencode(folder) + b"/dog/gone\xff.jpg")
    images = ImageSet.from_folder(folder)
    report = run(images, store, on_error="skip")
    assert report_of(store, images) == [
        {"id": "cat/bad.jpg", "reason": dict(report.failures)["cat/bad.jpg"], "key": None, "lasting": True},
        {"id": "dog/gone\udcff.jpg", "reason": report.failures[1][1], "key": None, "lasting": False},
    ]
    assert report.notes[-1] == f"What was left out, and why, is in {store.root}/failures/photos.jsonl"
    white, model = white_last(), bright()
    report = run(white, store, model=model, cuts=["stem:avg", "bright", "bright:max"], dtype="float16", on_error="skip")
    found = report_of(store, white)
    assert [(each["id"], each["key"], each["lasting"]) for each in found] == [
        ("3", key, True) for key in report.keys[1:]
    ]
    assert report.failures == (("3", found[0]["reason"]),)
    assert report.failed == 1
    with pytest.raises(FeatureStoreError, match=r"^1 image failed \(3: its activations at bright"):
        run(white, store, model=model, cuts=["bright"], dtype="float16", on_error="skip", max_errors=0)


def test_the_next_report_takes_the_place_of_the_last_and_goes_with_the_failures(
    store: FeatureStore, tmp_path: Path
) -> None:
    images = with_bad(tmp_path / "photos", 2)
    run(images, store, on_error="skip")
    assert [each["id"] for each in report_of(store, images)] == ["cat/bad0.jpg", "cat/bad1.jpg"]
    (tmp_path / "photos/cat/bad0.jpg").unlink()
    images = ImageSet.from_folder(tmp_path / "photos")
    run(images, store, on_error="skip")
    assert [each["id"] for each in report_of(store, images)] == ["cat/bad1.jpg"]
    (tmp_path / "photos/cat/bad1.jpg").unlink()
    assert run(ImageSet.from_folder(tmp_path / "photos"), store).notes == ()
    assert list((store.root / "failures").iterdir()) == []


def test_jobs_that_share_the_images_report_beside_each_other_until_one_does_it_all(
    store: FeatureStore, tmp_path: Path
) -> None:
    images = with_bad(tmp_path / "photos", 9)
    (tmp_path / "photos/dog/gone.jpg").symlink_to("nowhere")
    images = ImageSet.from_folder(tmp_path / "photos")
    left_out = {name for name in images.ids if "bad" in name or "gone" in name}
    folder = store.root / "failures"

    def reported() -> dict[str, list[str]]:
        return {
            path.name: [json.loads(line)["id"] for line in path.read_text().splitlines()] for path in folder.iterdir()
        }

    for count in (3, 2):
        for index in range(count):
            run(images, store, on_error="skip", shard=f"{index}/{count}")
        found = reported()
        assert {*found} == {f"photos+{index}of{count}.jsonl" for index in range(count)}
        assert sorted(name for names in found.values() for name in names) == sorted(left_out)
    run(images, store, on_error="skip")
    assert {name: {*names} for name, names in reported().items()} == {"photos.jsonl": left_out}


def test_a_shard_counts_its_own_failures(store: FeatureStore, tmp_path: Path) -> None:
    images = with_bad(tmp_path / "photos", 5)
    for path in ("dog/x.jpg", "dog/y.jpg", "dog/z.jpg"):
        (tmp_path / "photos" / path).symlink_to("nowhere")
    images = ImageSet.from_folder(tmp_path / "photos")
    own = [
        len(run(images, FeatureStore(tmp_path / str(index)), on_error="skip", shard=f"{index}/2").failures)
        for index in (0, 1)
    ]
    assert sum(own) == 8
    assert min(own) > 0
    for index, most in enumerate(own):
        run(images, store, on_error="skip", shard=f"{index}/2", max_errors=most)
        with pytest.raises(FeatureStoreError, match=rf"^{most} images? failed .* Expected {most - 1} at most"):
            run(images, store, on_error="skip", shard=f"{index}/2", max_errors=most - 1)


def test_without_failures_nothing_is_written_beside_the_store(store: FeatureStore) -> None:
    run(arrays(3), store)
    assert not (store.root / "failures").exists()


def test_the_store_knows_its_own_files_from_a_report(store: FeatureStore, tmp_path: Path) -> None:
    images = with_bad(tmp_path / "photos", 1)
    run(images, store, on_error="skip")
    report = store.root / "failures/photos.jsonl"
    unfinished = report.with_name(f".{report.name}.tmp-0123456789abcdef")
    unfinished.write_bytes(b"{")
    fresh = FeatureStore(store.root)
    assert (len(fresh.sets()), fresh.damaged(), fresh.verify().damaged) == (1, [], ())
    assert fresh.gc(older_than=0).paths == (unfinished,)
    assert [path.name for path in report.parent.iterdir()] == [report.name]
    fresh.remove(fresh.sets()[0].key)
    assert fresh.gc(older_than=0).files == 0
    assert report.exists()


@pytest.mark.parametrize("name", ["create", "write_at"])
def test_a_report_that_cannot_be_written_is_no_error_and_leaves_the_last_one_whole(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    options: dict[str, Any] = {"model": bright(), "cuts": ["bright"], "dtype": "float16", "on_error": "skip"}
    run(white_last(), store, **options)
    report = store.root / "failures/arrays.jsonl"
    report.write_bytes(b"the last one")

    def read_only(operation: Callable[..., Any], *arguments: Any) -> NoReturn:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    replace_operation(monkeypatch, name, read_only)
    again = run(white_last(), store, **options)
    assert counts(again) == (0, 3, 1)
    said = f"{report}, which says what was left out, could not be written"
    assert re.fullmatch(rf"{re.escape(said)} \(.*Read-only file system.*\)", again.notes[-1])
    assert report.read_bytes() == b"the last one"
    assert len(list(report.parent.iterdir())) == 1


def test_what_replaces_a_file_takes_its_place_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"old")
    with disk.whole_or_nothing(path, 3, replaces=True) as fd:
        disk.write_at(fd, memoryview(b"new"), 0)
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
