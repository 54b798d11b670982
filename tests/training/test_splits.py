from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny import jpeg, photos, pixels, staged

from featstore import DamagedFileError, FeatureStoreError, ImageSet
from featstore.models.runs import new_run, read_run, write_run
from training import Learner
from training.class_tables import with_classes
from training.splits import FILE, PastSplit

COUNT = 20


@pytest.fixture
def images(tmp_path: Path) -> ImageSet:
    return ImageSet.from_folder(photos(tmp_path / "photos", COUNT)).split(valid=0.3, test=0.2, seed=4)


def recorded(run: Path, images: ImageSet, *, valid: float = 0.3, seed: int = 4) -> PastSplit:
    with new_run(run) as made:
        write_run(made, {}, {"weight": torch.zeros(1)})
        PastSplit.of(images, images.digests(), valid=valid, seed=seed).write(made)
    past = PastSplit.read(run)
    assert past is not None
    return past


def by_content(images: ImageSet) -> dict[bytes, str]:
    digests = images.digests().values
    return {bytes(row): name for row, name in zip(digests, images.splits.tolist(), strict=True)}


def undealt(images: ImageSet) -> ImageSet:
    return images.with_splits([""] * len(images))


def test_a_split_comes_back_as_it_was_recorded(tmp_path: Path, images: ImageSet) -> None:
    past = recorded(tmp_path / "run", images)
    for name in ("train", "valid", "test"):
        expected = images.digests().values[images.splits == name]
        assert len(expected) > 0
        assert np.array_equal(past.digests[name], expected)
    assert (past.run, past.valid, past.seed) == (tmp_path / "run", 0.3, 4)
    with new_run(tmp_path / "other") as made:
        write_run(made, {}, {"weight": torch.zeros(1)})
    assert PastSplit.read(tmp_path / "other") is None


def test_a_model_never_gets_the_split_of_a_run_that_has_taken_the_place_of_its_own(
    tmp_path: Path, images: ImageSet
) -> None:
    recorded(tmp_path / "run", images)
    identity = read_run(tmp_path / "run").identity
    assert PastSplit.read(tmp_path / "run", identity=identity) is not None
    with new_run(tmp_path / "run", overwrite=True) as made:
        write_run(made, {}, {"weight": torch.ones(1)})
    with pytest.raises(FeatureStoreError, match=r"holds another run than .* so its split\.npz is about another model"):
        PastSplit.read(tmp_path / "run", identity=identity)


def test_a_split_follows_images_that_were_renamed_and_moved(tmp_path: Path, images: ImageSet) -> None:
    past = recorded(tmp_path / "run", images)
    for number, name in enumerate(images.ids):
        place = tmp_path / "moved" / name.partition("/")[0] / f"{number * 7 % COUNT:03d}{Path(name).suffix}"
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "photos" / name, place)
    moved = ImageSet.from_folder(tmp_path / "moved")
    applied = past.applied(moved, {})
    assert by_content(applied) == by_content(images)
    assert (applied.splits != moved.split(valid=0.3, seed=4).splits).any(), "the rule alone would deal them otherwise"


def test_images_the_run_had_not_seen_are_dealt_by_its_rule(tmp_path: Path, images: ImageSet) -> None:
    past = recorded(tmp_path / "run", images)
    for number in range(COUNT, 2 * COUNT):
        (tmp_path / "photos" / ("cat", "dog")[number % 2] / f"{number}.jpg").write_bytes(jpeg(number))
    grown = ImageSet.from_folder(tmp_path / "photos")
    applied = past.applied(grown, {})
    known = by_content(images)
    by_rule = grown.split(valid=0.3, seed=4).splits
    fresh = [place for place, row in enumerate(grown.digests().values) if bytes(row) not in known]
    assert len(fresh) == COUNT
    assert [applied.splits[place] for place in fresh] == [by_rule[place] for place in fresh]
    assert {content: by_content(applied)[content] for content in known} == known


def test_a_new_image_of_a_known_group_goes_where_its_group_went() -> None:
    arrays, labels = pixels(24), [row % 2 for row in range(24)]
    groups = [f"patient {row % 8}" for row in range(24)]
    old = ImageSet.from_arrays(arrays[:16], labels[:16], groups=groups[:16]).split(valid=0.3, seed=1)
    past = PastSplit(
        run=Path("run"),
        digests={name: old.digests().values[old.splits == name] for name in ("train", "valid", "test")},
        valid=0.3,
        seed=2,  # a rule that deals groups otherwise
    )
    grown = ImageSet.from_arrays(arrays, labels, groups=groups)
    applied = past.applied(grown, {})
    for group in set(groups):
        assert len({name for name, own in zip(applied.splits.tolist(), groups, strict=True) if own == group}) == 1
    assert applied.splits[:16].tolist() == old.splits.tolist()


def test_a_set_with_a_split_of_its_own_keeps_it(tmp_path: Path, images: ImageSet) -> None:
    past = recorded(tmp_path / "run", images)
    other = images.split(valid=0.5, seed=9)
    assert past.applied(other, {}) is other


def test_an_image_in_two_splits_stays_held_out(tmp_path: Path) -> None:
    arrays = pixels(3)[[0, 1, 2, 0]]
    images = ImageSet.from_arrays(arrays, [0, 1, 0, 0], splits=["train", "train", "train", "valid"])
    past = recorded(tmp_path / "run", images)
    assert past.applied(undealt(images), {}).splits.tolist() == ["valid", "train", "train", "valid"]


def test_a_set_that_was_not_dealt_was_trained_on(tmp_path: Path, images: ImageSet) -> None:
    past = recorded(tmp_path / "run", undealt(images))
    assert [len(past.digests[name]) for name in ("train", "valid", "test")] == [COUNT, 0, 0]


@pytest.mark.parametrize("is_dealt", [True, False])
def test_images_that_could_not_be_read_are_not_recorded(tmp_path: Path, images: ImageSet, is_dealt: bool) -> None:
    (tmp_path / "photos" / images.ids[3]).unlink()
    past = recorded(tmp_path / "run", images if is_dealt else undealt(images))
    assert sum(len(rows) for rows in past.digests.values()) == COUNT - 1
    assert all(rows.any(axis=1).all() for rows in past.digests.values())


def test_training_on_what_a_run_held_out_is_refused_with_the_count(tmp_path: Path, images: ImageSet) -> None:
    past = recorded(tmp_path / "run", images)
    other = images.split(valid=0.3, test=0.2, seed=5)
    leaked = int(((images.splits != "train") & (other.splits == "train")).sum())
    assert leaked > 1
    training = other.train
    with pytest.raises(
        FeatureStoreError, match=rf"{leaked} of the {len(training)} images to train on .*/run"
    ) as caught:
        past.check(training, training.digests())
    assert "--allow-leak (in Python: allow_leak=True)" in str(caught.value)
    past.check(images.train, images.train.digests())


def test_the_newer_split_decides_and_nothing_older_is_forgotten() -> None:
    images = ImageSet.from_arrays(pixels(6))
    older = images.select(range(4)).with_splits(["train", "valid", "test", "train"])
    newer = images.select(range(2, 6)).with_splits(["train", "train", "valid", "test"])
    old, new = (PastSplit.of(each, each.digests(), valid=0.2, seed=seed) for seed, each in enumerate((older, newer)))
    merged = new.over(old)
    assert merged.applied(images, {}).splits.tolist() == ["train", "valid", "train", "train", "valid", "test"]
    assert sum(len(rows) for rows in merged.digests.values()) == 6
    assert (merged.seed, new.over(None)) == (1, new)
    # What the older one trained on stays known as that where the newer one holds it out.
    again = PastSplit.of(older.with_splits(["valid"] * 4), older.digests(), valid=0.2, seed=2).over(old)
    assert again.were_trained_on(images.digests()).tolist() == [True, False, False, True, False, False]
    assert again.applied(older.with_splits([""] * 4), {}).splits.tolist() == ["valid"] * 4


def test_scored_images_that_were_trained_on_are_counted(tmp_path: Path, images: ImageSet) -> None:
    past = recorded(tmp_path / "run", images)
    assert past.trained_note(images.valid, images.valid.digests()) is None
    note = past.trained_note(images, images.digests())
    assert note is not None
    assert note.startswith(f"{len(images.train)} of the 20 images were trained on by {tmp_path / 'run'}: ")


def test_a_copy_of_an_image_that_is_trained_on_is_no_leak_of_the_next_fit() -> None:
    images = ImageSet.from_arrays(pixels(8)[[0, 1, 2, 3, 4, 5, 6, 0]], [0, 1] * 4, splits=["train"] * 6 + ["valid"] * 2)
    learn = Learner(staged(), images, head="linear", quiet=True, device="cpu", workers=0)
    for _ in range(2):
        learn.fit(1, lr=1e-3)
    learn.images = images.with_splits(["train"] * 8)
    with pytest.raises(FeatureStoreError, match="1 of the 8 images to train on were held out"):
        learn.fit(1, lr=1e-3)


def test_one_new_name_hides_no_leak(tmp_path: Path, images: ImageSet) -> None:
    past = recorded(tmp_path / "run", images)
    (tmp_path / "other" / "cat").mkdir(parents=True)
    shutil.copy(tmp_path / "photos" / images.valid.ids[0], tmp_path / "other" / "cat" / "new.jpg")
    renamed = ImageSet.from_folder(tmp_path / "other")
    with pytest.raises(FeatureStoreError, match="1 of the 1 images"):
        past.check(renamed, renamed.digests())


@pytest.mark.parametrize("how", ["cut", "empty", "text", "flipped", "shape"])
def test_a_damaged_record_is_named(tmp_path: Path, images: ImageSet, how: str) -> None:
    recorded(tmp_path / "run", images)
    path = tmp_path / "run" / FILE
    content = bytearray(path.read_bytes())
    if how == "flipped":
        content[len(content) // 3] ^= 0xFF
    contents = {"cut": bytes(content[:-200]), "empty": b"", "text": b"no archive", "flipped": bytes(content)}
    if how == "shape":
        np.savez(path, train=np.zeros((2, 8)), valid=0, test=0, rule_valid=0.2, rule_seed=0)
    else:
        path.write_bytes(contents[how])
    with pytest.raises(DamagedFileError, match=r"split\.npz isn't the file that was saved .* Restore it, or train the"):
        PastSplit.read(tmp_path / "run")
    (tmp_path / "old").mkdir()  # of version 1, which has no checksum of it
    (tmp_path / "old" / "model.json").write_text('{"format": 1, "tensors": ""}')
    shutil.copy(path, tmp_path / "old")
    with pytest.raises(DamagedFileError, match=r"split\.npz is damaged .* Restore it, or train the model again"):
        PastSplit.read(tmp_path / "old")


def test_a_record_that_would_fill_the_memory_is_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text('{"format": 1, "tensors": ""}')
    digests = np.zeros((1 << 16, 32), np.uint8)
    np.savez_compressed(tmp_path / FILE, train=digests, valid=digests, test=digests, rule_valid=0.2, rule_seed=0)
    with pytest.raises(DamagedFileError, match=r"split\.npz is damaged \(its [\d,]+ bytes would unpack to 6,29"):
        PastSplit.read(tmp_path)


def labelled(labels: Sequence[object], classes: Sequence[str] | None = None, task: str = "single") -> ImageSet:
    return ImageSet.from_arrays(pixels(len(labels)), labels, classes=classes, task=task)  # type: ignore[arg-type]


def names_of(images: ImageSet) -> list[list[str]]:
    assert images.targets is not None
    if images.task == "single":
        return [[images.classes[int(target)]] if target >= 0 else [] for target in images.targets]
    return [[images.classes[int(place)] for place in np.flatnonzero(row)] for row in images.targets]


@pytest.mark.parametrize("table", [("a", "b", "c"), ("c", "a", "b"), ("x", "c", "b", "y", "a")])
def test_labels_keep_their_names_in_another_class_table(table: tuple[str, ...]) -> None:
    images = labelled(["c", "a", None, "b", "a"])
    mapped = with_classes(images, table, Path("run"))
    assert mapped.classes == table
    assert names_of(mapped) == names_of(images) == [["c"], ["a"], [], ["b"], ["a"]]


@pytest.mark.parametrize("table", [("a", "b", "c"), ("c", "a", "b"), ("x", "c", "b", "y", "a")])
def test_several_labels_keep_their_names_in_another_class_table(table: tuple[str, ...]) -> None:
    images = labelled([["c", "a"], [], ["b"]], task="multi")
    mapped = with_classes(images, table, Path("run"))
    assert mapped.targets is not None
    assert mapped.targets.shape == (3, len(table))
    assert [sorted(names) for names in names_of(mapped)] == [["a", "c"], [], ["b"]]


def test_a_class_that_the_images_lack_shifts_nothing() -> None:
    mapped = with_classes(labelled(["b", "c"]), ("a", "b", "c"), Path("run"))
    assert mapped.targets is not None
    assert mapped.targets.tolist() == [1, 2]


def test_images_without_labels_take_the_runs_classes() -> None:
    images = ImageSet.from_arrays(pixels(2))
    assert with_classes(images, ("a", "b"), Path("run")).classes == ("a", "b")
    assert with_classes(replace(images, classes=("a",)), ("a", "b"), Path("run")).classes == ("a", "b")


def test_a_class_that_the_run_does_not_know_is_named() -> None:
    with pytest.raises(
        FeatureStoreError, match=r"have the class emu, which the model of runs/a doesn't know \(it knows "
    ):
        with_classes(labelled(["a", "emu"]), ("a", "b"), Path("runs/a"))
    with pytest.raises(FeatureStoreError, match="have the classes emu, yak, which"):
        with_classes(labelled(["emu", "yak"]), ("a", "b"), Path("runs/a"))
