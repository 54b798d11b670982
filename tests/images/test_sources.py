"""Sources: what a set asks of one, shown by one that is none of the package's own."""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from support.tiny import photos, staged

from featstore import FeatureStore, ImageSet, extract
from featstore.errors import ImageError
from featstore.images.digests import Digests, KnownDigest, KnownDigests, Memo, content_digest, no_stats
from featstore.images.found import FoundImages
from featstore.images.labels import Row
from featstore.images.sources import ImageSource


def test_a_file_larger_than_any_image_fails_by_name_before_it_is_read(tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos", 4)
    with open(folder / "cat" / "disk.jpg", "wb") as file:
        file.truncate(12 * 10**9)  # holes, which take no space
    images = ImageSet.from_folder(folder)
    (place,) = images.digests().failed
    assert images.ids[place] == "cat/disk.jpg"
    assert images.absent() == []
    with pytest.raises(
        ImageError, match=r"cat/disk.jpg: .*it has 12 GB, and no image that is decoded has more than 1.5 GB"
    ):
        images.read(place)
    report = extract(staged(), images, FeatureStore(tmp_path / "feats"), on_error="skip")
    assert [image for image, _ in report.failures] == ["cat/disk.jpg"]


@dataclass(frozen=True)
class ZipSource:
    """Images in a zip archive; an id is a name in it."""

    archive: str

    @property
    def absence(self) -> None:
        return None

    @property
    def known(self) -> Mapping[str, KnownDigest]:
        return {}

    def read(self, image: str) -> bytes:
        try:
            with zipfile.ZipFile(self.archive) as archive:
                return archive.read(image)
        except (OSError, KeyError) as error:
            raise ImageError(image, f"it can't be read from {self.archive} ({error})") from error

    def digests(self, ids: tuple[str, ...], memo: Memo, known: KnownDigests) -> Digests:
        values = np.array([list(content_digest(self.read(image))) for image in ids], np.uint8)
        return Digests(values=values, failed={}, stats=no_stats(len(ids)))

    def has(self, image: str) -> bool:
        with zipfile.ZipFile(self.archive) as archive:
            return image in archive.namelist()

    def moved(self, root: str) -> ImageSource:
        return ZipSource(str(Path(root) / Path(self.archive).name))


@pytest.fixture
def zipped(tmp_path: Path) -> ImageSet:
    """The photographs of a folder, from an archive beside it."""
    folder = photos(tmp_path / "photos", 4)
    ids = tuple(sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*")))
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for image in ids:
            archive.write(folder / image, image)
    return ImageSet(
        name="zipped",
        ids=ids,
        targets=None,
        classes=(),
        splits=np.full(len(ids), ""),
        groups=None,
        task="single",
        source=ZipSource(str(tmp_path / "photos.zip")),
    )


def test_a_source_of_ones_own_is_extracted_from_and_filed_as_any_other(zipped: ImageSet, tmp_path: Path) -> None:
    folder = ImageSet.from_folder(tmp_path / "photos")
    store = FeatureStore(tmp_path / "features")

    (key,) = extract(staged(), zipped, store, cuts=["layer2:avg"], device="cpu", workers=2).keys

    contents = [hashlib.sha256((tmp_path / "photos" / name).read_bytes()).digest() for name in zipped.ids]
    assert [content_digest(zipped.read(index)) for index in range(4)] == contents
    again = extract(staged(), folder, store, cuts=["layer2:avg"], device="cpu", workers=2)
    assert (again.keys, again.computed) == ((key,), 0)  # rows are of contents, wherever these came from
    filed = ImageSet.from_store(store, "zipped")
    np.testing.assert_array_equal(filed.digests().values, zipped.digests().values)
    assert filed.absent() == [0, 1, 2, 3]


def test_a_source_of_ones_own_pickles_and_moves_with_its_set(zipped: ImageSet, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    Path(tmp_path / "photos.zip").rename(tmp_path / "elsewhere" / "photos.zip")

    moved = pickle.loads(pickle.dumps(zipped)).with_root(tmp_path / "elsewhere")

    assert moved.absent() == []
    assert moved.source == ZipSource(str(tmp_path / "elsewhere" / "photos.zip"))


def test_a_source_of_ones_own_brings_labels_and_splits_as_texts(tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos", 4)
    ids = tuple(sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*")))
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for image in ids:
            archive.write(folder / image, image)
    rows = [
        Row(image=image, labels=(image.partition("/")[0],), split=split, group=None, where=image)
        for image, split in zip(ids, ("train", "train", "train", "valid"), strict=True)
    ]
    images = ImageSet.of(FoundImages(rows=rows, source=ZipSource(str(tmp_path / "photos.zip")), name="zipped"))
    assert images.describe() == "4 images, 2 classes (cat 2, dog 2); train 3, valid 1"
    assert images.read(0) == (folder / ids[0]).read_bytes()
