"""Tar shards: samples read where they lie, what names them, and what is refused."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import shutil
import tarfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from support.image_files import image_bytes
from support.tiny import photos, staged

from featstore import FeatureStore, ImageError, ImageSet, extract
from featstore.cli.flags import ImageFlags
from featstore.extraction.remedy import image_flags
from featstore.images.digests import DigestTable, KnownDigests
from featstore.images.tar_shards import shard_paths


def shard(path: Path, members: Mapping[str, bytes | str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(*classes: str, start: int = 0) -> dict[str, bytes | str]:
    """A PNG and a .cls for each class."""
    found: dict[str, bytes | str] = {}
    for number, name in enumerate(classes, start):
        found |= {f"{number:04}.png": image_bytes(number), f"{number:04}.cls": name}
    return found


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    shard(tmp_path / "shards" / "train-000.tar", samples("cat", "dog", "cat"))
    shard(tmp_path / "shards" / "train-001.tar", samples("dog", "cat", start=3))
    return tmp_path / "shards"


def test_a_samples_key_is_its_id_and_its_bytes_are_the_members(shards: Path) -> None:
    images = ImageSet.from_tar(shards)
    assert (images.name, images.ids) == ("train", ("0000", "0001", "0002", "0003", "0004"))
    assert images.classes == ("cat", "dog")
    np.testing.assert_array_equal(images.targets, [0, 1, 0, 1, 0])
    assert [images.read(index) for index in range(5)] == [image_bytes(number) for number in range(5)]
    assert sorted(path.name for path in shards.iterdir()) == ["train-000.tar", "train-001.tar"]


def test_labels_splits_and_groups_come_from_members_and_from_json(tmp_path: Path) -> None:
    def said(**fields: object) -> str:
        return json.dumps(fields)

    path = shard(
        tmp_path / "a.tar",
        {
            "./x/1.JPG": image_bytes(1), "x/1.json": said(kind="rose", part="train", who=7, tags=["a", "b"], size=1.5),
            "x/1.txt": "a red rose\n",
            "x/2.json": said(kind=None, part="val", who="p", tags=[], size=2), "x/2.seg.webp": image_bytes(2),
            "x/": b"", "x/._1.jpg": b"litter", "note.json": "{}",
        },
    )  # fmt: skip
    images = ImageSet.from_tar(path, label_column="kind", split_column="part", group_column="who")
    assert images.ids == ("x/1", "x/2")
    assert (images.classes, images.groups, images.splits.tolist()) == (("rose",), ("7", "p"), ["train", "valid"])
    np.testing.assert_array_equal(images.targets, [0, -1])
    assert images.skipped == (("note", f"has no image in {path}"),)
    assert ImageSet.from_tar(path, label_column="txt").classes == ("a red rose",)
    tagged = ImageSet.from_tar(path, label_column="tags", task="multi")
    assert tagged.classes == ("a", "b")
    np.testing.assert_array_equal(tagged.targets, [[1, 1], [0, 0]])
    measured = ImageSet.from_tar(path, label_column=["size"], task="regression")
    np.testing.assert_array_equal(measured.targets, np.array([[1.5], [2]], np.float32))
    assert not ImageSet.from_tar(path).is_labelled  # neither .cls nor a field called label
    assert not ImageSet.from_tar(path, label_column=None).is_labelled
    with pytest.raises(ValueError, match=r"No sample of .*a\.tar has a member \.breed or a field 'breed'"):
        ImageSet.from_tar(path, label_column="breed")
    with pytest.raises(ValueError, match=r"labels a, b\. Expected one class, .* --task multi"):
        ImageSet.from_tar(path, label_column="tags")


def test_features_of_a_shard_are_those_of_the_same_files_in_a_folder(tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos", 6)
    files = sorted(path for path in folder.rglob("*.*"))
    members: dict[str, bytes | str] = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
    members |= {path.relative_to(folder).with_suffix(".cls").as_posix(): path.parent.name for path in files}
    images = ImageSet.from_tar(shard(tmp_path / "photos.tar", members))
    store = FeatureStore(tmp_path / "features")

    made = extract(staged(), ImageSet.from_folder(folder), store, cuts=["layer2:avg"], workers=2)
    again = extract(staged(), images, store, cuts=["layer2:avg"], workers=2)

    assert (made.computed, again.computed, again.keys) == (6, 0, made.keys)
    assert list(images.classes) == ["cat", "dog"]
    filed = ImageSet.from_store(store, "photos")
    np.testing.assert_array_equal(filed.digests().values, images.digests().values)


@pytest.mark.parametrize("how", ["train-{000..001}.tar", "train-{000,001}.tar", "train-*.tar", ""])
def test_several_shards_are_named_by_one_word(shards: Path, how: str) -> None:
    path = f"{shards}/{how}".rstrip("/")
    assert shard_paths(path) == [str(shards / "train-000.tar"), str(shards / "train-001.tar")]
    given = ImageFlags(images=path, valid=0.4).given()
    assert given.images.ids == ("0000", "0001", "0002", "0003", "0004")
    assert image_flags(given.images) == ["--images", path, "--valid", "0.4"]


def test_numbers_in_braces_are_as_wide_as_they_are_written() -> None:
    with pytest.raises(ValueError, match=r"/a-8\.tar, /a-9\.tar, /a-10\.tar are not there"):
        shard_paths("/a-{8..10}.tar")
    with pytest.raises(ValueError, match=r"/a-08b\.tar, /a-08c\.tar, /a-09b"):
        shard_paths("/a-{08..10}{b,c}.tar")


def test_shards_named_after_splits_are_these_splits(tmp_path: Path) -> None:
    shard(tmp_path / "train-0.tar", samples("cat", "dog"))
    shard(tmp_path / "val-0.tar", samples("dog", start=2))
    given = ImageFlags(images=str(tmp_path)).given()
    assert given.images.splits.tolist() == ["train", "train", "valid"]
    assert given.about == ("split by the shards' names: train 2, valid 1 (to deal anew: --split-column '')",)
    assert image_flags(given.images) == ["--images", str(tmp_path)]
    anew = ImageFlags(images=str(tmp_path), split_column="", valid=0.5).given().images
    assert image_flags(anew) == ["--images", str(tmp_path), "--split-column", "", "--valid", "0.5"]
    only = ImageFlags(images=str(tmp_path / "train-0.tar")).given()
    assert only.dealt is not None
    assert only.dealt.startswith("no split in the shards' names: ")


def test_a_field_split_of_the_samples_is_their_split_as_a_tables_column_is(tmp_path: Path) -> None:
    members: dict[str, bytes | str] = {}
    for number, split in enumerate(("train", "val", "train", "test")):
        members |= {f"{number}.png": image_bytes(number), f"{number}.cls": "cat"}
        members[f"{number}.json"] = json.dumps({"split": split})
    path = shard(tmp_path / "a.tar", members)
    given = ImageFlags(images=str(path)).given()
    assert given.images.splits.tolist() == ["train", "valid", "train", "test"]
    assert given.about == ("split by the samples' split: train 2, valid 1, test 1 (to deal anew: --split-column '')",)
    assert ImageSet.from_tar(path, split_column="").splits.tolist() == [""] * 4
    named = [shard(tmp_path / f"{name}-0.tar", members) for name in ("train", "val")]
    assert ImageSet.from_tar(named).splits.tolist() == ["train"] * 4 + ["valid"] * 4  # names come first


def test_a_folder_of_images_with_a_tar_beside_them_stays_one(tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos", 4)
    shard(folder / "more.tar", samples("cat"))
    images = ImageFlags(images=str(folder)).given().images
    assert images.skipped == (("more.tar", "not an image by its suffix"),)


def test_options_of_tables_are_refused_for_shards(shards: Path) -> None:
    with pytest.raises(ValueError, match=r"--root x is for a table of images, and .* is none"):
        ImageFlags(images=str(shards), root="x").given()


def test_a_compressed_shard_is_refused_with_the_command(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", samples("cat"))
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(ValueError, match=r"a\.tar\.gz is compressed, .* gunzip .*a\.tar\.gz"):
        ImageFlags(images=str(tmp_path / "a.tar.gz")).given()


def test_a_shard_that_is_cut_off_or_damaged_is_named(shards: Path) -> None:
    path = shards / "train-001.tar"
    whole = path.read_bytes()
    ends = [*range(0, 8 * 512 + 1, 512), 700]  # of headers and of the four members; zeros follow, as in a whole one
    assert whole[8 * 512 :] == bytes(len(whole) - 8 * 512)
    for content in [*(whole[:end] for end in ends), whole[:1030] + b"X" + whole[1031:]]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"train-001\.tar is no tar file, or is damaged or cut off"):
            ImageSet.from_tar(shards)


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_a_member_that_is_a_link_is_refused_since_its_label_would_be_lost(tmp_path: Path, kind: bytes) -> None:
    path = shard(tmp_path / "a.tar", samples("cat", "dog"))
    with tarfile.open(path, "a") as tar:
        tar.addfile(tarfile.TarInfo("0002.png"))
        link = tarfile.TarInfo("0002.cls")
        link.type, link.linkname = kind, "0000.cls"
        tar.addfile(link)
    with pytest.raises(ValueError, match=r"holds 0002\.cls as a link to 0000\.cls\. .*--hard-dereference"):
        ImageSet.from_tar(path)


def test_a_second_archive_behind_the_first_is_refused_as_it_would_be_left_out(shards: Path) -> None:
    first, second = sorted(shards.iterdir())
    first.write_bytes(first.read_bytes() + second.read_bytes())
    with pytest.raises(ValueError, match=r"train-000\.tar holds more behind the end of its archive"):
        ImageSet.from_tar(first)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ('{"age": 1' + "0" * 400 + "}", "has 1000"),
        ('{"age": "1_000"}', "has '1_000' in 'age'. Expected a number"),
        ("[" * 100_000, "has a .json that can't be read"),
    ],
)
def test_numbers_and_json_that_python_cannot_take_are_refused_with_the_sample(
    tmp_path: Path, fields: str, said: str
) -> None:
    path = shard(tmp_path / "a.tar", {"a.png": image_bytes(0), "a.json": fields})
    with pytest.raises(ValueError, match="The sample a of ") as error:
        ImageSet.from_tar(path, label_column="age", task="regression")
    assert said in str(error.value)


def test_keys_that_repeat_across_shards_stand_after_their_shards_name(shards: Path, tmp_path: Path) -> None:
    shard(shards / "train-001.tar", {**samples("dog"), "x/1.png": image_bytes(7), "x/1.cls": "cat"})
    given = ImageFlags(images=str(shards)).given().images
    assert given.ids == ("train-000/0000", "train-000/0001", "train-000/0002", "train-001/0000", "train-001/x/1")
    np.testing.assert_array_equal(given.targets, [0, 1, 0, 1, 0])
    assert [given.read(index) for index in (0, 3, 4)] == [image_bytes(0), image_bytes(0), image_bytes(7)]
    assert given.notes == ("keys repeat across shards, so that an id is a shard's name and a key: train-000/0000",)
    assert ImageSet.from_tar(shards / "train-001.tar").ids == ("0000", "x/1")
    below = [shard(tmp_path / split / "0.tar", samples("cat")) for split in ("train", "valid")]
    assert ImageSet.from_tar(below).ids == ("train/0/0000", "valid/0/0000")
    path = shard(tmp_path / "a", samples("cat"))
    shutil.copy(path, tmp_path / "a.tar")
    with pytest.raises(
        ValueError, match=r"a/0000 is The sample 0000 of .*/a and The sample 0000 of .*/a\.tar\. Expected"
    ):
        ImageSet.from_tar([path, tmp_path / "a.tar"])


def test_what_is_there_twice_in_one_shard_is_refused(tmp_path: Path) -> None:
    path = shard(tmp_path / "twice.tar", samples("cat"))
    with tarfile.open(path, "a") as tar:
        tar.addfile(tarfile.TarInfo("0000.png"), io.BytesIO())
    with pytest.raises(ValueError, match=r"twice\.tar has two members 0000\.png\. Expected each once"):
        ImageSet.from_tar(path)


def test_a_mask_beside_an_image_is_not_the_image(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", {"1.seg.png": image_bytes(2), "1.png": image_bytes(1)})
    assert ImageSet.from_tar(path).read(0) == image_bytes(1)
    for names in (["1.png", "1.jpg"], ["1.a.png", "1.b.png"]):
        path = shard(tmp_path / "two.tar", {name: image_bytes(1) for name in [*names, "1.cls"]})
        with pytest.raises(ValueError, match=rf"The sample 1 of .* has 2 images: '{names[0]}', '{names[1]}'"):
            ImageSet.from_tar(path)


def test_a_shard_that_is_changed_later_gives_no_bytes_and_no_digest(shards: Path) -> None:
    images = ImageSet.from_tar(shards)
    with (shards / "train-001.tar").open("r+b") as file:
        file.truncate(5000)
    assert images.read(0) == image_bytes(0)
    with pytest.raises(
        ImageError, match=r"0003: its shard .*train-001\.tar can't be read \(it has 5,000 bytes, and had"
    ):
        images.read(3)
    assert images.absent() == [3, 4]
    assert list(images.digests().failed) == [3, 4]
    shard(shards / "train-001.tar", samples("dog", "cat", start=5))  # as large as before
    os.utime(shards / "train-001.tar", (1, 1))
    with pytest.raises(ImageError, match="it was changed since its members were looked up"):
        images.read(3)
    (shards / "train-001.tar").unlink()
    with pytest.raises(ImageError, match=r"train-001\.tar is not there; give the shards' folder"):
        images.read(3)


def test_a_digest_is_trusted_while_its_shard_is_unchanged(shards: Path) -> None:
    images = ImageSet.from_tar(shards)
    taken = images.digests()
    later = taken.stats.copy()
    later[:, 4] += 10_000_000_000  # as if hashed long after the last write
    known = KnownDigests([DigestTable(images.ids, np.full((5, 32), 7, np.uint8), later)])

    assert (ImageSet.from_tar(shards).digests(known).values == 7).all()
    (shards / "train-001.tar").touch()
    values = ImageSet.from_tar(shards).digests(known).values
    assert (values[:3] == 7).all()
    np.testing.assert_array_equal(values[3:], taken.values[3:])
    newer = KnownDigests([DigestTable(images.ids, np.full((5, 32), 8, np.uint8), of_today(shards, later))])
    assert list(images.digests(newer).failed) == [3, 4]  # others hashed what is there now, which isn't what it was
    assert (ImageSet.from_tar(shards).digests(newer).values == 8).all()


def of_today(shards: Path, stats: np.typing.NDArray[np.int64]) -> np.typing.NDArray[np.int64]:
    """The same facts with those of the second shard as they are now."""
    facts = (shards / "train-001.tar").stat()
    found = stats.copy()
    found[3:] = [facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino, found[3, 4] + 10_000_000_000]
    return found


def test_shards_pickle_move_and_are_read_by_many_threads(shards: Path, tmp_path: Path) -> None:
    images = ImageSet.from_tar(shards)
    elsewhere = shutil.copytree(shards, tmp_path / "elsewhere", copy_function=shutil.copyfile)
    shutil.rmtree(shards)

    moved = pickle.loads(pickle.dumps(images)).with_root(elsewhere)

    assert moved.absent() == []
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(moved.read, list(range(5)) * 40))
    assert read == [image_bytes(number) for number in range(5)] * 40
    assert moved.origin == {}


def test_shards_of_one_name_in_two_folders_move_with_their_folders(tmp_path: Path) -> None:
    for number, split in enumerate(("train", "valid")):
        shard(tmp_path / "here" / split / "00.tar", samples("cat", start=number))
    images = ImageSet.from_tar([tmp_path / "here" / split / "00.tar" for split in ("train", "valid")])
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    shutil.copy(tmp_path / "here" / "train" / "00.tar", tmp_path / "there")  # which isn't either's

    moved = images.with_root(tmp_path / "there")

    assert moved.absent() == []
    assert [moved.read(index) for index in range(2)] == [image_bytes(0), image_bytes(1)]
    assert list(images.with_root(tmp_path).digests().failed) == [0, 1]


def test_another_tar_of_equal_size_in_place_of_a_moved_shard_is_noticed(shards: Path, tmp_path: Path) -> None:
    images = ImageSet.from_tar(shards)
    elsewhere = shutil.copytree(shards, tmp_path / "elsewhere")
    shutil.copy(elsewhere / "train-000.tar", elsewhere / "train-001.tar")
    with (elsewhere / "train-001.tar").open("r+b") as file:
        file.truncate((shards / "train-001.tar").stat().st_size)
    moved = images.with_root(elsewhere)
    with pytest.raises(
        ImageError, match=r"0003: its shard .*train-001\.tar .*what lies there isn't the member that did"
    ):
        moved.read(3)
    assert moved.absent() == [3, 4]
    of_that_tar = np.full((5, 32), 9, np.uint8)
    facts = of_today(elsewhere, images.digests().stats)
    known = KnownDigests([DigestTable(images.ids, of_that_tar, facts)])
    digests = moved.digests(known)
    assert list(digests.failed) == [3, 4]
    assert not digests.values[3:].any()


def test_a_damaged_member_is_a_failed_row_with_its_reason(tmp_path: Path) -> None:
    members = {**samples("cat", "dog", "cat"), "0001.png": image_bytes(1)[:-20], "0002.png": b"no image"}
    images = ImageSet.from_tar(shard(tmp_path / "a.tar", members))
    report = extract(staged(), images, FeatureStore(tmp_path / "feats"), on_error="skip", workers=0)
    (first, why), (second, also) = report.failures
    assert (first, second, report.computed) == ("0001", "0002", 1)
    assert why.startswith("a truncated PNG")
    assert also.startswith("starts with b'no image': not an image")
