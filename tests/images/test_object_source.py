"""Images in an object store: as those of a folder with the same files, and read once."""

from __future__ import annotations

import pickle
import secrets
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support.extracting import counts, run
from support.object_server import Proxy, upload
from support.programs import Run
from support.tiny import photos, staged

from featstore import FeatureStore, ImageError, ImageSet, plan
from featstore.images import object_source
from featstore.images.object_source import ObjectSource
from featstore.images.sources import FolderSource
from featstore.objects import ObjectPath, delete, place_of, put


@pytest.fixture(params=["memory", "s3"])
def place(request: pytest.FixtureRequest) -> ObjectPath:
    """A prefix called as a folder of photographs may be."""
    root = "memory://" + secrets.token_hex(8) if request.param == "memory" else request.getfixturevalue("bucket")
    found = place_of(f"{root}/some/photos")
    assert isinstance(found, ObjectPath)
    return found


@pytest.fixture
def in_memory() -> ObjectPath:
    return ObjectPath("memory://" + secrets.token_hex(8), "some/photos")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that may be listed wrongly in many ways."""
    root = photos(tmp_path / "photos")
    shutil.copytree(root / "cat", root / ".hidden" / "cat")
    shutil.copy(root / "cat" / "0.png", root / "0.png")
    shutil.copy(root / "cat" / "0.png", root / "cat" / ".0.png")
    (root / "cat" / "deeper").mkdir()
    shutil.copy(root / "dog" / "1.jpg", root / "cat" / "deeper" / "ä %41 (1).JPG")
    (root / "notes.txt").write_text("none")
    (root / "__MACOSX").mkdir()
    (root / "__MACOSX" / "1.jpg").write_text("none")
    stored = root / "feats" / "net@pool-0123456789ab" / "avg-evaluation-float16-01234567"
    stored.mkdir(parents=True)
    (stored / "part-0123456789abcdef.h5").write_text("none")
    return root


def test_images_of_objects_are_those_of_the_files(place: ObjectPath, folder: Path) -> None:
    upload(folder, place)
    own, like = ImageSet.from_folder(str(place)), ImageSet.from_folder(folder)
    assert (own.name, own.ids, own.classes, own.skipped, own.notes) == (
        like.name,
        like.ids,
        like.classes,
        like.skipped,
        like.notes,
    )
    assert own.targets is not None
    assert like.targets is not None
    assert (own.targets == like.targets).all()
    assert (own.digests().values == like.digests().values).all()
    assert [own.read(index) for index in range(len(own))] == [like.read(index) for index in range(len(own))]
    assert [pickle.loads(pickle.dumps(own)).read(index) for index in (0, 1)] == [own.read(0), own.read(1)]


def test_folders_called_as_splits_are_the_splits(in_memory: ObjectPath, tmp_path: Path) -> None:
    for split in ("train", "valid"):
        photos(tmp_path / "photos" / split)
    upload(tmp_path / "photos", in_memory)
    own, like = ImageSet.from_folder(str(in_memory)), ImageSet.from_folder(tmp_path / "photos")
    assert (own.splits == like.splits).all()
    assert own.ids == like.ids


def test_a_prefix_without_images_is_refused(in_memory: ObjectPath) -> None:
    with pytest.raises(ValueError, match=f"There are no objects below {in_memory}"):
        ImageSet.from_folder(str(in_memory))
    put(in_memory / "notes.txt", b"none")
    with pytest.raises(ValueError, match="holds no images: found 0 folders and 1 other file"):
        ImageSet.from_folder(str(in_memory))


def test_an_object_that_is_gone_is_an_image_that_failed(in_memory: ObjectPath, folder: Path) -> None:
    upload(folder, in_memory)
    images = ImageSet.from_folder(str(in_memory))
    delete(in_memory / images.ids[0])
    assert images.digests().failed == {0: f"there is no such object below {in_memory}; {REMEDY}"}
    with pytest.raises(ImageError, match="there is no such object below"):
        images.read(0)


REMEDY = "give the images' address or folder with --root (in Python: images.with_root(...))"


def test_objects_are_read_again_only_if_they_have_changed(
    bucket: str, proxy: Proxy, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = place_of(f"{bucket}/photos")
    assert isinstance(place, ObjectPath)
    upload(folder, place)
    # What was written within the last two seconds is never trusted.
    monkeypatch.setattr(object_source, "time", SimpleNamespace(time_ns=lambda: time.time_ns() + 10_000_000_000))
    store = FeatureStore(tmp_path / "features")
    images = ImageSet.from_folder(str(place))
    assert counts(run(images, store)) == (len(images) - 1, 0, 0)  # two have one content
    assert proxy.count("GET") == sum("list-type" in path for _, path in proxy.requests) + len(images)
    proxy.requests.clear()
    images = ImageSet.from_folder(str(place))
    assert counts(run(images, store)) == (0, len(images), 0)
    assert not [path for _, path in proxy.requests if "list-type" not in path]
    put(place / images.ids[0], (folder / images.ids[-1]).read_bytes(), replaces=True)
    digests = ImageSet.from_folder(str(place)).digests(store.known_digests(images)).values
    assert (digests[0] == digests[-1]).all()
    assert proxy.count("GET") == sum("list-type" in path for _, path in proxy.requests) + 1


def test_a_set_of_files_goes_on_with_objects_and_objects_with_files(
    in_memory: ObjectPath, folder: Path, store: FeatureStore
) -> None:
    upload(folder, in_memory)
    files = ImageSet.from_folder(folder)
    run(files, store)
    moved = ImageSet.from_store(store).with_root(str(in_memory))
    assert moved.read(0) == files.read(0)
    assert (moved.digests().values == files.digests().values).all()
    assert moved.source.moved(str(folder)) is None  # another process would look for them in vain
    elsewhere = ObjectSource(root="s3://bucket/photos")
    assert elsewhere.moved("gs://bucket/photos") == ObjectSource(root="gs://bucket/photos")
    assert elsewhere.moved(str(folder)) == FolderSource(root=str(folder))
    stripped = ImageSet.from_store(store).with_root(str(in_memory / "cat"), strip="cat")
    assert stripped.read(0) == files.read(0)


def test_a_table_may_name_objects(in_memory: ObjectPath, folder: Path) -> None:
    upload(folder, in_memory)
    files = ImageSet.from_folder(folder)
    lines = [f"{name},{name.partition('/')[0]}" for name in files.ids if " " not in name]
    table = folder.with_name("table.csv")
    table.write_text("\n".join(["path,label", *lines]), encoding="utf-8")
    own, like = (ImageSet.from_table(table, root=root) for root in (str(in_memory), folder))
    assert np.array_equal(own.digests().values, like.digests().values)
    assert own.ids == like.ids


@pytest.mark.parametrize("odd", ["/data/b.jpg", "../b.jpg", "b//c.jpg", "b\nc.jpg"])
def test_an_image_that_no_object_can_be_is_missing_as_it_is_in_a_folder(
    in_memory: ObjectPath, tmp_path: Path, store: FeatureStore, odd: str
) -> None:
    photo = photos(tmp_path / "photos", 1) / "cat" / "0.png"
    put(in_memory / photo.name, photo.read_bytes())
    table = tmp_path / "table.csv"
    table.write_text(f'path,label\n0.png,x\n"{odd}",x\n')
    own, like = (ImageSet.from_table(table, root=root) for root in (str(in_memory), photo.parent))
    assert own.absent() == [1]
    assert list(own.digests().failed) == list(like.digests().failed) == [1]
    report = run(own, store, on_error="skip")
    assert (counts(report), report.missing) == ((1, 0, 0), 1)


def test_tables_and_shards_are_files_of_this_machine() -> None:
    with pytest.raises(ValueError, match=r"lies in an object store, from where a table can't be read"):
        ImageSet.from_table("s3://bucket/table.csv")
    with pytest.raises(ValueError, match=r"lies in an object store, from where a shard can't be read"):
        ImageSet.from_tar("s3://bucket/train-{000..003}.tar")


def test_the_program_reads_images_and_files_features_there(bucket: str, run: Run, here: Path) -> None:
    place = place_of(f"{bucket}/photos")
    assert isinstance(place, ObjectPath)
    upload(here / "photos", place)
    flags = ["--images", f"{bucket}/photos", "--store", f"{bucket}/features"]
    model = ["--backbone", "tiny.py:make_model", "--size", "32", "--cut", "pool"]
    ran = run("featstore", "extract", *flags, *model)
    assert ran.code == 0, ran.err
    assert run("featstore", "status", *flags, *model).code == 0


def test_what_is_read_for_a_plan_is_held_for_its_images_alone_and_no_longer_than_they_need_it(
    in_memory: ObjectPath, folder: Path, tmp_path: Path
) -> None:
    upload(folder, in_memory)
    store = FeatureStore(tmp_path / "features")
    images = ImageSet.from_folder(str(in_memory))
    images.digests()
    assert all(images.contents.taken(image) is None for image in images.ids)
    planned = plan(staged(), images, store, shard="0/2")
    held = [image for image in images.ids if images.contents.taken(image) is not None]
    assert held == [image for image, owned in zip(images.ids, planned.is_owned, strict=True) if owned]
    changed = ImageSet.from_folder(str(in_memory))
    plan(staged(), changed, store)
    put(in_memory / images.ids[0], (folder / images.ids[-1]).read_bytes(), replaces=True)
    assert counts(run(changed, store)) == (5, 0, 0)  # of seven images five have a content of their own
    assert all(changed.contents.taken(image) is None for image in images.ids)
    plan(staged(), changed, store)
    assert counts(run(changed, store)) == (0, 7, 0)
    assert all(changed.contents.taken(image) is None for image in images.ids)
