"""FeatureStore: sets found by their facts whatever their folders are called, image sets beside them, damage named.

Long, since every way to find a set is tried on the same few sets.
"""

from __future__ import annotations

import builtins
import io
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import h5py
import numpy as np
import pytest
import torch
from support.parts import flip_bit
from support.tiny import VIEW, arrays, jpeg, photos, pixels, staged
from torch import Tensor

from featstore import (
    AmbiguousRequestError,
    Augment,
    DamagedFileError,
    FactsDifferError,
    FeatureRequest,
    FeatureSet,
    FeatureStore,
    FeatureStoreError,
    ImageSet,
    MissingFeaturesError,
    ModelError,
    extract,
)
from featstore.digest import digest_json
from featstore.files.part import Part, write_part
from featstore.files.table import Table
from featstore.images.digests import Digests, StatFacts, stat_rows

Run = Callable[..., tuple[str, ...]]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "features"


@pytest.fixture
def run(root: Path) -> Run:
    """Extracts, and returns the keys."""

    def extracted(images: ImageSet | None = None, **options: Any) -> tuple[str, ...]:
        defaults: dict[str, Any] = {"cuts": ["layer2"], "workers": 0, "device": "cpu", "dtype": "float32"}
        images = arrays(4) if images is None else images
        return extract(staged(), images, FeatureStore(root), **(defaults | options)).keys

    return extracted


def request(cut: str = "layer2", **options: Any) -> FeatureRequest:
    model = staged()
    return FeatureRequest(trunk=model.digest(cut), pool=model.pool(cut).facts(), **({"view": VIEW} | options))


def folder_of(root: Path, key: str) -> Path:
    return FeatureStore(root).set(key).folder


# ---- folders and names


def test_folders_are_named_for_people_and_keyed_by_hashes(root: Path, run: Run) -> None:
    keys = run(augment=Augment("random_resized_crop", seeds=[3]), cuts=["layer2:none"], dtype="bfloat16")
    trunk = staged().digest("layer2")[:12]
    assert [folder_of(root, key).relative_to(root.absolute()).as_posix() for key in keys] == [
        f"net@layer2-{trunk}/none-evaluation-bfloat16-{keys[0][:8]}",
        f"net@layer2-{trunk}/none-random_resized_crop-bfloat16-{keys[1][:8]}-seed3",
    ]
    (part,) = folder_of(root, keys[0]).iterdir()
    assert re.fullmatch(r"part-[0-9a-f]{16}\.h5", part.name)
    (table,) = (root / "images").iterdir()
    assert re.fullmatch(r"arrays-[0-9a-f]{8}\.h5", table.name)


def test_names_that_no_folder_can_have_are_made_safe(root: Path) -> None:
    model = staged()
    model.name = "my/nets/../ünder:net " + "x" * 200
    report = extract(model, arrays(2), FeatureStore(root), cuts=["layer2"], device="cpu")
    folder = folder_of(root, report.keys[0])
    assert folder.parent.parent == root.absolute()
    assert len(folder.parent.name) < 200


def test_sets_are_found_whatever_their_folders_are_called(root: Path, run: Run) -> None:
    (key,) = run()
    folder = folder_of(root, key)
    renamed = folder.rename(folder.with_name("the good ones"))
    store = FeatureStore(root)
    assert [each.key for each in store.find(request())] == [key]
    assert store.set(key[:6]).folder == renamed
    assert run() == (key,)
    assert len(list(root.rglob("part-*.h5"))) == 1


def test_parts_of_one_set_in_two_folders_are_one_set(root: Path, run: Run) -> None:
    (key,) = run()
    folder = folder_of(root, key)
    hidden = folder.rename(root / "hidden")  # a job that calls the model differently, at the same time
    run(arrays(6))
    other = hidden.rename(folder.with_name(f"{folder.name}-2"))
    store = FeatureStore(root)
    (found,) = store.find(request())
    assert {part.path.parent for part in found.parts} == {folder, other}
    assert found.index.num_images == 6
    assert len(store.sets()) == 1
    assert len(store.features(arrays(6), key)) == 6


def test_a_sets_folder_and_the_image_sets_copied_alone_are_a_store(root: Path, run: Run, tmp_path: Path) -> None:
    keys = run(cuts=["layer1", "layer2"])
    before = FeatureStore(root).features(arrays(4), keys[1])[:]
    for copy, below in (("deep", folder_of(root, keys[1]).relative_to(root.absolute())), ("flat", Path("mine"))):
        shutil.copytree(folder_of(root, keys[1]), tmp_path / copy / below)
        shutil.copytree(root / "images", tmp_path / copy / "images")
        store = FeatureStore(tmp_path / copy)
        assert [each.key for each in store.sets()] == [keys[1]]
        assert [each.key for each in store.find(request())] == [keys[1]]
        assert torch.equal(store.features(ImageSet.from_store(store), keys[1][:4])[:], before)


# ---- requests and keys


def test_a_request_leaves_open_what_nobody_named(root: Path, run: Run) -> None:
    (key,) = run(dtype="float16")
    store = FeatureStore(root)
    for each in (request(), request(dtype="float16"), request(precision="fp32")):
        found = store.find_one(each)
        assert found is not None
        assert found.key == key
    assert store.find_one(request(dtype="float32")) is None
    assert store.find_one(request(precision="bf16")) is None
    assert store.find_one(request("layer1")) is None
    assert store.find_one(request(view=replace(VIEW, resize=21))) is None
    assert FeatureStore(root.with_name("none")).find(request()) == []


def test_the_request_of_a_spec_fits_it_alone(root: Path, run: Run) -> None:
    run()
    run(dtype="float16", augment=Augment("random_resized_crop", seeds=[0]))
    sets = FeatureStore(root).sets()
    assert len(sets) == 3
    for each in sets:
        (found,) = FeatureStore(root).find(FeatureRequest.of(each.spec))
        assert found.key == each.key


def test_features_are_read_as_the_call_says_or_else_the_store(root: Path, run: Run) -> None:
    (key,) = run()
    store = FeatureStore(root, access="memory")
    assert store.features(arrays(4), key).access.startswith("memory")
    assert store.features(arrays(4), key, access="stream").access.startswith("stream")
    with pytest.raises(ValueError, match="access is 'disk'; expected auto, memory, map, stream"):
        store.features(arrays(4), key, access="disk")  # type: ignore[arg-type]


def test_an_ambiguous_request_lists_the_facts_that_differ_and_a_key_chooses(root: Path, run: Run) -> None:
    keys = [*run(dtype="float16"), *run(dtype="float32")]
    store = FeatureStore(root)
    with pytest.raises(AmbiguousRequestError) as raised:
        store.features(arrays(4), request())
    message = str(raised.value)
    assert message.startswith(f"2 feature sets in {root} fit this request: ")
    assert f"{keys[0][:8]} (storage type float16)" in message
    assert f"{keys[1][:8]} (storage type float32)" in message
    assert message.endswith("Choose one by its key: --features KEY.")
    for key, dtype in zip(keys, (torch.float16, torch.float32), strict=True):
        found = store.find_one(request(), key[:8])
        assert found is not None
        assert found.key == key
        assert store.features(arrays(4), key[:8]).dtype == dtype


def test_an_ambiguous_key_lists_the_facts_that_differ(root: Path, run: Run) -> None:
    keys = run(augment=Augment("flip", seeds=range(20)))
    first = next(key for key in keys[1:] if sum(other[0] == key[0] for other in keys) > 1)[0]
    with pytest.raises(AmbiguousRequestError, match=f"have keys that start with {first}") as raised:
        FeatureStore(root).set(first)
    for place, key in enumerate(keys):
        named = re.search(rf"{key[:8]} \(([^)]*)", str(raised.value))
        assert (named is not None) == (key[0] == first)
        if named is not None:
            assert ("seed none" if place == 0 else f"seed {place - 1}") in named[1]


def test_an_unknown_key_or_an_absent_store_is_a_sentence(root: Path, run: Run) -> None:
    with pytest.raises(FeatureStoreError, match=f"There is no store {root}. Give the folder of an existing one"):
        FeatureStore(root).set("7c41")
    (key,) = run()
    wrong = "0" if key[0] != "0" else "1"
    with pytest.raises(
        FeatureStoreError,
        match=f"{root} holds no feature set {wrong}. List what it holds: featstore ls --store {root}.",
    ):
        FeatureStore(root).set(wrong)
    root.with_name("file").touch()
    with pytest.raises(ValueError, match=r"is a file\. Expected the folder of a store"):
        FeatureStore(root.with_name("file"))


def test_an_empty_store_says_so(root: Path) -> None:
    root.mkdir()
    store = FeatureStore(root)
    assert store.sets() == []
    assert store.damaged() == []
    with pytest.raises(FeatureStoreError, match="holds no features yet"):
        store.features(arrays(2), request())
    with pytest.raises(FeatureStoreError, match="holds no image set; those it holds: none"):
        store.images()


def test_of_several_sets_the_nearest_is_named(root: Path, run: Run) -> None:
    run(view=replace(VIEW, resize=22), dtype="float16")
    (key,) = run(dtype="float16")
    with pytest.raises(FeatureStoreError, match=rf"Nearest is set {key[:8]} .* in: storage type \(stored float16"):
        FeatureStore(root).features(arrays(4), request(dtype="float32"))


def test_missing_rows_are_counted_and_named(root: Path, run: Run, tmp_path: Path) -> None:
    (key,) = run()
    store = FeatureStore(root)
    with pytest.raises(
        MissingFeaturesError,
        match=rf"{root} holds 4 of the 9 images asked for \(net@layer2 concat, evaluation view, set {key[:8]}\); 5 are "
        r"missing \(4; 5; 6; \.\.\.\)\. Compute them with featstore extract, or ask for the images that are there\.",
    ):
        store.features(arrays(9), key)
    images = ImageSet.from_folder(photos(tmp_path / "photos"))
    (tmp_path / "photos/cat/0.png").unlink()
    with pytest.raises(MissingFeaturesError, match=r"cat/0\.png: there is no such file"):
        store.features(images, key)
    with pytest.raises(ValueError, match="on_error is 'ignore'; expected raise or skip"):
        store.features(images, key, on_error="ignore")  # type: ignore[arg-type]
    for wrong in (images, None):
        with pytest.raises(TypeError, match=r"which is .*; expected the start of a set's key"):
            store.features(images, wrong)  # type: ignore[arg-type]


def test_ls_lists_what_a_person_wants_to_know(root: Path, run: Run) -> None:
    keys = run(augment=Augment("flip", seeds=[2]))
    described = {each["key"]: each for each in (found.describe() for found in FeatureStore(root).sets())}
    first = described[keys[0]]
    facts = {name: first[name] for name in first if name not in ("key", "bytes", "when", "folder")}
    assert facts == {
        "backbone": "net", "cut": "layer2", "reduce": "concat", "view": "evaluation", "seed": None, "size": 16,
        "dtype": "float32", "precision": "fp32", "rows": 4, "failed": 0, "shape": [24], "parts": 1,
    }  # fmt: skip
    assert first["bytes"] == sum(path.stat().st_size for path in Path(first["folder"]).iterdir())
    assert (described[keys[1]]["view"], described[keys[1]]["seed"]) == ("flip", 2)


def test_ls_tells_a_persons_own_policy_from_the_built_in_one_of_its_name(root: Path, run: Run) -> None:
    def flip(image: Tensor, generator: torch.Generator) -> Tensor:
        return image

    key = run(augment=Augment(flip, seeds=[2]))[1]
    assert re.fullmatch(r"flip \(source [0-9a-f]{12}\)", FeatureStore(root).set(key).describe()["view"])


# ---- a model without weights


def test_a_laptop_without_images_or_weights_has_features_targets_and_a_model(
    root: Path, run: Run, tmp_path: Path
) -> None:
    images = ImageSet.from_folder(photos(tmp_path / "photos", 10)).split(valid=0.2, seed=0)
    (key,) = run(images)
    before = FeatureStore(root).features(images.train, key)[:]
    shutil.rmtree(tmp_path / "photos")

    store = FeatureStore(root)
    there = ImageSet.from_store(store)
    assert (there.name, there.ids, there.classes, there.task) == ("photos", images.ids, ("cat", "dog"), "single")
    assert there.splits.tolist() == images.splits.tolist()
    assert images.train.targets is not None
    assert there.train.targets is not None
    assert np.array_equal(there.train.targets, images.train.targets)
    assert np.array_equal(store.features(there.train, key[:4]).numpy(), before.numpy())
    with pytest.raises(FeatureStoreError, match=rf"this image set came from a store \({root}/images/photos-\w+\)"):
        there.read(0)

    model, live = store.model(key[:4]), staged()
    assert model.is_absent
    assert (model.name, model.default_cut, model.view) == ("net", "layer2", VIEW)
    assert model.cut_points == live.cut_points[: live.index("layer2") + 1]
    assert model.digests() == {name: live.digests()[name] for name in model.cut_points}
    assert (model.shape("layer2"), model.layout("layer2")) == (live.shape("layer2"), "NCHW")
    assert model.pool("layer2").facts() == live.pool("layer2").facts()
    with pytest.raises(ModelError, match=r"The trunk up to layer1\.0 isn't here"):
        model(torch.zeros(1, 3, 16, 16))


# ---- image sets


def test_an_image_without_a_digest_gets_no_row_of_another_stores_image_of_that_name(root: Path, run: Run) -> None:
    (key,) = run(arrays(4))
    images = arrays(4, seed=1)
    elsewhere = FeatureStore(root.with_name("elsewhere"))
    elsewhere.save_images(images, replace(images.digests(), failed={1: "broken"}))
    there = ImageSet.from_store(elsewhere).select([1])
    with pytest.raises(MissingFeaturesError, match=r"\(1: .*has no digest of it"):
        FeatureStore(root).features(there, key)


def content(images: ImageSet) -> list[Any]:
    targets = None if images.targets is None else images.targets.tolist()
    return [images.ids, targets, images.classes, images.splits.tolist(), images.groups, images.task]


@pytest.mark.parametrize(
    "images",
    [
        arrays(5),
        arrays(6).split(valid=0.5),
        ImageSet.from_arrays(pixels(3)),
        ImageSet.from_arrays(pixels(3), ["b", None, "b"], groups=["p", "q", "p"], splits=["train", "", "test"]),
        ImageSet.from_arrays(pixels(3), [["a"], [], ["b", "a"]], task="multi"),
        ImageSet.from_arrays(pixels(2), ["ümläut", "a\nb\t"], groups=["", "ß"]),
        arrays(3).select([]),
    ],
    ids=["single", "dealt", "unlabelled", "groups", "multi", "unicode", "empty"],
)
def test_an_image_set_comes_back_as_it_was(root: Path, images: ImageSet) -> None:
    digests = images.digests()
    path = FeatureStore(root).save_images(images, digests)
    assert path is not None
    there = ImageSet.from_store(FeatureStore(root))
    assert content(there) == content(images)
    assert np.array_equal(there.digests().values, digests.values)


def test_names_of_files_that_are_no_text_come_back(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos/cat"
    folder.mkdir(parents=True)
    name = os.fsencode(folder) + b"/f\xfcr.jpg"
    with open(name, "wb") as file:
        file.write(jpeg(0))
    images = ImageSet.from_folder(tmp_path / "photos")
    FeatureStore(root).save_images(images, images.digests())
    assert ImageSet.from_store(FeatureStore(root)).ids == images.ids == ("cat/f\udcfcr.jpg",)


def test_the_facts_of_files_come_back_exactly(root: Path) -> None:
    images = arrays(3)
    stats = (StatFacts(1, 2, 3, 2**64 - 5, 4), None, StatFacts(0, -7, 2**62, 12, 9))
    digests = replace(images.digests(), stats=stat_rows(stats))
    store = FeatureStore(root)
    store.save_images(images, digests)
    assert tuple(known.stat for known in FeatureStore(root).known_digests(images).values()) == stats


def test_images_that_could_not_be_read_have_no_digest_there(root: Path) -> None:
    images = arrays(3)
    digests = replace(images.digests(), failed={1: "broken"})
    FeatureStore(root).save_images(images, digests)
    there = ImageSet.from_store(FeatureStore(root))
    assert len(there) == 3
    assert list(there.digests().failed) == [1]


def labelled(*labels: str, name: str = "arrays") -> ImageSet:
    return ImageSet.from_arrays(pixels(len(labels)), labels, classes=["cat", "dog"], name=name)


def save(root: Path, images: ImageSet) -> Path | None:
    return FeatureStore(root).save_images(images, images.digests())


def test_the_newest_table_is_the_one_that_is_no_parent(root: Path) -> None:
    first, second, third = ("cat", "cat"), ("cat", "dog"), ("cat", "cat")
    assert all(save(root, labelled(*labels)) is not None for labels in (first, second, third))
    assert len(list((root / "images").iterdir())) == 3  # going back is news too
    assert content(ImageSet.from_store(FeatureStore(root))) == content(labelled(*third))


def test_an_image_set_that_is_filed_already_is_not_filed_again(root: Path) -> None:
    assert save(root, labelled("cat")) is not None
    assert save(root, labelled("cat")) is None
    assert len(list((root / "images").iterdir())) == 1


def test_image_sets_of_several_names_are_chosen_by_name(root: Path) -> None:
    save(root, labelled("cat", name="plants"))
    path = save(root, labelled("dog", name="photos"))
    assert path is not None
    store = FeatureStore(root)
    with pytest.raises(
        AmbiguousRequestError,
        match=r"several image sets: photos-\w{8} \(1 images\), plants-\w{8} \(1 images\)\. Name one",
    ):
        ImageSet.from_store(store)
    assert ImageSet.from_store(store, name="photos").name == "photos"
    assert content(ImageSet.from_store(store, name=path.stem)) == content(labelled("dog"))
    with pytest.raises(FeatureStoreError, match="holds no image set called cars; those it holds: photos, plants"):
        ImageSet.from_store(store, name="cars")


def test_two_newest_tables_are_an_error_until_the_next_one_joins_them(root: Path, tmp_path: Path) -> None:
    save(root, labelled("cat", "cat"))
    shutil.copytree(root, tmp_path / "other")
    save(root, labelled("cat", "dog"))
    theirs = save(tmp_path / "other", labelled("dog", "dog"))  # a job at the same time
    assert theirs is not None
    shutil.copy(theirs, root / "images")
    with pytest.raises(AmbiguousRequestError, match="several image sets"):
        ImageSet.from_store(FeatureStore(root))
    assert content(ImageSet.from_store(FeatureStore(root), name=theirs.stem)) == content(labelled("dog", "dog"))
    save(root, labelled("dog", "cat"))
    assert content(ImageSet.from_store(FeatureStore(root))) == content(labelled("dog", "cat"))


def test_jobs_that_file_the_same_images_at_once_make_one_table(root: Path, tmp_path: Path) -> None:
    images = ImageSet.from_folder(photos(tmp_path / "photos"))
    paths = []
    for place in ("one", "two"):
        digests = ImageSet.from_folder(tmp_path / "photos").digests()  # each job hashes the files at its own time
        paths.append(FeatureStore(tmp_path / place).save_images(images, digests))
    assert paths[0] is not None
    assert paths[1] is not None
    assert paths[0].name == paths[1].name
    assert paths[0].read_bytes() != paths[1].read_bytes()


def test_jobs_that_file_the_same_images_one_after_another_leave_one_table(root: Path) -> None:
    images = arrays(3)
    second = 1_000_000_000

    def hashed_at(seconds: int) -> Digests:
        stats = stat_rows([StatFacts(7, 10 * second, 10 * second, number, seconds * second) for number in range(3)])
        return replace(images.digests(), stats=stats)

    assert FeatureStore(root).save_images(images, hashed_at(11)) is not None
    assert FeatureStore(root).save_images(images, hashed_at(60)) is not None  # which tells that nobody wrote meanwhile
    assert FeatureStore(root).save_images(images, hashed_at(61)) is None
    assert FeatureStore(root).save_images(labelled("dog", "dog", "cat"), hashed_at(61)) is not None


def test_a_table_appears_while_another_store_object_is_open(root: Path) -> None:
    store = FeatureStore(root)
    save(root, labelled("cat"))
    assert content(store.images()) == content(labelled("cat"))
    save(root, labelled("dog"))
    assert content(store.images()) == content(labelled("dog"))


# ---- which files are read again


@contextmanager
def opened_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of files below `folder` that are opened in the block, through the real `open`."""
    names: list[str] = []
    real_open = builtins.open

    def counting(file: Any, *args: Any, **kwargs: Any) -> io.IOBase:
        if isinstance(file, str | Path) and Path(file).is_relative_to(folder):
            names.append(Path(file).relative_to(folder).as_posix())
        opened: io.IOBase = real_open(file, *args, **kwargs)
        return opened

    with monkeypatch.context() as patched:
        patched.setattr(builtins, "open", counting)
        yield names


def aged(folder: Path) -> ImageSet:
    """Images whose times lie long enough before they are hashed."""
    photos(folder, 4)
    newest = max(path.stat().st_ctime for path in folder.rglob("*"))
    time.sleep(max(0.0, newest + 2.1 - time.time()))
    return ImageSet.from_folder(folder)


def test_unchanged_files_are_not_read_again_and_changed_ones_are(
    root: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "photos"
    (key,) = run(aged(folder))
    tables = sorted((root / "images").iterdir())
    with opened_files(folder, monkeypatch) as names:
        assert len(FeatureStore(root).features(ImageSet.from_folder(folder), key)) == 4
        run(ImageSet.from_folder(folder))
        folder.rename(tmp_path / "moved")
        moved = ImageSet.from_folder(tmp_path / "moved", name="photos")
        assert len(FeatureStore(root).features(moved, key)) == 4
        (tmp_path / "moved").rename(folder)
    assert names == []
    assert sorted((root / "images").iterdir()) == tables
    before = (folder / "dog/1.jpg").stat()
    data = bytearray((folder / "dog/1.jpg").read_bytes())
    data[-3] ^= 1
    (folder / "dog/1.jpg").write_bytes(data)
    os.utime(folder / "dog/1.jpg", ns=(before.st_atime_ns, before.st_mtime_ns))
    after = (folder / "dog/1.jpg").stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)
    with (
        opened_files(folder, monkeypatch) as names,
        pytest.raises(MissingFeaturesError, match=r"\(1 changed since: dog/1\.jpg\)"),
    ):
        FeatureStore(root).features(ImageSet.from_folder(folder), key)
    assert names == ["dog/1.jpg"]


# ---- damage


def test_a_part_in_another_sets_folder_is_refused(root: Path, run: Run) -> None:
    keys = run(cuts=["layer1", "layer2"])
    (part,) = folder_of(root, keys[0]).iterdir()
    shutil.copy(part, folder_of(root, keys[1]) / "part-ffffffffffffffff.h5")
    store = FeatureStore(root)
    with pytest.raises(
        DamagedFileError,
        match=rf"part-ffffffffffffffff\.h5 belongs to set {keys[0][:8]}, and others beside it to set {keys[1][:8]}",
    ):
        store.set(keys[1])
    assert [each.key for each in store.sets()] == [keys[0]]
    assert len(store.damaged()) == 1


def test_a_damaged_part_stops_requests_for_its_set_and_no_other(root: Path, run: Run) -> None:
    keys = run(augment=Augment("flip", seeds=[0]), cuts=["layer1", "layer2"])
    (part,) = folder_of(root, keys[2]).iterdir()
    sound = part.read_bytes()
    flip_bit(part, 5000)
    store = FeatureStore(root)
    for asked in (lambda: store.set(keys[2]), lambda: store.find(request("layer2")), lambda: run()):
        with pytest.raises(
            DamagedFileError, match=f"{part.name} is damaged: .* set it aside .* and extract or import again"
        ):
            asked()
    assert store.set(keys[0]).key == keys[0]
    assert [each.key for each in store.find(request("layer1"))] == [keys[0]]
    augmented = request("layer2", view=VIEW.with_seed("flip", 0))  # of the same trunk
    assert [each.key for each in store.find(augmented)] == [keys[3]]
    assert store.find(request("layer2", dtype="float16")) == []
    assert sorted(each.key for each in store.sets()) == sorted(key for key in keys if key != keys[2])
    (error,) = store.damaged()
    assert part.name in str(error)
    part.write_bytes(sound)  # one remedy
    assert (len(store.sets()), store.damaged()) == (4, [])
    part.unlink()  # the other
    assert run() == (keys[2],)
    assert len(FeatureStore(root).features(arrays(4), keys[2])) == 4


def test_a_damaged_part_in_a_renamed_folder_stops_requests_that_it_might_fit(root: Path, run: Run) -> None:
    (key,) = run()
    folder = folder_of(root, key)
    flip_bit(next(folder.iterdir()), 5000)
    folder.rename(folder.with_name("the good ones"))
    for asked in (request(), request(dtype="float16")):
        with pytest.raises(DamagedFileError, match=r"the good ones/part-\w+\.h5 is damaged"):
            FeatureStore(root).find(asked)


def test_a_damaged_part_beside_a_sound_one_stops_requests_for_its_set_only(root: Path, run: Run) -> None:
    keys = run(augment=Augment("flip", seeds=[0]))
    run(arrays(6), augment=Augment("flip", seeds=[0]))
    flip_bit(max(folder_of(root, keys[1]).iterdir()), 5000)
    store = FeatureStore(root)
    assert [each.key for each in store.find(request())] == [keys[0]]  # of the same trunk
    with pytest.raises(DamagedFileError):
        store.find(request(view=VIEW.with_seed("flip", 0)))


def rewritten(folder: Path, facts: dict[str, Any]) -> None:
    """A part of another writer: sound as a file, with `facts` of its own."""
    write_part(
        folder / "part-0000000000000000.h5",
        features=torch.zeros((0, 24), dtype=torch.float32),
        digests=np.zeros((0, 32), np.uint8),
        decoders=np.zeros(0, np.uint8),
        facts=facts,
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spec": {"version": 2}}, "this featstore knows version 1.*upgrade"),
        ({"key": "0" * 64}, "its key isn't that of its spec"),
        ({"probe": None}, "its facts lack probe"),
        ({"supersedes": None}, "its facts lack supersedes"),
        ({"view": None, "who": None}, "its facts lack view, who"),
        ({"spec": {"dtype": "float16"}}, r"it holds torch.float32, and its spec says float16"),
        ({"spec": {"view": {"version": 9}}}, "a view of version 9"),
    ],
    ids=["newer spec", "other key", "no probe", "no supersedes", "no view", "other type", "newer view"],
)
def test_facts_that_are_not_understood_are_refused(root: Path, run: Run, change: dict[str, Any], message: str) -> None:
    (key,) = run()
    found = FeatureStore(root).set(key)
    facts = {**found.facts}
    for name, value in change.items():
        if isinstance(value, dict):
            facts[name] = {**facts[name], **value}
        elif value is None:
            del facts[name]
        else:
            facts[name] = value
    if "key" not in change:
        facts["key"] = digest_json(facts["spec"])
    rewritten(found.folder, facts)
    with pytest.raises(
        DamagedFileError, match=f"part-0000000000000000.h5 can't be used by this featstore: .*{message}"
    ):
        FeatureStore(root).set(key)


def test_superseded_parts_are_left_out(root: Path, run: Run) -> None:
    (key,) = run()
    found = FeatureStore(root).set(key)
    rewritten(found.folder, {**found.facts, "supersedes": [found.parts[0].path.name]})
    (part,) = FeatureStore(root).set(key).parts
    assert part.path.name == "part-0000000000000000.h5"


def test_features_of_another_decode_policy_are_refused_with_its_name_and_hold_up_no_job(root: Path, run: Run) -> None:
    (key,) = run()
    found = FeatureStore(root).set(key)
    view = {**found.spec.view, "decode": "rgb8-v9"}
    spec = {**found.spec.facts(), "view": view}
    other = digest_json(spec)
    found.parts[0].path.unlink()
    folder = found.folder.rename(found.folder.with_name(found.folder.name.replace(key[:8], other[:8])))
    rewritten(folder, {**found.facts, "spec": spec, "view": view, "key": other})
    store = FeatureStore(root)
    sentence = (
        r"part-0000000000000000\.h5 can't be used by this featstore: decode policy 'rgb8-v9' is unknown here; this "
        r"featstore has 'featstore-decode-1' \(full\), 'featstore-decode-1-reduced' \(reduced\)\. If a newer one wrote "
        r"it, upgrade"
    )
    with pytest.raises(DamagedFileError, match=sentence):
        store.set(other)
    with pytest.raises(FactsDifferError, match=rf"holds no features that can be used\. .*{sentence}"):
        store.features(arrays(4), request())
    assert run() == (key,)
    assert len(FeatureStore(root).features(arrays(4), request())) == 4


@pytest.mark.parametrize("place", [0, 1])
def test_a_part_that_vanishes_while_the_store_is_opened_is_no_error(
    root: Path, run: Run, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    (key,) = run()
    run(arrays(6))
    folder = folder_of(root, key)
    paths = sorted(folder.iterdir())
    superseded = paths.pop(place)
    store = FeatureStore(root)
    real_open = Part.open

    def unlinking(path: Path) -> Part:
        if path == superseded:
            superseded.unlink(missing_ok=True)  # another process has compacted meanwhile
        return real_open(path)

    monkeypatch.setattr(Part, "open", unlinking)
    (found,) = store.find(request())
    assert [part.path for part in found.parts] == paths


def test_a_link_to_nothing_is_damage(root: Path, run: Run) -> None:
    (key,) = run()
    (folder_of(root, key) / "part-zzz.h5").symlink_to("nowhere")
    with pytest.raises(DamagedFileError, match=r"part-zzz\.h5 is a link to a file that isn't there"):
        FeatureStore(root).set(key)


def test_a_damaged_image_table_stops_its_image_set_and_no_other(root: Path, run: Run) -> None:
    (key,) = run()
    other = save(root, labelled("cat", name="plants"))
    assert other is not None
    flip_bit(other, 5000)
    store = FeatureStore(root)
    assert run(arrays(5)) == (key,)
    assert ImageSet.from_store(store, name="arrays").name == "arrays"
    assert len(store.features(arrays(4), key)) == 4
    for asked in (lambda: store.images("plants"), lambda: save(root, labelled("dog", name="plants"))):
        with pytest.raises(DamagedFileError, match=other.name):
            asked()
    assert [other.name in str(error) for error in store.damaged()] == [True]


def test_of_tables_that_were_replaced_the_facts_alone_are_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [save(root, labelled("cat", *labels)) for labels in (("cat", "cat"), ("dog", "cat"), ("cat", "dog"))]
    opened: list[Path] = []
    original = Table.open.__func__  # type: ignore[attr-defined]

    def noted(cls: type[Table], path: Path) -> Table:
        opened.append(path)
        return cast(Table, original(cls, path))

    monkeypatch.setattr(Table, "open", classmethod(noted))
    for path in paths[:-1]:
        assert path is not None
        with h5py.File(path) as file:
            place = file["id_bytes"].id.get_offset()
        altered = bytearray(path.read_bytes())
        altered[place] ^= 1  # damage to what was replaced harms nobody
        path.write_bytes(altered)
    assert content(ImageSet.from_store(FeatureStore(root))) == content(labelled("cat", "cat", "dog"))
    assert opened == [paths[-1]]


def test_altered_facts_of_a_replaced_table_are_told(root: Path) -> None:
    first, _ = save(root, labelled("cat")), save(root, labelled("dog"))
    assert first is not None
    with h5py.File(first) as file:
        place = file["facts"].id.get_offset()
    altered = bytearray(first.read_bytes())
    altered[place + 9] ^= 1
    first.write_bytes(altered)
    with pytest.raises(DamagedFileError, match=f"{first.name} is damaged: bytes are altered in its facts"):
        FeatureStore(root).images()


def test_strange_files_are_passed_over(root: Path, run: Run) -> None:
    (key,) = run()
    folder = folder_of(root, key)
    (root / "images/._arrays-12345678.h5").write_bytes(b"what macOS leaves on a shared disk")
    (root / ".hidden-folder").mkdir()
    (root / "README").write_text("mine")
    (folder / "notes.txt").write_text("mine")
    (folder / ".part-1.h5.tmp-2").write_bytes(b"a job that was killed")
    shutil.copytree(folder, folder.with_name(".removed"))
    store = FeatureStore(root)
    assert [each.key for each in store.sets()] == [key]
    assert store.damaged() == []
    assert store.images().name == "arrays"


# ---- one store object for long


def test_a_store_sees_what_others_add_and_keeps_what_it_opened(root: Path, run: Run) -> None:
    (key,) = run()
    store = FeatureStore(root)
    first = store.set(key)
    assert store.set(key) is first
    run(arrays(6))
    second = store.set(key)
    assert second.parts[0] in first.parts or second.parts[1] in first.parts
    assert len(store.features(arrays(6), second)) == 6
    assert len(first.parts) == 1


def test_a_store_may_be_opened_by_a_relative_path(
    root: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (key,) = run()
    monkeypatch.chdir(tmp_path)
    store = FeatureStore("features")
    features = store.features(arrays(4), key)
    monkeypatch.chdir("/")
    assert len(features[:]) == 4
    assert len(store.sets()) == 1
    assert repr(store) == "FeatureStore('features')"


def test_failures_are_told_from_rows_without_looking_at_each_row(root: Path, run: Run) -> None:
    (key,) = run()
    found = FeatureStore(root).set(key)
    digests = arrays(6).digests()
    reasons = {bytes(row).hex(): f"reason {place}" for place, row in enumerate(digests.values)}
    rewritten(found.folder, {**found.facts, "failed": reasons})
    failed = FeatureStore(root).set(key)
    assert sorted(failed.failed.values()) == ["reason 4", "reason 5"]
    store = FeatureStore(root)
    assert store.is_failed(failed, digests).tolist() == [False] * 4 + [True] * 2
    unreadable = Digests(values=digests.values, failed={0: "gone"}, stats=digests.stats)
    assert store.is_failed(failed, unreadable).tolist() == [True] + [False] * 3 + [True] * 2
    assert store.missing(failed, unreadable).tolist() == [True] + [False] * 3 + [True] * 2
    assert isinstance(failed, FeatureSet)
